"""Helpers for Flax: a train state for Linen, and functions of the parameters for NNX.

``flax.nnx.Optimizer`` needs no helper: ``optimizer.update(model, grads, value=loss)`` passes the loss on,
and the readers of :mod:`greedylr_jax` accept ``optimizer.opt_state``. Where a loop calls it without the
loss, :func:`observe` passes the loss from outside.
"""

from collections.abc import Callable
from typing import Any, Self

import jax
import optax
from flax import nnx
from flax.training import train_state
from jax.typing import ArrayLike

from greedylr_jax import _forwarding, _value_sources


class TrainState(train_state.TrainState):
    """``flax.training.train_state.TrainState`` whose ``apply_gradients`` accepts the loss.

    Flax's own passes only the gradients to the transformation. Everything else is inherited.

    Examples:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, optax
      >>> from greedylr_jax import get_scale, greedy_lr
      >>> from greedylr_jax.flax import TrainState
      >>> model, x = nn.Dense(2), jnp.ones((4, 3))
      >>> state = TrainState.create(
      ...     apply_fn=model.apply,
      ...     params=model.init(jax.random.key(0), x)["params"],
      ...     tx=optax.chain(optax.adamw(1e-3), greedy_lr(factor=0.5, patience=0)),
      ... )
      >>> @jax.jit
      ... def step(state, x):
      ...     def loss_fn(params):
      ...         return jnp.mean(state.apply_fn({"params": params}, x) ** 2)
      ...     loss, grads = jax.value_and_grad(loss_fn)(state.params)
      ...     return state.apply_gradients(grads=grads, value=loss)
      >>> state = step(state, x)
      >>> print(get_scale(state.opt_state), state.step)
      2.0 1
    """

    def apply_gradients(
        self,
        *,
        grads: optax.Updates,
        value: ArrayLike | None = None,
        has_value: ArrayLike | None = None,
        value_fn: Callable[[optax.Params], jax.Array] | None = None,
        **kwargs: Any,
    ) -> Self:
        """Like Flax's, with the arguments of ``tx.update`` that learning-rate rules use.

        Args:
          grads: gradients with the structure of ``params``.
          value: the scalar loss at ``params``.
          has_value: False if this step has no new loss.
          value_fn: the loss as a function of the parameters, for rules that probe.
          **kwargs: other fields of the state to replace.

        Returns:
          The state after the update.
        """
        tx = _forwarding.bind_extra_args(self.tx, value=value, has_value=has_value, value_fn=value_fn)
        bound = self.replace(tx=tx)
        stepped: Any = train_state.TrainState.apply_gradients(bound, grads=grads, **kwargs)
        return stepped.replace(tx=self.tx)


def observe(optimizer: nnx.Optimizer, value: ArrayLike) -> None:
    """Passes a loss to the rules in an NNX optimizer, before its next update, and changes it in place.

    Like :func:`greedylr_jax.observe`, for loops that hold references to the optimizer's variables
    (``nnx.cached_partial``, as in tunix), which do not see a new ``opt_state``.

    Args:
      optimizer: the optimizer, built with :func:`greedylr_jax.value_from_observe`.
      value: the scalar loss.

    Raises:
      ValueError, TypeError: as :func:`greedylr_jax.observe`.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from flax import nnx
      >>> import greedylr_jax.flax
      >>> from greedylr_jax import get_scale, greedy_lr, value_from_observe
      >>> model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
      >>> tx = value_from_observe(optax.chain(optax.sgd(0.1), greedy_lr(factor=0.5, patience=0)))
      >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
      >>> greedylr_jax.flax.observe(optimizer, 1.0)  # in a callback
      >>> _ = optimizer.update(model, nnx.state(model, nnx.Param))
      >>> print(get_scale(optimizer.opt_state))
      2.0
    """
    observed = _value_sources.observe(optimizer.opt_state, value)
    nnx.update(optimizer, nnx.State({"opt_state": nnx.state(observed)}))


def value_fn(
    model: nnx.Module, loss_fn: Callable[..., jax.Array], *args: Any, wrt: Any = nnx.Param
) -> Callable[[Any], jax.Array]:
    """The loss of an NNX model as a function of its parameters, for probing rules and line searches.

    ``nnx.Optimizer`` passes the parameters to a transformation as a pure state; this function merges them
    with the model's other variables. Changes that ``loss_fn`` makes to the model (batch statistics, random
    number streams) are discarded, so every call evaluates the same model.

    Args:
      model: the model; not changed.
      loss_fn: maps a model and ``args`` to a scalar loss, such as the function that is differentiated.
      *args: passed to ``loss_fn`` after the model: a batch, for example.
      wrt: which variables are parameters, as in ``nnx.Optimizer``.

    Returns:
      A function from parameters to the loss.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from flax import nnx
      >>> import greedylr_jax.flax
      >>> model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
      >>> search = optax.scale_by_backtracking_linesearch(max_backtracking_steps=15)
      >>> optimizer = nnx.Optimizer(model, optax.chain(optax.sgd(1.0), search), wrt=nnx.Param)
      >>> def loss_fn(model, x):
      ...     return jnp.mean((model(x) - 1.0) ** 2)
      >>> @nnx.jit
      ... def step(model, optimizer, x):
      ...     loss, grads = nnx.value_and_grad(loss_fn)(model, x)
      ...     value_fn = greedylr_jax.flax.value_fn(model, loss_fn, x)
      ...     optimizer.update(model, grads, value=loss, grad=grads, value_fn=value_fn)
      ...     return loss
      >>> x = jnp.ones((4, 3))
      >>> bool(step(model, optimizer, x) > step(model, optimizer, x))
      True
    """
    graph, params, rest = nnx.split(model, wrt, ...)
    structure = jax.tree.structure(params)

    def loss_of_params(params: Any) -> jax.Array:
        variables = jax.tree.unflatten(structure, jax.tree.leaves(params))
        return loss_fn(nnx.merge(graph, variables, rest, copy=True), *args)

    return loss_of_params
