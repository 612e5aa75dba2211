"""Gradient accumulation that averages the loss together with the gradients."""

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike

from greedylr_jax import _checks, _deprecated, _forwarding, _numerics, _observe, _rule


class MultiStepsState(NamedTuple):
    """State of :func:`multi_steps`: the fields of ``optax.MultiStepsState``, and the losses so far."""

    mini_step: jax.Array  # shape=(), dtype=int32; micro-batches accumulated since the last optimizer step
    gradient_step: jax.Array  # shape=(), dtype=int32; optimizer steps so far
    inner_opt_state: optax.OptState
    acc_grads: optax.Updates  # accumulated gradients
    skip_state: Any  # the state that `should_skip_update_fn` returned
    value_sum: jax.Array  # shape=(), dtype=float; sum of the losses since the last optimizer step
    value_count: jax.Array  # shape=(), dtype=int32; the number of these losses


class MultiSteps(_rule.GradientTransformationExtraLoss):
    """The transformation that :func:`multi_steps` returns, with the methods of ``optax.MultiSteps``."""

    def has_updated(self, state: MultiStepsState) -> jax.Array:
        """Whether the last call of ``update`` made an optimizer step."""
        return (state.mini_step == 0) & (state.gradient_step > 0)

    def gradient_transformation(self) -> "MultiSteps":
        """Returns itself; ``optax.MultiSteps`` needs this conversion."""
        return self


@_deprecated.renamed_arguments(tx="inner")
def multi_steps(
    inner: optax.GradientTransformation,
    every_k_schedule: int | Callable[[jax.Array], ArrayLike],
    use_grad_mean: bool = True,
    should_skip_update_fn: Callable[..., tuple[jax.Array, Any]] | None = None,
    accumulator_dtype: DTypeLike | None = None,
    *,
    axis_name: Hashable | None = None,
) -> MultiSteps:
    """``optax.MultiSteps`` for rules: each optimizer step observes the mean loss of its micro-batches.

    A drop-in for ``optax.MultiSteps``, which works with every rule too, but passes only the loss of the last
    micro-batch on, which is noisier than necessary.

    Args:
      inner: the transformation, with a rule in it.
      every_k_schedule: number of micro-batches of an optimizer step: an integer >= 1, or a function from the
        number of optimizer steps so far to it.
      use_grad_mean: whether gradients are averaged (default) or summed.
      should_skip_update_fn: function of the updates, the number of optimizer steps and the parameters that
        returns whether to ignore a micro-batch, a boolean scalar array, and a pytree that is stored in the
        state; for example ``optax.skip_not_finite``. Default: none is ignored.
      accumulator_dtype: dtype of the accumulated gradients; complex ones use the complex dtype that contains
        it. Default: float32, or the parameters' dtype if that is wider.
      axis_name: mapped axis, or axes, over which losses are averaged, so that all devices make the same
        decision; a micro-batch is ignored on all devices if it is on one.

    Returns:
      A :class:`greedylr_jax.GradientTransformationExtraLoss` whose updates are zero except at each k-th
      micro-batch. It has the method ``has_updated(state)`` of ``optax.MultiSteps``.

    Raises:
      ValueError: if ``every_k_schedule`` is an integer < 1, or ``should_skip_update_fn`` does not return a
        boolean scalar array. Its ``update`` raises ``TypeError`` or ``ValueError`` if ``value`` is missing or
        not a real scalar.

    Examples:
      >>> import jax.numpy as jnp, optax, greedylr_jax
      >>> rule = greedylr_jax.greedy_lr(patience=0, window=None)
      >>> tx = greedylr_jax.multi_steps(optax.chain(optax.sgd(1.0), rule), 2)
      >>> params = jnp.ones(2)
      >>> state = tx.init(params)
      >>> for loss in (1.0, 3.0):
      ...     updates, state = tx.update(jnp.ones(2), state, params, value=loss)
      >>> print(greedylr_jax.metrics(state)["best_value"], tx.has_updated(state))
      2.0 True

    Source: ``optax.MultiSteps``.
    """
    if not callable(every_k_schedule):
        every_k_schedule = _checks.check_static_integer("every_k_schedule", every_k_schedule)
    inner = _forwarding.accept_extra_args(inner)

    def init_fn(params: optax.Params) -> MultiStepsState:
        zeros = jax.tree.map(lambda leaf: jnp.zeros_like(leaf, _accumulator(leaf, accumulator_dtype)), params)
        gradient_step = jnp.zeros((), jnp.int32)
        skip_state = ()
        if should_skip_update_fn is not None:
            gradients = jax.tree.map(jnp.zeros_like, params)
            _, skip_state = should_skip_update_fn(gradients, gradient_step, params)
        return MultiStepsState(
            mini_step=jnp.zeros((), jnp.int32),
            gradient_step=gradient_step,
            inner_opt_state=inner.init(params),
            acc_grads=zeros,
            skip_state=skip_state,
            value_sum=jnp.zeros((), _numerics.default_float_dtype()),
            value_count=jnp.zeros((), jnp.int32),
        )

    def update_fn(
        updates: optax.Updates,
        state: MultiStepsState,
        params: optax.Params | None = None,
        *,
        value: ArrayLike | None = None,
        has_value: ArrayLike | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, MultiStepsState]:
        loss = _observe.read("multi_steps", value, has_value, state.value_sum.dtype, axis_name)
        value_sum, value_count, mean = _observe.accumulate(state.value_sum, state.value_count, loss)
        accumulated = _accumulate(updates, state, use_grad_mean)
        # The inner transformation is evaluated for each micro-batch, and its result used for the last one.
        steps, inner_state = inner.update(
            optax.tree.cast_like(accumulated, updates),
            state.inner_opt_state,
            params,
            value=mean,
            has_value=None if loss.is_present else value_count > 0,
            **extra_args,
        )
        k = every_k_schedule(state.gradient_step) if callable(every_k_schedule) else every_k_schedule
        is_last = state.mini_step >= jnp.asarray(k, jnp.int32) - 1
        new_state = MultiStepsState(
            mini_step=jnp.where(is_last, 0, optax.safe_increment(state.mini_step)),
            gradient_step=jnp.where(is_last, optax.safe_increment(state.gradient_step), state.gradient_step),
            inner_opt_state=_where(is_last, inner_state, state.inner_opt_state),
            acc_grads=jax.tree.map(
                lambda new, old: jnp.where(is_last, 0, new).astype(old.dtype), accumulated, state.acc_grads
            ),
            skip_state=state.skip_state,
            value_sum=jnp.where(is_last, 0, value_sum),
            value_count=jnp.where(is_last, 0, value_count),
        )
        steps = jax.tree.map(lambda step: jnp.where(is_last, step, jnp.zeros_like(step)), steps)
        if should_skip_update_fn is None:
            return steps, new_state
        skip, skip_state = should_skip_update_fn(updates, state.gradient_step, params)
        skip = _observe.any_device(_check_skip(skip), axis_name)
        steps = jax.tree.map(lambda step: jnp.where(skip, jnp.zeros_like(step), step), steps)
        return steps, _where(skip, state, new_state)._replace(skip_state=skip_state)

    return MultiSteps(init_fn, update_fn)


