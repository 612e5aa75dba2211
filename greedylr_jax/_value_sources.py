"""Adapters for training loops that call ``update`` without ``value=loss``.

Each wraps a transformation and gives it the loss as ``value``, from another place:

* :func:`value_from`: another extra argument of ``update``, such as ``loss``;
* :func:`value_from_observe`: :func:`observe`, which a callback calls between two steps;
* :func:`value_from_slot`: the gradient of one extra parameter, for compiled loops that differentiate the
  user's loss function.

Rules need no change: to them the loss is the ``value`` of the step, and a step without one has
``has_value=False``.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from greedylr_jax import _checks, _forwarding, _numerics, _observe, _reading


class ObservedState(NamedTuple):
    """State of :func:`value_from_observe`."""

    value_sum: jax.Array  # shape=(), dtype=float; sum of the losses observed since the last update
    value_count: jax.Array  # shape=(), dtype=int32; the number of these losses
    inner_state: optax.OptState


class LossSlot(NamedTuple):
    """Parameters and one more, whose gradient is the loss; see :func:`value_from_slot`."""

    params: Any  # the parameters of the model
    loss_slot: jax.Array  # shape=(), dtype=float; always zero


def value_from(inner: optax.GradientTransformation, name: str) -> optax.GradientTransformationExtraArgs:
    """Passes the extra argument ``name`` of ``update`` to ``inner`` as ``value``.

    For loops that pass the loss under another name: ``loss=`` in MaxText. If the argument is a function of
    the parameters (``obj_fn=`` in Levanter), it is passed as ``value_fn``, and evaluated at ``params`` for
    ``value``, which takes one more forward pass.

    Args:
      inner: the transformation, with a rule in it.
      name: the argument's name in the loop. ``inner`` gets it under its new name only. A step without it
        that passes ``value`` is unchanged.

    Returns:
      A ``GradientTransformationExtraArgs`` with the state of ``inner``.

    Raises:
      ValueError: if ``name`` is not an identifier, or is ``"value"``. Its ``update`` raises ``TypeError`` if
        neither ``name`` nor ``value`` is passed, or if ``name`` is a function and ``params`` is missing.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from greedylr_jax import get_scale, greedy_lr, value_from
      >>> tx = value_from(optax.chain(optax.sgd(0.1), greedy_lr(factor=0.5, patience=0)), "loss")
      >>> params = jnp.ones(3)
      >>> updates, state = tx.update(params, tx.init(params), params, loss=1.0)
      >>> print(get_scale(state))
      2.0
    """
    if not isinstance(name, str) or not name.isidentifier() or name == "value":
        raise ValueError(
            f"name must be the name of an extra argument of update other than 'value', got {name!r}."
        )
    inner = _forwarding.accept_extra_args(inner)

    def update_fn(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        given = extra_args.pop(name, None)
        if not _checks.is_known_false(extra_args.get("has_value")):
            if callable(given):
                extra_args |= {"value_fn": given, "value": _evaluate(name, given, params)}
            elif given is not None or extra_args.get("value") is None:
                extra_args["value"] = _observe.check_loss("value_from", given, name)
        return inner.update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(inner.init, update_fn)


def _evaluate(name: str, loss_fn: Callable[..., Any], params: optax.Params | None) -> ArrayLike:
    if params is None:
        raise TypeError(
            f"value_from evaluates {name} at the parameters: call "
            f"tx.update(grads, opt_state, params, {name}={name})."
        )
    return loss_fn(params)


def value_from_observe(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Lets a callback pass the loss: ``opt_state = observe(opt_state, loss)`` between two steps.

    For loops that hand no loss to ``update``, but have a hook that sees it (tunix, most hand-written loops).
    Each update passes the mean of the losses that were observed since the previous update to ``inner``;
    without any, rules keep their state. A loss observed after step t acts on step t + 1, one step later than
    one passed as ``value=loss``.

    Wrap the whole optimizer, or the rule alone. Inside ``optax.MultiSteps`` a rule observes the mean loss of
    the micro-batches. Line searches need the loss of the same step: use :func:`value_from_slot` for them.

    Args:
      inner: a transformation with any rule in it, as a transformation or as a schedule. :func:`with_rollback
        <greedylr_jax.with_rollback>` works as well, one step later: it still skips updates that are not
        finite at once, but the step after a loss that is not finite is taken before the snapshot is restored.

    Returns:
      A ``GradientTransformationExtraArgs``, whose state is an :class:`ObservedState`. A ``value`` that is
      passed to its ``update`` counts as observed before that step.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from greedylr_jax import get_scale, greedy_lr, observe, value_from_observe
      >>> tx = value_from_observe(optax.chain(optax.sgd(0.1), greedy_lr(factor=0.5, patience=0)))
      >>> params = jnp.ones(3)
      >>> state = tx.init(params)
      >>> updates, state = tx.update(params, state, params)  # nothing observed
      >>> state = observe(state, 1.0)
      >>> updates, state = tx.update(params, state, params)
      >>> print(updates, get_scale(state))
      [-0.2 -0.2 -0.2] 2.0
    """
    inner = _forwarding.accept_extra_args(inner)

    def init_fn(params: optax.Params) -> ObservedState:
        return ObservedState(
            value_sum=jnp.zeros((), _numerics.default_float_dtype()),
            value_count=jnp.zeros((), jnp.int32),
            inner_state=inner.init(params),
        )

    def update_fn(
        updates: optax.Updates,
        state: ObservedState,
        params: optax.Params | None = None,
        *,
        value: ArrayLike | None = None,
        has_value: ArrayLike | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ObservedState]:
        given = _observe.read(
            "value_from_observe", value, False if value is None else has_value, state.value_sum.dtype
        )
        _, count, mean = _observe.accumulate(state.value_sum, state.value_count, given)
        extra_args |= {"value": mean, "has_value": count > 0}
        updates, inner_state = inner.update(updates, state.inner_state, params, **extra_args)
        return updates, ObservedState(
            jnp.zeros_like(state.value_sum), jnp.zeros_like(state.value_count), inner_state
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)  # type: ignore[arg-type]


