"""The way back to parameters that a training has left, and when to take it.

A gradient transformation cannot set parameters, only add to them: it leads back by an update that is the
difference. Where one addition does not reach the old parameters to the last bit, further steps do. LRTuner
and :func:`greedylr_jax.auto_lr` have their own reasons to go back, and share the means;
:func:`greedylr_jax.with_rollback` is for any other transformation and rule.
"""

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from greedylr_jax import _checks, _numerics, _observe, _rule
from greedylr_jax._window import LONGEST, Window, empty_window, observe, rise_limit, variance

SETTLING_STEPS = 4  # more than rounding can take to lead back to parameters
BAD_LOSSES = 20  # in a row, above the limit, that a training does not recover from


def difference(there: optax.Params, here: optax.Params) -> optax.Updates:
    """The update that leads from ``here`` to ``there``, up to rounding."""
    return jax.tree.map(lambda a, b: (a - b).astype(b.dtype), there, here)


def are_equal(left: optax.Params, right: optax.Params) -> jax.Array:
    """Whether two trees are equal, to the last bit."""
    pairs = zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    return jnp.all(jnp.array([jnp.all(a == b) for a, b in pairs]))


def where_finite(condition: jax.Array, updates: optax.Updates, params: optax.Params) -> optax.Updates:
    """Leaves out the elements of an update that would make a parameter infinite or NaN.

    From there no update leads back: NaN plus anything is NaN.
    """

    def check(update: jax.Array, param: jax.Array) -> jax.Array:
        if not jnp.issubdtype(update.dtype, jnp.inexact):
            return update
        return jnp.where(condition & ~jnp.isfinite(param + update), jnp.zeros_like(update), update)

    return jax.tree.map(check, updates, params)


def check_params(name: str, params: optax.Params | None) -> None:
    """Raises an error that shows the right call, if there are no parameters to go back from."""
    if params is None:
        raise TypeError(
            f"{name} needs the parameters, to go back to them: call "
            "tx.update(grads, state, params, value=loss)."
        )


class Kept(NamedTuple):
    """What a training can go back to."""

    params: optax.Params
    inner_state: Any  # None where it is a fresh one


def exchange(
    steps: optax.Updates,
    inner_state: optax.OptState,
    kept: Kept,
    *,
    params: optax.Params,
    old_inner_state: optax.OptState,
    needed: jax.Array,
    goes_back: jax.Array,
    settles: jax.Array,
    takes: jax.Array,
    init: Callable[[optax.Params], optax.OptState] | None = None,
) -> tuple[optax.Updates, optax.OptState, Kept, jax.Array]:
    """Goes back to what is kept, or keeps something new, or does nothing.

    Args:
      steps: the updates of this step.
      inner_state: the optimizer's state after this step.
      kept: what to go back to.
      params: the parameters before this step.
      old_inner_state: the optimizer's state before this step, which belongs to ``params``.
      needed: whether there is anything to do; False where the next three are.
      goes_back: whether the way is back.
      settles: whether the way was back in the step before; it goes on until the parameters are equal.
      takes: whether ``params`` are to be kept, where the way is not back.
      init: makes the state to go on with from the kept parameters, where none is kept.

    Returns:
      Updates, optimizer's state, what is kept now, and whether this step is one of the way back.
    """

    def turn(_: jax.Array, carry: Any) -> Any:
        steps, inner_state, kept, _ = carry
        returns = goes_back | (settles & ~are_equal(params, kept.params))
        fresh = kept.inner_state if init is None else init(kept.params)
        guarded = where_finite(jnp.asarray(True), steps, params)
        back = (difference(kept.params, params), fresh)
        steps, inner_state = _numerics.select(returns, back, (guarded, inner_state))
        new = Kept(params, old_inner_state if init is None else None)
        return steps, inner_state, _numerics.select(takes & ~returns, new, kept), returns

    # A loop of one turn or none works in place. A lax.cond would copy what it hands through, which are
    # arrays of the parameters' size; so would any other use of the snapshot's arrays.
    carry = (steps, inner_state, kept, jnp.asarray(False))
    return jax.lax.fori_loop(0, needed.astype(jnp.int32), turn, carry)


class Watch(NamedTuple):
    """The losses where a snapshot was taken, and those since."""

    level: jax.Array  # shape=(), dtype=float; their mean, infinite if not known
    limit: jax.Array  # shape=(), dtype=float; a training that goes on as it did falls below this now and then
    num_bad: jax.Array  # shape=(), dtype=int32; losses in a row above the limit
    has_recovered: jax.Array  # shape=(), dtype=bool; whether one was not, since the last return


