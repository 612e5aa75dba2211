"""GreedyLR on a validation loss that is computed every k steps, inside one jitted scan.

An over-parameterised model overfits: its training loss keeps decreasing while its validation loss increases.
The rule therefore observes the validation loss. `has_value` marks the steps that have a new one.
"""

import jax
import jax.numpy as jnp
import optax

import greedylr_jax

STEPS, EVERY, FEATURES = 2000, 20, 60
tx = optax.chain(
    optax.sgd(0.002),
    greedylr_jax.greedy_lr(factor=0.7, patience=2, window=None, min_scale=0.01, max_scale=3.0),
)


def make_data(key: jax.Array, examples: int) -> tuple[jax.Array, jax.Array]:
    """Linear data with noise: 60 features fit 80 examples almost exactly, including their noise."""
    x_key, noise_key = jax.random.split(key)
    x = jax.random.normal(x_key, (examples, FEATURES))
    return x, x[:, 0] - x[:, 1] + jax.random.normal(noise_key, (examples,))


def loss_fn(params: jax.Array, data: tuple[jax.Array, jax.Array]) -> jax.Array:
    x, y = data
    return jnp.mean((x @ params - y) ** 2)


@jax.jit
def train() -> dict[str, jax.Array]:
    train_data = make_data(jax.random.key(0), 80)
    validation_data = make_data(jax.random.key(1), 400)

    def step(carry, index):
        params, state = carry
        loss, grads = jax.value_and_grad(loss_fn)(params, train_data)
        due = index % EVERY == 0
        # The validation loss is computed only if due; at the other steps the value is ignored.
        value = jax.lax.cond(due, lambda: loss_fn(params, validation_data), lambda: jnp.nan)
        updates, state = tx.update(grads, state, params, value=value, has_value=due)
        scale = greedylr_jax.get_scale(state)
        return (optax.apply_updates(params, updates), state), {
            "loss": loss,
            "scale": scale,
            "validation": value,
        }

    params = jnp.zeros(FEATURES)
    return jax.lax.scan(step, (params, tx.init(params)), jnp.arange(STEPS))[1]


if __name__ == "__main__":
    history = train()
    validation = history["validation"][::EVERY]
    best = int(jnp.argmin(validation)) * EVERY
    print(f"validation loss {validation.min():.3f} at step {best}, {validation[-1]:.3f} at the end")
    print(f"scale of the rate: highest {history['scale'].max():.2f}, at the end {history['scale'][-1]:.3f}")