def observe(opt_state: optax.OptState, value: ArrayLike) -> optax.OptState:
    """Passes a loss to the rules in an optimizer state, before its next update.

    Args:
      opt_state: any nesting of Optax states that contains that of :func:`value_from_observe`, or the
        ``opt_state`` of ``flax.nnx.Optimizer``.
      value: the loss, a real scalar; for a state with a leading axis, as under ``jax.vmap`` or ``jax.pmap``,
        also one loss for each entry. Several losses before an update are averaged. NaN and infinities count
        as in ``update``.

    Returns:
      A new optimizer state of the same structure, shapes and dtypes; the arrays of the optimizer are shared
      with the old one. Works under ``jax.jit``.

    Raises:
      ValueError: if the state has no :class:`ObservedState`, or ``value`` has another shape.
      TypeError: if ``value`` is not a real number.

    Examples:
      See :func:`value_from_observe`. In a loop that keeps a Flax train state:
      ``state = state.replace(opt_state=observe(state.opt_state, loss))``. A schedule outside of an optimizer
      needs no adapter: ``schedule_state = schedule.update(schedule_state, value=loss)``.
    """

    def is_observed(node: Any) -> bool:
        return isinstance(node, ObservedState)

    def add(node: Any) -> Any:
        if not is_observed(node):
            return node
        return node._replace(
            value_sum=jax.tree.map(lambda total: total + _loss_like(value, total), node.value_sum),
            value_count=jax.tree.map(lambda count: count + 1, node.value_count),
        )

    if not _reading.find(opt_state, is_observed):
        raise ValueError(
            "observe needs an optimizer whose rules wait for it: build it with "
            "greedylr_jax.value_from_observe(tx)."
        )
    return jax.tree.map(add, opt_state, is_leaf=is_observed)


def _loss_like(value: ArrayLike, total: jax.Array) -> jax.Array:
    loss = _observe.check_loss(
        "observe", value, right_call="observe(opt_state, loss)", batch_shape=jnp.shape(total)
    )
    return loss.astype(total.dtype)


