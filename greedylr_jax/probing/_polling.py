"""Factor polling: the next learning rate is a weighted mean of candidates, by the loss after a step at each.

Y. Kim and Y. Yu, "Automated learning rate scheduling with in-training information", Algorithm 1. For each
factor f the loss after the step at learning rate f eta is evaluated on one batch; the losses are normalized
and scored, and the learning rate is multiplied by the geometric mean of the factors, weighted by the scores.

The paper copies the model and computes a gradient for each factor. The gradient does not depend on the
factor, so that it is computed once here, by the caller, and the candidates are evaluated sequentially, with
one extra copy of the parameters.

Departure: a candidate has *diverged* if its loss is not finite or 10% above that of the untrained model; its
score is 0 and it is left out of the normalization. If the step at the current learning rate has diverged, the
update is zero. If any candidate has diverged, the next step polls again, so that a period of several steps
starts only with a learning rate that is well below the divergence rate; and a period ends if the loss of a
step has diverged. If all candidates have diverged, the minimum factor is used. Without this a learning rate
that is 200 times too high destroys the model in its first steps, as the paper reports.

The paper names neither its normalization nor its score. The defaults were chosen by an ablation
(``python -m experiments study polling-ablation``).
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from greedylr_jax import _checks, _numerics, _observe, _rule
from greedylr_jax.probing import _probe


class FactorPollingState(NamedTuple):
    """State of :func:`factor_polling`, inside ``RuleState``, which counts the steps."""

    scale: jax.Array  # shape=(), dtype=float
    first_value: jax.Array  # shape=(), dtype=float; the first finite loss, infinite before it


def factor_polling(
    factors: Sequence[float] | ArrayLike = (4.0, 2.0, 1.0, 0.5, 0.25),
    *,
    every: ArrayLike = 1,
    sharpness: ArrayLike = 1.0,
    normalize: Literal["minmax", "standard", "none"] = "minmax",
    score: Literal["exponential", "inverse", "linear"] = "exponential",
    min_scale: ArrayLike = 1e-6,
    max_scale: ArrayLike = 1e6,
    divergence: ArrayLike = 1.1,
    decline: bool = True,
    matmul_precision: Literal["default", "high", "highest"] | None = "highest",
    axis_name: Hashable | None = None,
) -> _rule.GradientTransformationExtraLoss:
    """Scales the updates by a factor that is chosen by the loss after the step at several learning rates.

    Put it after the optimizer, as in ``optax.chain(optax.sgd(0.1), factor_polling())``, or anywhere in
    :func:`greedylr_jax.chain`, and call
    ``tx.update(grads, state, params, value=loss, value_fn=lambda p: loss_fn(p, batch))``.

    Args:
      factors: candidates by which the scale may change, one or more numbers > 0. Their number is static;
        their values may be traced. A poll costs one forward pass per factor.
      every: length of a period in steps, an integer >= 1. The first step of each period polls; if a candidate
        has diverged, the next step polls again before the period starts. A period ends early if ``value``
        exceeds the threshold of ``divergence`` or is not finite. The paper polls once per epoch. May be
        traced.
      sharpness: >= 0: how strongly the score falls with x, the normalized loss above that of the best
        candidate. With 0 all candidates have the same weight; with a large value the best one decides alone.
        May be traced.
      normalize: ``"minmax"``: maps the losses to [0, 1]; ``"standard"``: to mean 0 and standard deviation 1;
        ``"none"``: leaves them unchanged.
      score: ``"exponential"``: exp(-sharpness * x); ``"inverse"``: 1 / (1 + sharpness * x); ``"linear"``:
        max(0, 1 - sharpness * x).
      min_scale: lower bound of the scale, > 0; may be traced.
      max_scale: upper bound of the scale, >= ``min_scale``; may be traced.
      divergence: >= 1: a candidate has diverged if its loss exceeds this multiple of the first ``value`` (or
        of the current one, if that is higher); infinity disables the test. Ignored if ``value`` is not given.
        May be traced.
      decline: whether the update is zero if the candidate closest to the current learning rate has diverged.
        If False, such a step uses the weighted mean of the others.
      matmul_precision: precision of the matrix products in ``value_fn``, as in
        ``jax.default_matmul_precision``: ``"highest"`` (float32), ``"high"``, ``"default"``, or None for that
        of the caller. Candidates are compared by differences of losses, which are small at low rates: with
        the bfloat16 products that are a TPU's default, the factor was random at rates of 1e-4 and below, with
        a GPU's TensorFloat32 at 1e-5 (SGD, perceptron on digits). On a TPU a product in float32 costs six in
        bfloat16: choose None to poll at every step at higher rates. Products with a precision of their own
        are not affected.
      axis_name: mapped axis, or axes, over which losses are averaged, so that all devices take the same
        decision.

    Returns:
      A :class:`greedylr_jax.GradientTransformationExtraLoss`, whose state is a
      :class:`greedylr_jax.RuleState`; ``update`` requires ``params`` and ``value_fn``, the loss on one batch
      (in the paper, that of the gradient), and uses ``value`` if it is given. Apply it to the full parameter
      tree, not inside ``optax.masked`` or ``optax.partition``.

    Raises:
      ValueError: if an argument is out of its range. ``update`` raises ``TypeError`` or ``ValueError`` if
        ``params`` or ``value_fn`` is missing or ``value`` is not a real scalar.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from greedylr_jax import factor_polling, get_scale
      >>> loss_fn = lambda params: jnp.sum(params**2)
      >>> tx = optax.chain(optax.sgd(0.25), factor_polling(sharpness=100.0, divergence=2.0))
      >>> params = jnp.ones(3)
      >>> state = tx.init(params)
      >>> loss, grads = jax.value_and_grad(loss_fn)(params)
      >>> updates, state = tx.update(grads, state, params, value=loss, value_fn=loss_fn)
      >>> print(f"{get_scale(state):.3f}", updates)  # a learning rate of 0.5 reaches the minimum in one step
      2.000 [-1. -1. -1.]

    Source: "Automated learning rate scheduling with in-training information", Algorithm 1.
    """
    factors = _check_factors(factors)
    every = _checks.check_integer("every", every, low=1)
    sharpness = _checks.check_real("sharpness", sharpness, low=0.0, high_open=True)
    low = _checks.check_real("min_scale", min_scale, low=0.0, low_open=True, high_open=True)
    high = _checks.check_real("max_scale", max_scale, low=0.0, low_open=True)
    _checks.check_order("min_scale", low, "max_scale", high)
    divergence = _checks.check_real("divergence", divergence, low=1.0)
    _checks.check_choice("normalize", normalize, tuple(_NORMALIZE))
    _checks.check_choice("score", score, tuple(_SCORES))
    precision = _checks.check_precision(matmul_precision)

    def init_fn(params: optax.Params) -> _rule.RuleState:
        del params
        dtype = _numerics.default_float_dtype()
        first = FactorPollingState(scale=jnp.ones((), dtype), first_value=jnp.full((), jnp.inf, dtype))
        return _rule.RuleState(first, jnp.zeros((), dtype), jnp.zeros((), jnp.int32))

    def poll(
        state: FactorPollingState,
        loss: jax.Array,
        updates: optax.Updates,
        params: optax.Params,
        value_fn: _probe.ValueFn,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The next scale; whether the step at the current scale has diverged; whether any candidate has."""
        candidates = jnp.asarray(factors, state.scale.dtype)
        losses = _probe.losses_along(value_fn, params, updates, candidates * state.scale, axis_name=axis_name)
        reference = jnp.maximum(state.first_value, loss)  # infinite if no loss was given
        valid = jnp.isfinite(losses) & ~(losses > _threshold(reference, divergence))
        weights = _scores(
            losses, valid, jnp.asarray(sharpness, losses.dtype), _NORMALIZE[normalize], _SCORES[score]
        )
        logarithms = jnp.log(candidates)
        mean = jnp.sum(weights * logarithms) / jnp.maximum(jnp.sum(weights), jnp.finfo(losses.dtype).tiny)
        factor = jnp.where(jnp.any(valid), jnp.exp(mean), jnp.min(candidates))
        scale = jnp.clip(
            state.scale * factor, jnp.asarray(low, losses.dtype), jnp.asarray(high, losses.dtype)
        )
        return scale, ~valid[jnp.argmin(jnp.abs(logarithms))], ~jnp.all(valid)

    def update_fn(
        updates: optax.Updates,
        state: _rule.RuleState,
        params: optax.Params | None = None,
        *,
        value: ArrayLike | None = None,
        value_fn: _probe.ValueFn | None = None,
        has_value: ArrayLike | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, _rule.RuleState]:
        del extra_args
        if _checks.is_known_false(has_value):
            return _numerics.scale_updates(updates, state.rule.scale), state
        loss_fn = _probe.check_value_fn("factor_polling", value_fn, params)
        loss_fn = _numerics.at_precision(loss_fn, precision)
        assert params is not None
        rule = state.rule
        loss = jnp.full((), jnp.inf, rule.scale.dtype)
        if value is not None:
            loss = _observe.average(
                _observe.check_loss("factor_polling", value).astype(loss.dtype), axis_name
            )
            fresh = jnp.isinf(rule.first_value) & jnp.isfinite(loss)
            rule = rule._replace(first_value=jnp.where(fresh, loss, rule.first_value))
        # Without a loss, or before the first finite one, the threshold is infinite.
        is_above = value is not None and ~(loss <= _threshold(rule.first_value, divergence))
        loss = jnp.where(jnp.isfinite(loss), loss, rule.first_value)
        observed = jnp.asarray(True if has_value is None else has_value, bool)
        no = jnp.asarray(False)
        scale, current_diverged, any_diverged = jax.lax.cond(
            observed & ((state.value_count == 0) | is_above),
            lambda: poll(rule, loss, updates, params, loss_fn),
            lambda: (rule.scale, no, no),
        )
        declined = current_diverged & decline
        count = jnp.where(any_diverged, 0, (state.value_count + 1) % jnp.asarray(every, jnp.int32))
        advanced = _rule.RuleState(rule._replace(scale=scale), state.value_sum, count)
        scaled = jax.tree.map(
            lambda update: jnp.where(declined, jnp.zeros_like(update), update),
            _numerics.scale_updates(updates, scale),
        )
        return scaled, _numerics.select(observed, advanced, state)

    return _rule.ScaleByRule(init_fn, update_fn)