def unwatched() -> Watch:
    """Nothing is known, and no loss but those that are not finite is bad."""
    infinity = jnp.full((), jnp.inf, _numerics.default_float_dtype())
    return Watch(infinity, jnp.array(infinity), jnp.zeros((), jnp.int32), jnp.ones((), bool))


def watch(
    state: Watch, loss: jax.Array, is_hopeless: ArrayLike = False, patience: ArrayLike = BAD_LOSSES
) -> tuple[Watch, jax.Array]:
    """The state after one more loss, and whether the way is back to the snapshot now.

    That is after ``patience`` losses in a row that are bad, or at once where this one ``is_hopeless``.

    A return after which no loss is good has shown that the parameters are not at fault: the losses have
    changed for another reason, and what they were is forgotten.
    """
    is_bad = ~(loss <= state.limit) | is_hopeless
    num_bad = jnp.where(is_bad, state.num_bad + 1, 0)
    is_lost = (num_bad >= jnp.asarray(patience, jnp.int32)) | is_hopeless
    returns, forgets = is_lost & state.has_recovered, is_lost & ~state.has_recovered
    return Watch(
        level=jnp.where(forgets, jnp.inf, state.level),
        limit=jnp.where(forgets, jnp.inf, state.limit),
        num_bad=jnp.where(is_lost, 0, num_bad),
        has_recovered=(state.has_recovered | ~is_bad) & ~returns,
    ), returns


def improves(state: Watch, mean: jax.Array) -> jax.Array:
    """Whether a window's mean loss is the least so far, so that its parameters are worth keeping."""
    return mean < state.level


def watch_from(mean: jax.Array, variance: jax.Array) -> Watch:
    """The state where a snapshot is taken; ``variance`` is that of single losses."""
    return unwatched()._replace(level=mean, limit=rise_limit(mean, variance))


class RollbackState(NamedTuple):
    """State of :func:`with_rollback`."""

    watch: Watch
    window: Window  # the losses since the last snapshot could be taken
    kept: Kept  # the parameters and the inner state to go back to
    settles: jax.Array  # shape=(), dtype=int32; further steps that the way back may take
    num_rollbacks: jax.Array  # shape=(), dtype=int32
    inner_state: optax.OptState


