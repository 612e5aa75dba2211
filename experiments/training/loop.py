"""Plain training: batches, one step, and a whole run with any Optax transformation."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from experiments.tasks.base import Batch, Params, Task


def take(examples: Batch, indices: jax.Array) -> Batch:
    """The examples at ``indices``; the shape of ``indices`` replaces the leading axis."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf)[indices], examples)


def batch_indices(task: Task, steps: int, key: jax.Array) -> jax.Array:
    """Indices of the examples of each step: a new permutation every epoch, without its incomplete last batch.

    Returns:
      Shape (steps, batch size).
    """
    per_epoch, size = task.steps_per_epoch, task.batch_size
    keys = jax.random.split(key, -(-steps // per_epoch))
    permuted = jax.vmap(functools.partial(jax.random.permutation, x=task.num_examples))(keys)
    return permuted[:, : per_epoch * size].reshape(-1, size)[:steps]


def train_step(
    task: Task,
    tx: optax.GradientTransformationExtraArgs,
    params: Params,
    state: optax.OptState,
    batch: Batch,
    **extra_args: Any,
) -> tuple[Params, optax.OptState, jax.Array]:
    """One training step.

    Args:
      task: what is trained.
      tx: the optimizer; it is given ``value``, the loss of the batch.
      params: before the step.
      state: of the optimizer.
      batch: of the step.
      extra_args: passed to ``tx.update``.

    Returns:
      The new parameters, the new state, and the loss before the step.
    """
    loss, grads = jax.value_and_grad(task.loss)(params, batch)
    updates, state = tx.update(grads, state, params, value=loss, **extra_args)
    return optax.apply_updates(params, updates), state, loss


def train(
    task: Task,
    tx: optax.GradientTransformation,
    steps: int,
    seed: jax.Array | int,
    *,
    extra_args: Callable[[jax.Array, jax.Array], dict[str, Any]] = lambda step, batches: {},
    read: Callable[[optax.OptState], Any] = lambda state: None,
) -> tuple[Params, jax.Array, Any]:
    """Trains a task with an Optax transformation, with the parameters and batches of an engine's run.

    Args:
      task: what is trained.
      tx: the optimizer with its learning rate.
      steps: number of steps.
      seed: of parameters and batches; may be traced.
      extra_args: of ``tx.update``, from the number of the step and the indices of all batches, shape
        (steps, batch size).
      read: what is recorded of the optimizer's state after each step.

    Returns:
      The trained parameters, the losses before each step, shape (steps,), and the stacked results of
      ``read``.
    """
    init_key, batch_key = jax.random.split(jax.random.key(seed))
    params = task.init(init_key)
    extended = optax.with_extra_args_support(tx)
    batches = batch_indices(task, steps, batch_key)

    def body(carry: Any, step: jax.Array) -> Any:
        batch = take(task.train, batches[step])
        params, state, loss = train_step(task, extended, *carry, batch, **extra_args(step, batches))
        return (params, state), (loss, read(state))

    (params, _), (losses, recorded) = jax.lax.scan(body, (params, extended.init(params)), jnp.arange(steps))
    return params, losses, recorded
