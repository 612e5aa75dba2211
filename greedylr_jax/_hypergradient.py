"""Hypergradient descent: a learning rate that is learned from successive gradients.

A. G. Baydin, R. Cornish, D. Martinez Rubio, M. Schmidt and F. Wood, "Online Learning Rate Adaptation with
Hypergradient Descent", ICLR 2018; equation 1 of "Zeroth Order GreedyLR", which calls it first-order GreedyLR
and adds one learning rate per parameter group. With g_t the gradient and u_t the update that an optimizer
with learning rate 1 computes from it, the derivative of the loss with respect to the previous learning rate
is <g_t, u_{t-1}>, so

    alpha_t = alpha_{t-1} - beta <g_t, u_{t-1}>,    then    params += alpha_t u_t.

Departures: learning rates stay within bounds (the additive rule alone may make them negative), and a step
whose product is not finite leaves them unchanged.
"""

from collections.abc import Callable, Hashable, Mapping
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from greedylr_jax import _checks, _deprecated, _forwarding, _inner, _numerics, _observe, _rule


class HypergradientState(NamedTuple):
    """State of :func:`hypergradient`."""

    rate: _rule.RateState  # learning rates: a scalar, a scalar per label, or one per parameter element
    previous_update: optax.Updates  # of inner, before the learning rate; zeros before the first step
    inner_state: optax.OptState


