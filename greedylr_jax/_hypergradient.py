"""Hypergradient descent: a learning rate that learns from successive gradients ("first-order GreedyLR").

A. G. Baydin, R. Cornish, D. Martinez Rubio, M. Schmidt and F. Wood, "Online Learning Rate Adaptation with
Hypergradient Descent", ICLR 2018; equation 1 of "Zeroth Order GreedyLR", which calls it first-order
GreedyLR and adds one rate for each parameter group. With g_t the gradient and d_t the direction that an
optimizer makes of it, the loss after a step falls with the rate of that step by <g_t, d_{t-1}>, so

    alpha_t = alpha_{t-1} + beta <g_t, d_{t-1}>,    then    params -= alpha_t d_t.

Departures: rates stay within bounds (the additive rule alone may go below zero), and a step whose
products are not finite leaves them as they are.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from greedylr_jax import _checks, _inner, _numerics, _rule


class HypergradientState(NamedTuple):
    """State of :func:`hypergradient`."""

    rate: _rule.RateState  # the rates: a scalar, a scalar for each group, or one for each element
    previous: optax.Updates  # the direction of the last step; zeros before the first
    direction_state: optax.OptState


def hypergradient(
    direction: optax.GradientTransformation,
    learning_rate: ArrayLike | Mapping[str, ArrayLike] | optax.Params,
    hyper_learning_rate: ArrayLike,
    *,
    mode: Literal["additive", "multiplicative"] = "additive",
    granularity: Literal["global", "group", "parameter"] = "global",
    param_labels: Any | Callable[[optax.Params], Any] = None,
    min_value: ArrayLike = 0.0,
    max_value: ArrayLike = float("inf"),
) -> optax.GradientTransformationExtraArgs:
    """An optimizer whose learning rate follows the agreement of each gradient with the last step.

    Args:
      direction: a transformation that gives a direction without a rate: ``optax.identity()`` (SGD),
        ``optax.trace(0.9)``, ``optax.scale_by_adam()``; or an optimizer built with rate 1, such as
        ``optax.adam(1.0)``, which is the same. Weight decay that belongs to the gradient goes
        before this optimizer (``optax.chain(optax.add_decayed_weights(w), hypergradient(...))``).
      learning_rate: the initial rate, >= 0: a number; or one for each label (``granularity="group"``); or
        a pytree like the parameters (``granularity="parameter"``).
      hyper_learning_rate: beta, >= 0; may be traced. In additive mode its unit is that of the rate over a
        squared gradient, so it must suit the problem; in multiplicative mode it is a plain number.
      mode: ``"additive"``: the rate gains beta times the product of gradient and last direction.
        ``"multiplicative"``: it is multiplied by 1 + beta times the cosine between them, which knows
        nothing of the gradient's scale.
      granularity: ``"global"``: one rate; ``"group"``: one for each label of ``param_labels``;
        ``"parameter"``: one for each element, with the elementwise product instead of the inner one (and
        its sign instead of the cosine).
      param_labels: for ``granularity="group"``: a pytree of strings that is like the parameters or a
        prefix of them, or a function from the parameters to one, as in ``optax.partition``.
      min_value: lowest rate, >= 0; may be traced.
      max_value: highest rate, >= ``min_value``; may be traced.

    Returns:
      A ``GradientTransformationExtraArgs``. Products and rates are float32 or wider whatever the
      parameters' dtype; its state holds one extra copy of the parameters, the last direction.

    Raises:
      ValueError: if a number is out of its range, or ``param_labels`` does not go with ``granularity``.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from greedylr_jax import get_learning_rate, hypergradient
      >>> tx = hypergradient(optax.scale_by_adam(), 1e-3, 1e-4)
      >>> params = jnp.ones(3)
      >>> state = tx.init(params)
      >>> for _ in range(3):
      ...     grads = jax.grad(lambda p: jnp.sum(p**2))(params)
      ...     updates, state = tx.update(grads, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> print(f"{get_learning_rate(state):.4f}")  # two steps that agreed with the one before
      0.0022

      The hybrid that the GreedyLR paper names as future work is a plain chain:
      ``optax.chain(hypergradient(...), greedy_lr())``.

    Source: equation 1 of "Zeroth Order GreedyLR"; Baydin et al. (2018), equations 7 and 8.
    """
    beta = _checks.check_real("hyper_learning_rate", hyper_learning_rate, low=0.0, high_open=True)
    low = _checks.check_real("min_value", min_value, low=0.0, high_open=True)
    high = _checks.check_real("max_value", max_value, low=0.0)
    _checks.check_order("min_value", low, "max_value", high)
    _checks.check_choice("mode", mode, ("additive", "multiplicative"))
    _checks.check_choice("granularity", granularity, ("global", "group", "parameter"))
    if (param_labels is not None) != (granularity == "group"):
        raise ValueError(
            f"param_labels must be given with granularity='group' and only then, got "
            f"granularity={granularity!r} and param_labels={param_labels!r}."
        )
    direction = _inner.as_direction(direction)

    def labels_of(params: optax.Params) -> list[str]:
        """The label of each leaf; the same for all where there are no groups."""
        if param_labels is None:
            return [_ALL] * len(jax.tree.leaves(params))
        labels = param_labels(params) if callable(param_labels) else param_labels
        spread = jax.tree.map(lambda label, part: jax.tree.map(lambda _: label, part), labels, params)
        return jax.tree.leaves(spread)

    def init_fn(params: optax.Params) -> HypergradientState:
        if granularity == "parameter":
            rates = _initial_per_element(learning_rate, params)
        elif granularity == "group":
            rates = _initial_per_group(learning_rate, set(labels_of(params)))
        else:
            rates = _initial_rate("learning_rate", learning_rate)
        return HypergradientState(
            rate=_rule.RateState(rates),
            previous=optax.tree.zeros_like(params),
            direction_state=direction.init(params),
        )

    def update_fn(
        updates: optax.Updates,
        state: HypergradientState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, HypergradientState]:
        def learn(rate: jax.Array, agreement: jax.Array) -> jax.Array:
            gain = jnp.asarray(beta, rate.dtype) * agreement
            proposal = rate + gain if mode == "additive" else rate * (1 + gain)
            proposal = jnp.clip(proposal, jnp.asarray(low, rate.dtype), jnp.asarray(high, rate.dtype))
            return jnp.where(jnp.isfinite(agreement), proposal, rate)

        gradients, structure = jax.tree.flatten(updates)
        directions = structure.flatten_up_to(state.previous)
        rates = state.rate.learning_rate
        if granularity == "parameter":
            old = structure.flatten_up_to(rates)
            each = [
                learn(rate, _elementwise_agreement(gradient, last, rate, mode))
                for gradient, last, rate in zip(gradients, directions, old, strict=True)
            ]
            rates = structure.unflatten(each)
        else:
            labels = labels_of(updates)
            by_label = rates if granularity == "group" else {_ALL: rates}
            agreements = _agreements(gradients, directions, labels, mode)
            # A label without leaves (an empty tree, everything masked) has nothing to learn from.
            by_label = {
                label: learn(rate, agreements[label].astype(rate.dtype)) if label in agreements else rate
                for label, rate in by_label.items()
            }
            rates = by_label if granularity == "group" else by_label[_ALL]
            each = [by_label[label] for label in labels]
        steps, direction_state = direction.update(updates, state.direction_state, params, **extra_args)
        scaled = jax.tree.map(
            lambda step, rate: _numerics.scale_leaf(step, -rate), steps, structure.unflatten(each)
        )
        return scaled, HypergradientState(_rule.RateState(rates), steps, direction_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


_ALL = ""  # the label of every leaf where there is one rate


def _initial_rate(name: str, value: Any) -> jax.Array:
    rate = _checks.check_real(name, value, low=0.0, high_open=True)
    return jnp.array(rate, _numerics.default_float_dtype())


def _initial_per_group(value: Any, labels: set[str]) -> dict[str, jax.Array]:
    if not isinstance(value, Mapping):
        value = dict.fromkeys(labels, value)
    if set(value) != labels:
        raise ValueError(
            f"learning_rate must hold one rate for each label {sorted(labels)}, got {sorted(value)}."
        )
    return {label: _initial_rate(f"learning_rate[{label!r}]", value[label]) for label in sorted(labels)}


def _initial_per_element(value: Any, params: optax.Params) -> optax.Params:
    dtype = _numerics.default_float_dtype()
    if jax.tree.structure(value) == jax.tree.structure(0):  # one number, or one array
        value = jax.tree.map(lambda _: value, params)
    elif jax.tree.structure(value) != jax.tree.structure(params):
        raise ValueError(
            "learning_rate must be a number or a pytree like the parameters with "
            f"granularity='parameter', got {jax.tree.structure(value)}."
        )
    return jax.tree.map(
        lambda rate, leaf: jnp.array(jnp.broadcast_to(jnp.asarray(rate, dtype), jnp.shape(leaf))),
        value,
        params,
    )


def _widen(leaf: jax.Array) -> jax.Array:
    """The leaf as float32 or wider; as complex64 or wider where it is complex."""
    dtype = leaf.dtype
    if jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < jnp.finfo(jnp.float32).bits:
        return leaf.astype(jnp.float32)
    return leaf


def _has_rate(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.inexact)


def _elementwise_agreement(
    gradient: jax.Array, direction: jax.Array, rate: jax.Array, mode: str
) -> jax.Array:
    """Product of each element with its own last direction, or its sign, the cosine of two numbers."""
    if not _has_rate(gradient):
        return jnp.zeros_like(rate)
    product = (jnp.conj(_widen(direction)) * _widen(gradient)).real.astype(rate.dtype)
    return product if mode == "additive" else jnp.sign(product)


def _agreements(
    gradients: list[jax.Array], directions: list[jax.Array], labels: list[str], mode: str
) -> dict[str, jax.Array]:
    """For each label the inner product of its leaves' gradients and directions, or its cosine."""

    def total(left: list[jax.Array], right: list[jax.Array], label: str) -> jax.Array:
        terms = [
            jnp.sum((jnp.conj(_widen(b)) * _widen(a)).real.astype(_numerics.default_float_dtype()))
            for a, b, name in zip(left, right, labels, strict=True)
            if name == label and _has_rate(a)
        ]
        return sum(terms, start=jnp.zeros((), _numerics.default_float_dtype()))

    result = {}
    for label in dict.fromkeys(labels):
        product = total(gradients, directions, label)
        if mode == "multiplicative":
            norms = jnp.sqrt(total(gradients, gradients, label)) * jnp.sqrt(
                total(directions, directions, label)
            )
            product = jnp.where(norms == 0, 0, product / jnp.where(norms == 0, 1, norms))
        result[label] = product
    return result
