"""Control problems in JAX: a pole on a cart to balance or to swing up, and a pendulum to swing up.

Source: A. G. Barto, R. S. Sutton and C. W. Anderson, "Neuronlike adaptive elements that can solve difficult
learning control problems", 1983; constants of ``CartPole-v1`` and ``Pendulum-v1`` in Gymnasium. The three
actions push to the left, not at all and to the right. Swinging up is rewarded by the height of the pole.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

HORIZON = 100  # steps of an episode


class Environment(NamedTuple):
    """A control problem.

    Attributes:
      reset: from a key to a state.
      step: from a state and an action (int) to the next state, the reward and whether the episode has ended.
      observe: from a state to an observation, shape (observations,).
      observations: size of an observation.
      actions: number of actions.
      normalize: from the sum of an episode's rewards to a return of at most 1.
    """

    reset: Callable[[jax.Array], jax.Array]
    step: Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array, jax.Array]]
    observe: Callable[[jax.Array], jax.Array]
    observations: int
    actions: int
    normalize: Callable[[jax.Array], jax.Array]


def _accelerations(state: jax.Array, force: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of a cart and the angle of its pole."""
    _, _, angle, turning = state
    gravity, pole_mass, total_mass, half_length = 9.8, 0.1, 1.1, 0.5
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    pushed = (force + pole_mass * half_length * turning**2 * sin) / total_mass
    angular = (gravity * sin - cos * pushed) / (half_length * (4 / 3 - pole_mass * cos**2 / total_mass))
    return pushed - pole_mass * half_length * angular * cos / total_mass, angular


def _move_cart(state: jax.Array, action: jax.Array, dt: float) -> jax.Array:
    """A time step of the semi-implicit Euler method, which keeps a swinging pole's energy."""
    acceleration, angular = _accelerations(state, 10 * (action.astype(jnp.float32) - 1))
    speeds = jnp.stack([state[1] + dt * acceleration, state[3] + dt * angular])
    return jnp.stack([state[0] + dt * speeds[0], speeds[0], state[2] + dt * speeds[1], speeds[1]])


def _cart_pole_step(state: jax.Array, action: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    state = _move_cart(state, action, 0.02)
    ended = (jnp.abs(state[0]) > 2.4) | (jnp.abs(state[2]) > 12 * jnp.pi / 180)
    return state, jnp.float32(1), ended


CART_POLE = Environment(
    reset=lambda key: jax.random.uniform(key, (4,), minval=-0.1, maxval=0.1),
    step=_cart_pole_step,
    observe=lambda state: state / jnp.array([2.4, 2.0, 0.2, 2.0]),
    observations=4,
    actions=3,
    normalize=lambda total: total / HORIZON,
)


def _swing_up_step(state: jax.Array, action: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    state = _move_cart(state, action, 0.05)
    return state, (1 + jnp.cos(state[2])) / 2, jnp.abs(state[0]) > 2.4


def _swing_up_observe(state: jax.Array) -> jax.Array:
    position, speed, angle, turning = state
    return jnp.stack([position / 2.4, speed / 4, jnp.cos(angle), jnp.sin(angle), turning / 8])


SWING_UP = Environment(
    reset=lambda key: jax.random.uniform(key, (4,), minval=-0.1, maxval=0.1).at[2].add(jnp.pi),
    step=_swing_up_step,
    observe=_swing_up_observe,
    observations=5,
    actions=3,
    normalize=lambda total: total / HORIZON,
)


def _pendulum_step(state: jax.Array, action: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    angle, speed = state
    torque = 2.0 * (action.astype(jnp.float32) - 1)
    wrapped = (angle + jnp.pi) % (2 * jnp.pi) - jnp.pi
    cost = wrapped**2 + 0.1 * speed**2 + 0.001 * torque**2
    speed = jnp.clip(speed + 0.05 * (15 * jnp.sin(angle) + 3 * torque), -8, 8)
    return jnp.stack([angle + 0.05 * speed, speed]), -cost / 6, jnp.bool_(False)


def _pendulum_reset(key: jax.Array) -> jax.Array:
    return jax.random.uniform(key, (2,), minval=-1, maxval=1) * jnp.array([jnp.pi, 1.0])


PENDULUM = Environment(
    reset=_pendulum_reset,
    step=_pendulum_step,
    observe=lambda state: jnp.stack([jnp.cos(state[0]), jnp.sin(state[0]), state[1] / 8]),
    observations=3,
    actions=3,
    normalize=lambda total: 1 + total / HORIZON,
)
ENVIRONMENTS = {"cart-pole": CART_POLE, "swing-up": SWING_UP, "pendulum": PENDULUM}


class Episodes(NamedTuple):
    """Episodes of several environments, the step as the leading axis; after its end an episode has mask 0."""

    observation: jax.Array  # shape=(HORIZON, episodes, observations)
    action: jax.Array  # shape=(HORIZON, episodes), dtype=int32
    reward: jax.Array  # shape=(HORIZON, episodes); 0 after the end
    mask: jax.Array  # shape=(HORIZON, episodes); 1 until the end, 0 after it


def roll_out(
    environment: Environment, act: Callable[[jax.Array, jax.Array], jax.Array], keys: jax.Array
) -> Episodes:
    """One episode for each key; ``act`` maps a key and observations, shape (episodes, ...), to actions."""

    def step(carry, key):
        states, running = carry
        observations = jax.vmap(environment.observe)(states)
        actions = act(key, observations)
        states, rewards, ended = jax.vmap(environment.step)(states, actions)
        mask = running.astype(jnp.float32)
        return (states, running & ~ended), Episodes(observations, actions, mask * rewards, mask)

    start = (jax.vmap(environment.reset)(keys), jnp.ones(len(keys), bool))
    return jax.lax.scan(step, start, jax.random.split(jax.random.fold_in(keys[0], 1), HORIZON))[1]


def discounted(rewards: jax.Array, discount: float) -> jax.Array:
    """The sum of each step's and all later rewards, discounted; the step is the leading axis."""

    def step(total, reward):
        total = reward + discount * total
        return total, total

    return jax.lax.scan(step, jnp.zeros(rewards.shape[1:]), rewards, reverse=True)[1]
