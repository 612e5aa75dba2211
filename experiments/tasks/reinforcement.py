"""Reinforcement learning: REINFORCE with a baseline, proximal policy optimization, deep Q-learning.

Source: R. J. Williams, "Simple statistical gradient-following algorithms for connectionist reinforcement
learning", 1992; J. Schulman et al., "Proximal Policy Optimization Algorithms", 2017; V. Mnih et al.,
"Human-level control through deep reinforcement learning", 2015, with the double estimator of H. van Hasselt,
A. Guez and D. Silver, "Deep Reinforcement Learning with Double Q-learning", 2016.

A training example is a seed. The metric is the return of the greedy policy in held-out episodes, and their
loss is 1 minus that.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.tasks.base import DRAWN, Batch, Collector, Params, Task
from experiments.tasks.control import ENVIRONMENTS, HORIZON, Environment, Episodes, discounted, roll_out
from experiments.tasks.networks import init_mlp, mlp

_HIDDEN, _DISCOUNT, _TRACE = 32, 0.97, 0.9
_SEEDS, _TEST_EPISODES = 2**15, 64
_VALUE_WEIGHT, _ENTROPY_WEIGHT = 0.5, 0.01
_REINFORCE_EPISODES = 16  # a step
_PPO_EPISODES, _PPO_EPOCHS, _PPO_BATCH = 32, 4, 400  # in a collection, over it, examples a step
_CLIP = 0.2  # of PPO's ratio of probabilities
_BUFFER = 8192  # transitions that DQN keeps
_ENVIRONMENTS, _DQN_BATCH = 16, 128  # that DQN acts in, and transitions a step
_EXPLORATION = (1.0, 0.05, 300)  # DQN's share of random actions: first, last, steps between them
_TARGET_RATE = 0.02  # of the moving average that is DQN's target network

Loss = Callable[[Params, Batch], jax.Array]


def _task(name: str, environment: Environment, init, loss: Loss, collector: Collector, seeds: int) -> Task:
    """A task whose network under "action" gives an action by its largest output."""

    def episode_return(params: Params, batch: Batch) -> jax.Array:
        greedy = lambda _, observations: jnp.argmax(mlp(params["action"], observations), axis=-1)  # noqa: E731
        episodes = roll_out(environment, greedy, _keys(batch))
        return environment.normalize(episodes.reward.sum(axis=0)).mean()

    return Task(
        name,
        init=init,
        loss=loss,
        metric=episode_return,
        metric_name="return",
        train={"seed": np.arange(_SEEDS, dtype=np.uint32)},
        test={"seed": np.arange(_SEEDS, _SEEDS + _TEST_EPISODES, dtype=np.uint32)},
        batch_size=seeds,
        measure="return",
        test_loss=lambda params, batch: 1 - episode_return(params, batch),
        collector=collector,
    )


def _keys(batch: Batch) -> jax.Array:
    return jax.vmap(jax.random.key)(batch["seed"])


def _init_actor_critic(environment: Environment) -> Callable[[jax.Array], Params]:
    def init(key: jax.Array) -> Params:
        keys, hidden = jax.random.split(key), (environment.observations, _HIDDEN, _HIDDEN)
        return {
            "action": init_mlp(keys[0], (*hidden, environment.actions)),
            "value": init_mlp(keys[1], (*hidden, 1)),
        }

    return init


def _sample(params: Params) -> Callable[[jax.Array, jax.Array], jax.Array]:
    return lambda key, observations: jax.random.categorical(key, mlp(params["action"], observations))


def _values(params: Params, observations: jax.Array) -> jax.Array:
    """State values, in units of a reward."""
    return mlp(params["value"], observations)[..., 0]


def _log_probability(logits: jax.Array, actions: jax.Array) -> jax.Array:
    return -optax.softmax_cross_entropy_with_integer_labels(logits, actions)


def _entropy(logits: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy(logits, jax.nn.softmax(logits))


def _normalized(advantages: jax.Array, mask: jax.Array) -> jax.Array:
    """Advantages of mean 0 and variance 1 over the steps before the end of their episode."""
    mean = jnp.sum(mask * advantages) / mask.sum()
    variance = jnp.sum(mask * (advantages - mean) ** 2) / mask.sum()
    return (advantages - mean) / jnp.sqrt(variance + 1e-6)


def make_reinforce(name: str, problem: str) -> Task:
    """REINFORCE: sixteen episodes of the current policy a step, a learned baseline, an entropy bonus."""
    environment = ENVIRONMENTS[problem]

    def loss(params: Params, batch: Batch) -> jax.Array:
        episodes = roll_out(environment, _sample(jax.lax.stop_gradient(params)), _keys(batch))
        episodes = jax.lax.stop_gradient(episodes)
        returns = (1 - _DISCOUNT) * discounted(episodes.reward, _DISCOUNT)
        values = _values(params, episodes.observation)
        advantages = _normalized(jax.lax.stop_gradient(returns - values), episodes.mask)
        logits = mlp(params["action"], episodes.observation)
        gain = _log_probability(logits, episodes.action) * advantages + _ENTROPY_WEIGHT * _entropy(logits)
        return _masked_mean(_VALUE_WEIGHT * (values - returns) ** 2 - gain, episodes.mask)

    return _task(name, environment, _init_actor_critic(environment), loss, DRAWN, _REINFORCE_EPISODES)


def _masked_mean(values: jax.Array, mask: jax.Array) -> jax.Array:
    return jnp.sum(mask * values) / mask.sum()


class _PpoState(NamedTuple):
    step: jax.Array  # shape=(), dtype=int32
    examples: Batch  # of the last collection, in the order of use; leading axis: examples times epochs


def _ppo_examples(environment: Environment, params: Params, seed: jax.Array) -> Batch:
    """Steps of the current policy with their advantages (generalized estimates), shuffled for each epoch."""
    keys = jax.random.split(jax.random.key(seed), _PPO_EPISODES + 1)
    episodes = roll_out(environment, _sample(params), keys[1:])
    values = _values(params, episodes.observation)
    # Where the horizon cuts an episode the last value stands for what would follow; after an end that is 0.
    following = jnp.concatenate([values[1:], values[-1:]]) * _follows(episodes)
    errors = (1 - _DISCOUNT) * episodes.reward + _DISCOUNT * following - values
    advantages = discounted(errors * episodes.mask, _DISCOUNT * _TRACE)
    logits = mlp(params["action"], episodes.observation)
    examples = {
        "observation": episodes.observation,
        "action": episodes.action,
        "log_probability": _log_probability(logits, episodes.action),
        "advantage": _normalized(advantages, episodes.mask),
        "return": advantages + values,
        "mask": episodes.mask,
    }
    count = HORIZON * _PPO_EPISODES
    order = jax.vmap(lambda key: jax.random.permutation(key, count))(jax.random.split(keys[0], _PPO_EPOCHS))
    return jax.tree.map(lambda leaf: leaf.reshape(count, *leaf.shape[2:])[order.ravel()], examples)


def _follows(episodes: Episodes) -> jax.Array:
    """1 for steps that another step follows, or that the horizon cuts; 0 for the last before an end."""
    return jnp.concatenate([episodes.mask[1:], jnp.ones_like(episodes.mask[:1])])


def make_ppo(name: str, problem: str) -> Task:
    """PPO: 32 steps on a collection of 32 episodes, four epochs of mini-batches of 400 examples."""
    environment = ENVIRONMENTS[problem]
    steps = _PPO_EPOCHS * HORIZON * _PPO_EPISODES // _PPO_BATCH  # on one collection

    def init_state(key: jax.Array, params: Params) -> _PpoState:
        del key
        return _PpoState(jnp.int32(0), _ppo_examples(environment, params, jnp.uint32(0)))

    def collect(state: _PpoState, params: Params, batch: Batch) -> tuple[_PpoState, Batch]:
        examples = jax.lax.cond(
            state.step % steps == 0,
            lambda params, _: _ppo_examples(environment, params, batch["seed"][0]),
            lambda _, examples: examples,
            params,
            state.examples,
        )
        start = state.step % steps * _PPO_BATCH
        part = jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, start, _PPO_BATCH), examples)
        return _PpoState(state.step + 1, examples), part

    def loss(params: Params, batch: Batch) -> jax.Array:
        logits = mlp(params["action"], batch["observation"])
        ratio = jnp.exp(_log_probability(logits, batch["action"]) - batch["log_probability"])
        clipped = jnp.clip(ratio, 1 - _CLIP, 1 + _CLIP)
        gain = jnp.minimum(ratio * batch["advantage"], clipped * batch["advantage"])
        error = (_values(params, batch["observation"]) - batch["return"]) ** 2
        return _masked_mean(_VALUE_WEIGHT * error - gain - _ENTROPY_WEIGHT * _entropy(logits), batch["mask"])

    return _task(
        name, environment, _init_actor_critic(environment), loss, Collector(init_state, collect), seeds=1
    )


class _DqnState(NamedTuple):
    step: jax.Array  # shape=(), dtype=int32
    environments: jax.Array  # shape=(_ENVIRONMENTS, ...)
    age: jax.Array  # shape=(_ENVIRONMENTS,), dtype=int32; steps of the current episodes so far
    buffer: Batch  # leading axis: _BUFFER
    target: Params  # moving average of the parameters


def make_dqn(name: str, problem: str) -> Task:
    """Double Q-learning: a step in each of 16 environments, then a batch of 128 from the replay buffer."""
    environment = ENVIRONMENTS[problem]

    def init(key: jax.Array) -> Params:
        return {
            "action": init_mlp(key, (environment.observations, 2 * _HIDDEN, 2 * _HIDDEN, environment.actions))
        }

    def init_state(key: jax.Array, params: Params) -> _DqnState:
        states = jax.vmap(environment.reset)(jax.random.split(key, _ENVIRONMENTS))
        observation = jnp.zeros((_BUFFER, environment.observations))
        scalars = {"reward": jnp.zeros(_BUFFER), "continues": jnp.zeros(_BUFFER)}
        buffer = scalars | {
            "observation": observation,
            "next_observation": observation,
            "action": jnp.zeros(_BUFFER, jnp.int32),
        }
        return _DqnState(jnp.int32(0), states, jnp.zeros(_ENVIRONMENTS, jnp.int32), buffer, params)

    def act(params: Params, step: jax.Array, observations: jax.Array, key: jax.Array) -> jax.Array:
        first, last, steps = _EXPLORATION
        random_share = jnp.maximum(last, first + (last - first) * step / steps)
        keys = jax.random.split(key)
        random = jax.random.randint(keys[0], (_ENVIRONMENTS,), 0, environment.actions)
        greedy = jnp.argmax(mlp(params["action"], observations), axis=-1)
        return jnp.where(jax.random.uniform(keys[1], (_ENVIRONMENTS,)) < random_share, random, greedy)

    def collect(state: _DqnState, params: Params, batch: Batch) -> tuple[_DqnState, Batch]:
        act_key, reset_key, sample_key = jax.random.split(jax.random.key(batch["seed"][0]), 3)
        observations = jax.vmap(environment.observe)(state.environments)
        actions = act(params, state.step, observations, act_key)
        states, rewards, ended = jax.vmap(environment.step)(state.environments, actions)
        seen = {
            "observation": observations,
            "next_observation": jax.vmap(environment.observe)(states),
            "action": actions,
            "reward": (1 - _DISCOUNT) * rewards,
            "continues": 1.0 - ended,
        }
        start = state.step * _ENVIRONMENTS % _BUFFER
        buffer = jax.tree.map(
            lambda kept, new: jax.lax.dynamic_update_slice_in_dim(kept, new, start, axis=0),
            state.buffer,
            seen,
        )
        over = ended | (state.age + 1 >= HORIZON)
        fresh = jax.vmap(environment.reset)(jax.random.split(reset_key, _ENVIRONMENTS))
        target = optax.incremental_update(params, state.target, _TARGET_RATE)
        filled = jnp.minimum((state.step + 1) * _ENVIRONMENTS, _BUFFER)
        rows = jax.random.randint(sample_key, (_DQN_BATCH,), 0, filled)
        sampled = jax.tree.map(lambda leaf: leaf[rows], buffer)
        sampled["target"] = _double_q(params, target, sampled)
        state = _DqnState(
            state.step + 1,
            jnp.where(over[:, None], fresh, states),
            jnp.where(over, 0, state.age + 1),
            buffer,
            target,
        )
        return state, sampled

    def loss(params: Params, batch: Batch) -> jax.Array:
        chosen = _chosen(mlp(params["action"], batch["observation"]), batch["action"])
        return jnp.mean(optax.losses.huber_loss(chosen, batch["target"]))

    return _task(name, environment, init, loss, Collector(init_state, collect), seeds=1)


def _chosen(values: jax.Array, actions: jax.Array) -> jax.Array:
    return jnp.take_along_axis(values, actions[:, None], axis=-1)[:, 0]


def _double_q(params: Params, target: Params, batch: Batch) -> jax.Array:
    """The target network's value of the action that the current one prefers, discounted, and the reward."""
    preferred = jnp.argmax(mlp(params["action"], batch["next_observation"]), axis=-1)
    following = _chosen(mlp(target["action"], batch["next_observation"]), preferred)
    return batch["reward"] + _DISCOUNT * batch["continues"] * following