def with_rollback(
    inner: optax.GradientTransformation,
    *,
    window: ArrayLike = 20,
    patience: ArrayLike = BAD_LOSSES,
    cut_factor: ArrayLike = 0.5,
    axis_name: Hashable | None = None,
) -> _rule.GradientTransformationExtraLoss:
    """Wraps an optimizer so that a training which is lost goes back to where it was best, at a lower rate.

    The mean of each ``window`` losses that is the least so far makes a snapshot of the parameters and of the
    optimizer's state. The training is lost, and goes back to it,

    * when a loss is not finite;
    * when ``patience`` losses in a row are significantly above those that made the snapshot;
    * when the gradient is zero in every element at a loss above their mean: nothing can be learnt there.

    The scale or rate of every rule inside is then what it was lately, or at the snapshot if that was less,
    times ``cut_factor``, whatever the rule's own least one. A return after which no loss is good has shown
    that the parameters are not at fault (the data have changed, say), and forgets what losses were.

    Args:
      inner: any transformation, with rules of this library in it or without (there is no rate to cut then).
      window: losses between two moments at which a snapshot may be taken, an integer in [2, 2**24]. This and
        all numbers may be traced.
      patience: bad losses in a row that a training does not recover from, an integer >= 1.
      cut_factor: what a return multiplies the rates by, in (0, 1]; 1 leaves them alone.
      axis_name: the mapped axis, or axes, over which losses are averaged first.

    Returns:
      A :class:`greedylr_jax.GradientTransformationExtraLoss`; ``update`` needs ``params`` and ``value``. Its
      state has one copy of the parameters and of the inner state. Put it outermost: what changes updates
      behind it leads the way back astray. Parameters must all be seen, as with :func:`greedylr_jax.auto_lr`.

    Raises:
      ValueError: if a number is out of its range. Its ``update`` raises ``TypeError`` or ``ValueError`` if
        ``params`` or ``value`` is missing, or the value is not a real scalar.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from greedylr_jax import chain, get_scale, greedy_lr, with_rollback
      >>> tx = with_rollback(chain(optax.sgd(0.1), greedy_lr()), window=2)
      >>> params = jnp.ones(2)
      >>> state = tx.init(params)
      >>> for loss in (1.0, 0.9, 0.8, 0.7, jnp.nan):
      ...     updates, state = tx.update(params, state, params, value=loss)
      ...     params = optax.apply_updates(params, updates)
      >>> print(params, get_scale(state))  # those of the fourth loss, after three steps
      [0.729 0.729] 0.5

    Source: this project; after the rollback of LRTuner (:func:`greedylr_jax.lr_tuner`).
    """
    window = _checks.check_integer("window", window, low=2, high=LONGEST)
    patience = _checks.check_integer("patience", patience, low=1)
    cut_factor = _checks.check_real("cut_factor", cut_factor, low=0.0, high=1.0, low_open=True)
    inner = optax.with_extra_args_support(inner)

    def init_fn(params: optax.Params) -> RollbackState:
        inner_state = inner.init(params)
        return RollbackState(
            watch=unwatched(),
            window=empty_window(),
            # Copies: the same array twice in a state could not be donated.
            kept=Kept(*jax.tree.map(jnp.array, (params, inner_state))),
            settles=jnp.zeros((), jnp.int32),
            num_rollbacks=jnp.zeros((), jnp.int32),
            inner_state=inner_state,
        )

    def update_fn(
        updates: optax.Updates,
        state: RollbackState,
        params: optax.Params | None = None,
        *,
        value: ArrayLike | None = None,
        has_value: ArrayLike | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, RollbackState]:
        check_params("with_rollback", params)
        extra_args |= {"value": value, "has_value": has_value}
        steps, inner_state = inner.update(updates, state.inner_state, params, **extra_args)
        loss, observed = _observe.read_loss(
            "with_rollback", value, has_value, state.watch.level.dtype, axis_name
        )

        settles = state.settles > 0
        is_dead = _is_zero(updates) & (loss > state.watch.level)
        watched, lost = watch(state.watch, loss, ~jnp.isfinite(loss) | is_dead, patience)
        losses = observe(state.window, loss)
        is_full = losses.steps >= jnp.asarray(window, loss.dtype)
        takes = is_full & improves(state.watch, losses.mean) & ~lost
        watched = _numerics.select(takes, watch_from(losses.mean, variance(losses)), watched)
        losses = _numerics.select(is_full | lost, empty_window(), losses)

        goes_back, takes = observed & lost & ~settles, observed & takes
        steps, inner_state, kept, returns = exchange(
            where_finite(jnp.asarray(True), steps, params),
            inner_state,
            state.kept,
            params=params,
            old_inner_state=state.inner_state,
            needed=goes_back | settles | takes,
            goes_back=goes_back,
            settles=settles,
            takes=takes,
        )
        begins = returns & ~settles
        # A loss on the way back is one of the parameters that are left: it tells nothing.
        counts = observed & (begins | ~returns)
        left = jnp.where(begins, SETTLING_STEPS, state.settles) - 1
        return steps, RollbackState(
            watch=_numerics.select(counts, watched, state.watch),
            window=_numerics.select(counts, losses, state.window),
            kept=kept,
            settles=jnp.where(returns, left, 0).astype(jnp.int32),
            num_rollbacks=state.num_rollbacks + begins.astype(jnp.int32),
            inner_state=_cut(inner_state, state.inner_state, returns, jnp.where(begins, cut_factor, 1)),
        )

    return _rule.GradientTransformationExtraLoss(init_fn, update_fn)


def _is_zero(updates: optax.Updates) -> jax.Array:
    """Whether there are gradients, and all of them are zero."""
    leaves = [leaf for leaf in jax.tree.leaves(updates) if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)]
    return ~jnp.any(jnp.array([jnp.any(leaf != 0) for leaf in leaves])) if leaves else jnp.asarray(False)


def _cut(
    inner_state: optax.OptState, latest: optax.OptState, returns: jax.Array, factor: jax.Array
) -> optax.OptState:
    """On the way back, the rates in a state that was kept, cut from where they were last if that is lower."""

    def cut(kept: Any, last: Any) -> Any:
        def lower(kept: jax.Array, last: jax.Array) -> jax.Array:
            return jnp.where(returns, jnp.minimum(kept, last) * factor.astype(kept.dtype), kept)

        return _rule.map_rates(lower, kept, last)

    return jax.tree.map(cut, inner_state, latest, is_leaf=_rule.is_rate_state)