@_deprecated.renamed_arguments(
    direction="inner", min_value="min_learning_rate", max_value="max_learning_rate"
)
def hypergradient(
    inner: optax.GradientTransformation,
    learning_rate: ArrayLike | Mapping[str, ArrayLike] | optax.Params,
    hyper_learning_rate: ArrayLike,
    *,
    mode: Literal["additive", "multiplicative"] = "additive",
    granularity: Literal["global", "group", "parameter"] = "global",
    param_labels: Any | Callable[[optax.Params], Any] = None,
    min_learning_rate: ArrayLike = 0.0,
    max_learning_rate: ArrayLike = float("inf"),
    axis_name: Hashable | None = None,
) -> optax.GradientTransformationExtraArgs:
    """An optimizer whose learning rate increases while each gradient agrees with the previous update.

    Args:
      inner: an optimizer built with learning rate 1, such as ``optax.sgd(1.0, momentum=0.9)`` or
        ``optax.adamw(1.0)``.
      learning_rate: initial learning rate, >= 0: a number; one per label (``granularity="group"``); or a
        pytree like the parameters (``granularity="parameter"``). May be traced.
      hyper_learning_rate: beta, >= 0. In additive mode its unit is that of the learning rate divided by that
        of a squared gradient, so a good value depends on the problem; in multiplicative mode it has no unit.
        May be traced.
      mode: ``"additive"``: subtracts beta <gradient, previous update> from the learning rate.
        ``"multiplicative"``: multiplies it by 1 - beta cos(gradient, previous update), which does not depend
        on the scale of the gradients.
      granularity: ``"global"``: one learning rate; ``"group"``: one per label of ``param_labels``;
        ``"parameter"``: one per element, with the elementwise product in place of the inner product (and its
        sign in place of the cosine).
      param_labels: for ``granularity="group"``: a pytree of strings that is like the parameters or a prefix
        of them, or a function from the parameters to such a pytree, as in ``optax.partition``.
      min_learning_rate: lower bound, >= 0; may be traced.
      max_learning_rate: upper bound, >= ``min_learning_rate``; may be traced.
      axis_name: under ``jax.shard_map``, the mesh axis, or axes, along which parameters are sharded: inner
        products are summed over it, so that all devices have the same learning rates. Not needed for
        replicated parameters whose gradients are averaged before this optimizer, and under ``jax.jit`` with
        sharded arrays: there all devices compute the same inner products. If it is given, leaves that are
        replicated are not summed, provided that ``jax.shard_map`` runs with ``check_vma=True`` (its default);
        otherwise all leaves count as sharded.

    Returns:
      A ``GradientTransformationExtraArgs``. Inner products and learning rates are float32 or wider for every
      dtype of parameters. The state holds one copy of the parameters, the previous update.

    Raises:
      ValueError: if a number is out of its range, or ``param_labels`` and ``granularity`` do not match; from
        ``init``, if the updates of ``inner`` point uphill.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from greedylr_jax import get_learning_rate, hypergradient
      >>> tx = hypergradient(optax.adam(1.0), 1e-3, 1e-4)
      >>> params = jnp.ones(3)
      >>> state = tx.init(params)
      >>> for _ in range(3):
      ...     grads = jax.grad(lambda p: jnp.sum(p**2))(params)
      ...     updates, state = tx.update(grads, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> print(f"{get_learning_rate(state):.4f}")  # two gradients agreed with the previous update
      0.0022

      It can be combined with GreedyLR, which the GreedyLR paper names as future work:
      ``optax.chain(hypergradient(...), greedy_lr())``.

    Source: equation 1 of "Zeroth Order GreedyLR"; Baydin et al. (2018), equations 7 and 8.
    """
    beta = _checks.check_real("hyper_learning_rate", hyper_learning_rate, low=0.0, high_open=True)
    low = _checks.check_real("min_learning_rate", min_learning_rate, low=0.0, high_open=True)
    high = _checks.check_real("max_learning_rate", max_learning_rate, low=0.0)
    _checks.check_order("min_learning_rate", low, "max_learning_rate", high)
    _checks.check_choice("mode", mode, ("additive", "multiplicative"))
    _checks.check_choice("granularity", granularity, ("global", "group", "parameter"))
    if (param_labels is not None) != (granularity == "group"):
        raise ValueError(
            f"param_labels must be given if and only if granularity='group', got "
            f"granularity={granularity!r} and param_labels={param_labels!r}."
        )
    wrapped = _forwarding.accept_extra_args(inner)

    def init_fn(params: optax.Params) -> HypergradientState:
        _inner.check_descends("hypergradient", wrapped, params)
        if granularity == "parameter":
            rates = _initial_per_element(learning_rate, params)
        elif granularity == "group":
            rates = _initial_per_group(learning_rate, param_labels, params)
        else:
            rates = _initial_rate("learning_rate", learning_rate)
        return HypergradientState(
            rate=_rule.RateState(rates),
            previous_update=jax.tree.map(
                lambda leaf: jnp.zeros_like(leaf, dtype=jnp.result_type(leaf)), params
            ),
            inner_state=wrapped.init(params),
        )

    def next_rate(rate: jax.Array, agreement: jax.Array) -> jax.Array:
        gain = jnp.asarray(beta, rate.dtype) * agreement
        proposal = rate + gain if mode == "additive" else rate * (1 + gain)
        proposal = jnp.clip(proposal, jnp.asarray(low, rate.dtype), jnp.asarray(high, rate.dtype))
        return jnp.where(jnp.isfinite(agreement), proposal, rate)

    def update_fn(
        updates: optax.Updates,
        state: HypergradientState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, HypergradientState]:
        gradients, structure = jax.tree.flatten(jax.tree.map(jnp.asarray, updates))
        previous = structure.flatten_up_to(state.previous_update)
        rates = state.rate.learning_rate
        if granularity == "parameter":
            old = structure.flatten_up_to(rates)
            per_leaf = [
                next_rate(rate, _elementwise_agreement(gradient, last, rate, mode))
                for gradient, last, rate in zip(gradients, previous, old, strict=True)
            ]
            rates = structure.unflatten(per_leaf)
        else:
            labels = _label_per_leaf(param_labels, updates)
            by_label = rates if granularity == "group" else {_ALL: rates}
            agreements = _agreements(gradients, previous, labels, mode, axis_name)
            # The rate of a label without leaves (an empty tree, everything masked) stays as it is.
            by_label = {
                label: next_rate(rate, agreements[label].astype(rate.dtype)) if label in agreements else rate
                for label, rate in by_label.items()
            }
            rates = by_label if granularity == "group" else by_label[_ALL]
            per_leaf = [by_label[label] for label in labels]
        # The inner products come first, so that XLA need not copy the previous update to overwrite it.
        pairs = [jax.lax.optimization_barrier(pair) for pair in zip(gradients, per_leaf, strict=True)]
        gradients, per_leaf = [gradient for gradient, _ in pairs], [rate for _, rate in pairs]
        updates = structure.unflatten(gradients)
        steps, inner_state = wrapped.update(updates, state.inner_state, params, **extra_args)
        steps = _numerics.computed_once(steps)
        scaled = jax.tree.map(_numerics.scale_leaf, steps, structure.unflatten(per_leaf))
        # The dtype of the state is that of the parameters, which the gradients need not share.
        previous_update = _numerics.like(steps, state.previous_update)
        return scaled, HypergradientState(_rule.RateState(rates), previous_update, inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, cast(Any, update_fn))


