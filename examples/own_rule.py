"""A custom learning-rate rule: an initial state, an update and a scale.

The "bold driver" rule (Battiti, 1989) multiplies the learning rate by 1.05 after each improvement of the loss
and by 0.5 after each deterioration. The twenty lines of `bold_driver` are enough for both adapters, `chain`,
`every`, `has_value`, `axis_name`, metrics and plots.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import greedylr_jax
from greedylr_jax.plotting import plot_history


class BoldDriverState(NamedTuple):
    scale: jax.Array  # shape=(), dtype=float; required in the state of every rule
    last_value: jax.Array  # shape=(), dtype=float; the last finite loss


def bold_driver(up: float = 1.05, down: float = 0.5) -> greedylr_jax.Rule:
    def init(scale):
        return BoldDriverState(scale, jnp.full_like(scale, jnp.inf))

    def update(state, value):
        improved = value <= state.last_value  # False for NaN
        scale = state.scale * jnp.where(improved, up, down).astype(state.scale.dtype)
        return BoldDriverState(scale, jnp.where(jnp.isfinite(value), value, state.last_value))

    return greedylr_jax.Rule(init, update, name="bold_driver")


def main() -> None:
    curvature = jnp.logspace(-2, 0, 20)

    def loss_fn(params):
        return 0.5 * jnp.sum(curvature * params**2)

    adapters = {
        "gradient transformation": greedylr_jax.chain(
            greedylr_jax.scale_by_rule(bold_driver()), optax.sgd(0.01)
        ),
        "schedule": optax.inject_hyperparams(optax.sgd)(greedylr_jax.schedule_by_rule(bold_driver(), 0.01)),
    }
    for name, tx in adapters.items():
        greedylr_jax.assert_controls_learning_rate(tx, jnp.ones(20))

        def step(carry, _, tx=tx):
            params, state = carry
            loss, grads = jax.value_and_grad(loss_fn)(params)
            updates, state = tx.update(grads, state, params, value=loss)
            return (optax.apply_updates(params, updates), state), (loss, greedylr_jax.metrics(state))

        params = jnp.ones(20)
        _, (losses, history) = jax.lax.scan(step, (params, tx.init(params)), None, length=300)
        figure = plot_history(losses, history, base_learning_rate=0.01)
        rates = np.asarray(figure.axes[1].lines[0].get_ydata())
        print(f"{name}: loss {losses[0]:.3f} -> {losses[-1]:.6f}, rate {rates[0]:.4f} to {rates.max():.2f}")


if __name__ == "__main__":
    main()