def _threshold(reference: jax.Array, divergence: ArrayLike) -> jax.Array:
    """The loss above which a candidate has diverged; relative also where the reference is negative."""
    return reference + (jnp.asarray(divergence, reference.dtype) - 1) * jnp.abs(reference)


def _check_factors(factors: Any) -> Any:
    """The factors as a list of numbers, each of which may be traced, or as a traced array."""
    if isinstance(factors, (jax.Array, np.ndarray)) and factors.ndim == 1 and len(factors):
        numbers = factors if _checks.is_traced(factors) else list(np.asarray(factors))
    elif isinstance(factors, (list, tuple)) and factors:
        numbers = list(factors)
    else:
        raise ValueError(f"factors must be one or more numbers in (0, inf), got {factors!r}.")
    if isinstance(numbers, list):
        return [
            _checks.check_real("factors", each, low=0.0, low_open=True, high_open=True) for each in numbers
        ]
    return numbers


def _minmax(losses: jax.Array, valid: jax.Array) -> jax.Array:
    minimum = jnp.min(losses, where=valid, initial=jnp.inf)
    spread = jnp.max(losses, where=valid, initial=-jnp.inf) - minimum
    return (losses - minimum) / jnp.where(spread > 0, spread, 1)


def _standard(losses: jax.Array, valid: jax.Array) -> jax.Array:
    spread = jnp.std(losses, where=valid)
    return (losses - jnp.mean(losses, where=valid)) / jnp.where(spread > 0, spread, 1)


_NORMALIZE: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "minmax": _minmax,
    "standard": _standard,
    "none": lambda losses, valid: losses,
}


# From x >= 0 times the sharpness to a score of at most 1.
_SCORES: dict[str, Callable[[jax.Array], jax.Array]] = {
    "exponential": lambda x: jnp.exp(-x),
    "inverse": lambda x: 1 / (1 + x),
    "linear": lambda x: jnp.maximum(0, 1 - x),
}


def _scores(
    losses: jax.Array,
    valid: jax.Array,
    sharpness: jax.Array,
    normalize: Callable[[jax.Array, jax.Array], jax.Array],
    score: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """The score of each candidate: 1 for the best one, 0 for those that have diverged."""
    normalized = normalize(jnp.where(valid, losses, 0), valid)
    above_best = normalized - jnp.min(normalized, where=valid, initial=jnp.inf)
    return jnp.where(valid, score(sharpness * jnp.where(valid, above_best, 0)), 0)
