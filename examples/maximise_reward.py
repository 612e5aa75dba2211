"""GreedyLR on a metric to maximise: the mean reward of a policy gradient (`mode="max"`).

Trains a softmax policy on a bandit with ten arms. The surrogate loss of REINFORCE does not measure progress,
so the rule observes the reward.
"""

import jax
import jax.numpy as jnp
import optax

import greedylr_jax

ARMS = jnp.linspace(0.0, 1.0, 10)  # mean reward of each arm
STEPS, BATCH = 400, 256
tx = optax.chain(
    optax.sgd(0.5),
    greedylr_jax.greedy_lr(factor=0.8, patience=3, window=20, mode="max", max_scale=100.0),
)


@jax.jit
def train(key: jax.Array) -> dict[str, jax.Array]:
    def step(carry, key):
        logits, state = carry
        arm_key, noise_key = jax.random.split(key)
        arms = jax.random.categorical(arm_key, logits, shape=(BATCH,))
        rewards = ARMS[arms] + 0.1 * jax.random.normal(noise_key, (BATCH,))
        reward = rewards.mean()

        def surrogate(logits):
            return -jnp.mean(jax.nn.log_softmax(logits)[arms] * (rewards - reward))

        updates, state = tx.update(jax.grad(surrogate)(logits), state, logits, value=reward)
        history = {"reward": reward, "scale": greedylr_jax.get_scale(state)}
        return (optax.apply_updates(logits, updates), state), history

    logits = jnp.zeros(len(ARMS))
    return jax.lax.scan(step, (logits, tx.init(logits)), jax.random.split(key, STEPS))[1]


if __name__ == "__main__":
    history = train(jax.random.key(0))
    first, last = history["reward"][:20].mean(), history["reward"][-20:].mean()
    print(f"mean reward {first:.2f} -> {last:.2f}, highest scale of the rate {history['scale'].max():.1f}")