def value_from_slot(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Reads the loss from the gradient of one extra parameter, the loss slot.

    For compiled loops that take the user's loss function and parameters, and give access to neither the loss
    nor the optimizer's state. Three changes: ``add_loss_slot(params)``, ``fill_loss_slot(loss_fn)`` and
    ``value_from_slot(tx)``. The slot is zero and stays zero. ``inner`` never sees it: its state, weight
    decay, norms and clipping are those of the parameters alone. The loss is that of the same step, as with
    ``value=loss``.

    Whatever the loop does to gradients does to the loss as well: the mean over devices or micro-batches gives
    the mean loss, and unscaling undoes loss scaling. Gradients must not be clipped by their global norm
    outside of ``inner``, or cast to a narrower dtype.

    Args:
      inner: a transformation with any rule in it.

    Returns:
      A ``GradientTransformationExtraArgs`` with the state of ``inner``, for a :class:`LossSlot` as
      parameters. Make it the outermost transformation.

    Raises:
      TypeError: from ``init`` and ``update``, if the parameters or gradients have no slot.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from greedylr_jax import add_loss_slot, fill_loss_slot, get_scale, greedy_lr, value_from_slot
      >>> def fit(loss_fn, params, tx, steps):  # a loop that hands no loss to tx
      ...     def step(carry, _):
      ...         params, state = carry
      ...         updates, state = tx.update(jax.grad(loss_fn)(params), state, params)
      ...         return (optax.apply_updates(params, updates), state), None
      ...     return jax.lax.scan(step, (params, tx.init(params)), length=steps)[0]
      >>> tx = value_from_slot(optax.chain(optax.sgd(0.1), greedy_lr(factor=0.5, patience=0)))
      >>> loss_fn = fill_loss_slot(lambda params: jnp.sum(params**2))
      >>> (params, loss_slot), state = fit(loss_fn, add_loss_slot(jnp.ones(3)), tx, steps=2)
      >>> print(loss_slot, get_scale(state))
      0.0 4.0
    """
    inner = _forwarding.accept_extra_args(inner)

    def init_fn(params: LossSlot) -> optax.OptState:
        return inner.init(_check_slot(params, "params").params)

    def update_fn(
        updates: LossSlot, state: optax.OptState, params: LossSlot | None = None, **extra_args: Any
    ) -> tuple[LossSlot, optax.OptState]:
        grads, loss = _check_slot(updates, "updates")
        inside = None if params is None else _check_slot(params, "params").params
        extra_args["value"] = loss
        steps, state = inner.update(grads, state, inside, **extra_args)
        return LossSlot(steps, jnp.zeros_like(loss)), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)  # type: ignore[arg-type]


def _check_slot(tree: Any, name: str) -> LossSlot:
    if not isinstance(tree, LossSlot):
        raise TypeError(
            f"value_from_slot: {name} must have a loss slot, got {type(tree).__name__}: start from "
            "params = add_loss_slot(params), and differentiate fill_loss_slot(loss_fn)."
        )
    return tree


def add_loss_slot(params: Any) -> LossSlot:
    """The parameters with a loss slot, a zero whose gradient :func:`fill_loss_slot` makes the loss.

    Args:
      params: any pytree: a dict, an Equinox module.

    Returns:
      A :class:`LossSlot`; after training take its field ``params``. The slot is float32 (float64 under x64).

    Examples:
      See :func:`value_from_slot`.
    """
    return LossSlot(params, jnp.zeros((), _numerics.default_float_dtype()))


def fill_loss_slot(loss_fn: Callable[..., Any]) -> Callable[..., Any]:
    """The same loss function, for parameters with a loss slot, whose gradient is the loss.

    Args:
      loss_fn: a function that returns the scalar loss, or a tuple whose first element is the loss.

    Returns:
      A function in which every argument that is a :class:`LossSlot` is replaced by its field ``params``
      (``equinox.partition`` makes two of them). It returns the same; gradients of the parameters are the
      same, too, and that of the slot is the loss.

    Raises:
      TypeError: when it is called without a slot.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from greedylr_jax import add_loss_slot, fill_loss_slot
      >>> loss_fn = fill_loss_slot(lambda params: jnp.sum(params**2))
      >>> grads = jax.grad(loss_fn)(add_loss_slot(jnp.ones(3)))
      >>> print(grads.params, grads.loss_slot)
      [2. 2. 2.] 3.0
    """

    @functools.wraps(loss_fn)
    def with_slot(*args: Any, **kwargs: Any) -> Any:
        values = [*args, *kwargs.values()]
        slots = [each.loss_slot for each in values if isinstance(each, LossSlot)]
        slots = [slot for slot in slots if slot is not None]
        if not slots:
            raise TypeError(
                "fill_loss_slot: no argument has a loss slot: start from params = add_loss_slot(params)."
            )
        result = loss_fn(*map(_without_slot, args), **{key: _without_slot(kwargs[key]) for key in kwargs})
        if isinstance(result, tuple):
            return (_attach(jnp.asarray(result[0]), slots[0]), *result[1:])
        return _attach(jnp.asarray(result), slots[0])

    return with_slot


def _without_slot(argument: Any) -> Any:
    return argument.params if isinstance(argument, LossSlot) else argument


@jax.custom_jvp
def _attach(loss: jax.Array, slot: jax.Array) -> jax.Array:
    """The loss; its derivative by ``slot`` is the loss. A product with the slot would turn inf into NaN."""
    del slot
    return loss


@_attach.defjvp
def _attach_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (loss, slot), (loss_dot, slot_dot) = primals, tangents
    constant = jax.lax.stop_gradient(loss).astype(slot.dtype)
    return loss, loss_dot + (constant * slot_dot).astype(loss.dtype)