_ALL = ""  # the label of every leaf if there is one learning rate


def _initial_rate(name: str, value: Any) -> jax.Array:
    rate = _checks.check_real(name, value, low=0.0, high_open=True)
    return jnp.array(rate, _numerics.default_float_dtype())


def _label_per_leaf(param_labels: Any, params: optax.Params) -> list[str]:
    """The label of each leaf; the same for all without groups."""
    if param_labels is None:
        return [_ALL] * len(jax.tree.leaves(params))
    labels = param_labels if _is_label_tree(param_labels, params) else param_labels(params)
    spread = jax.tree.map(lambda label, part: jax.tree.map(lambda _: label, part), labels, params)
    return jax.tree.leaves(spread)


def _is_label_tree(param_labels: Any, params: optax.Params) -> bool:
    """Whether these are labels, not a function that returns them: either may be a callable pytree."""
    if not callable(param_labels):
        return True
    leaves, structure = jax.tree.flatten(param_labels)
    if not leaves or not all(isinstance(leaf, str) for leaf in leaves):
        return False
    try:
        structure.flatten_up_to(params)
    except ValueError:  # not a prefix of the parameters
        return False
    return True


def _initial_per_group(value: Any, param_labels: Any, params: optax.Params) -> Any:
    # optax.tree.map_params calls init with a placeholder, which has no leaves to label.
    is_placeholder = type(params).__name__ == "_ParamsPlaceholder"
    if not callable(param_labels) or _is_label_tree(param_labels, params):
        labels = set(jax.tree.leaves(param_labels))
    elif not is_placeholder:
        labels = set(_label_per_leaf(param_labels, params))
    elif isinstance(value, Mapping):
        labels = set(value)
    else:
        return _initial_rate("learning_rate", value)  # stands for the rates of all groups
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

    def broadcast(rate: Any, leaf: Any) -> jax.Array:
        # The sum has the sharding of the leaf.
        return jnp.zeros_like(leaf, dtype=dtype) + jnp.broadcast_to(jnp.asarray(rate, dtype), jnp.shape(leaf))

    return jax.tree.map(broadcast, value, params)


def _widen(leaf: jax.Array) -> jax.Array:
    """The leaf as float32 or wider; as complex64 or wider if it is complex."""
    dtype = leaf.dtype
    if jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < jnp.finfo(jnp.float32).bits:
        return leaf.astype(jnp.float32)
    return leaf


def _elementwise_agreement(gradient: jax.Array, previous: jax.Array, rate: jax.Array, mode: str) -> jax.Array:
    """Minus each gradient element times its previous update; in multiplicative mode its sign."""
    if not _numerics.is_inexact(gradient):
        return jnp.zeros_like(rate)
    agreement = -(jnp.conj(_widen(previous)) * _widen(gradient)).real.astype(rate.dtype)
    return agreement if mode == "additive" else jnp.sign(agreement)


def _agreements(
    gradients: list[jax.Array],
    previous: list[jax.Array],
    labels: list[str],
    mode: str,
    axis_name: Hashable | None,
) -> dict[str, jax.Array]:
    """For each label minus the inner product of gradients and previous updates, or minus its cosine."""

    def inner_product(left: list[jax.Array], right: list[jax.Array], label: str) -> jax.Array:
        terms = [
            jnp.sum((jnp.conj(_widen(b)) * _widen(a)).real.astype(_numerics.default_float_dtype()))
            for a, b, name in zip(left, right, labels, strict=True)
            if name == label and _numerics.is_inexact(a)
        ]
        return sum(
            _observe.sum_over_devices(terms, axis_name), jnp.zeros((), _numerics.default_float_dtype())
        )

    result = {}
    for label in dict.fromkeys(labels):
        agreement = -inner_product(gradients, previous, label)
        if mode == "multiplicative":
            norms = jnp.sqrt(inner_product(gradients, gradients, label)) * jnp.sqrt(
                inner_product(previous, previous, label)
            )
            agreement = jnp.where(norms == 0, 0, agreement / jnp.where(norms == 0, 1, norms))
        result[label] = agreement
    return result