def _accumulator(leaf: Any, dtype: DTypeLike | None) -> Any:
    """The dtype in which the gradients of a parameter are accumulated."""
    own = jnp.result_type(leaf)
    if dtype is None:
        return jnp.promote_types(own, jnp.float32)
    return jnp.promote_types(dtype, jnp.complex64) if jnp.issubdtype(own, jnp.complexfloating) else dtype


def _accumulate(updates: optax.Updates, state: MultiStepsState, use_grad_mean: bool) -> optax.Updates:
    """The accumulated gradients with those of one more micro-batch."""

    def add(gradient: jax.Array, accumulated: jax.Array) -> jax.Array:
        if not use_grad_mean:
            return gradient + accumulated
        return accumulated + (gradient - accumulated) / (state.mini_step + 1)

    return jax.tree.map(add, updates, state.acc_grads)


def _where(condition: jax.Array, on_true: Any, on_false: Any) -> Any:
    """Selects between two states; the first has the dtypes of the second, or is cast to them."""
    return jax.tree.map(
        lambda new, old: jnp.where(condition, new.astype(old.dtype), old),
        jax.tree.map(jnp.asarray, on_true),
        jax.tree.map(jnp.asarray, on_false),
    )


def _check_skip(skip: jax.Array) -> jax.Array:
    if (jnp.result_type(skip), jnp.shape(skip)) != (jnp.bool_, ()):
        raise ValueError(
            "should_skip_update_fn must return a boolean scalar array and a pytree, got dtype "
            f"{jnp.result_type(skip)} and shape {jnp.shape(skip)}."
        )
    return skip
