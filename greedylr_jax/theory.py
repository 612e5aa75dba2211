"""Smoothness, the factor derived from it, and a convergence bound for adaptive learning rates.

"Dynamic Learning Rate Scheduling based on Loss Changes Leads to Faster Convergence" claims a factor that
maximizes GreedyLR's rate of convergence for an L_max-smooth objective (:func:`optimal_factor`). An objective
is L-smooth if its gradient is Lipschitz continuous with constant L; if it is twice differentiable, L is the
supremum of the largest absolute eigenvalue of its Hessian. :func:`estimate_smoothness` computes this
eigenvalue at one point, :func:`local_smoothness` estimates it during training, and :func:`convergence_bound`
bounds the error on a convex objective for any rule whose learning rates stay below 2/L.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from greedylr_jax import _checks, _numerics


def estimate_smoothness(
    loss_fn: Callable[[optax.Params], jax.Array],
    params: optax.Params,
    *,
    num_iterations: int = 100,
    tolerance: ArrayLike = 1e-4,
    matmul_precision: Literal["default", "high", "highest"] | None = "highest",
    key: jax.Array | None = None,
) -> jax.Array:
    """The largest absolute eigenvalue of the Hessian at ``params``, by power iteration.

    An iteration is one Hessian-vector product (forward over reverse), with the cost of about two gradients
    and the memory of one. The estimate is a lower bound of the eigenvalue. If the two largest eigenvalues are
    close to each other, convergence is slow, but the estimate is close to both.

    Args:
      loss_fn: from parameters to a scalar, twice differentiable.
      params: a pytree of real floating-point arrays.
      num_iterations: maximum number of iterations, an integer >= 1.
      tolerance: relative change of the estimate below which the iteration stops, >= 0; may be traced.
      matmul_precision: precision of the matrix products in ``loss_fn`` and its derivatives, as in
        ``jax.default_matmul_precision``: ``"highest"`` (float32), ``"high"``, ``"default"``, or None for that
        of the caller. With the bfloat16 products that are a TPU's default the estimate erred by 0.04%
        (perceptron on digits), which exceeds ``tolerance``.
      key: for the random initial vector; None: a fixed key.

    Returns:
      A scalar >= 0, float32 or wider; for a convex function, the largest eigenvalue. Works under ``jax.jit``.

    Raises:
      ValueError: if a number is out of its range, or ``params`` has no elements.

    Examples:
      >>> import jax.numpy as jnp
      >>> from greedylr_jax.theory import estimate_smoothness
      >>> loss_fn = lambda params: jnp.sum(jnp.array([1.0, 3.0, -8.0]) * params**2) / 2
      >>> print(f"{estimate_smoothness(loss_fn, jnp.ones(3)):.3f}")
      8.000
    """
    num_iterations = _checks.check_static_integer("num_iterations", num_iterations, low=1)
    tolerance = _checks.check_real("tolerance", tolerance, low=0.0, high_open=True)
    loss_fn = _numerics.at_precision(loss_fn, _checks.check_precision(matmul_precision))
    if not sum(jnp.size(leaf) for leaf in jax.tree.leaves(params)):
        raise ValueError(f"params must have elements, got {params!r}.")

    def normalised(vector: optax.Params) -> tuple[optax.Params, jax.Array]:
        norm = _norm(vector)
        safe = jnp.where(norm > 0, norm, 1)
        return jax.tree.map(lambda leaf: (leaf / safe).astype(leaf.dtype), vector), norm

    def body(carry: Any) -> Any:
        vector, estimate, _, count = carry
        _, product = jax.jvp(jax.grad(loss_fn), (params,), (vector,))
        vector, norm = normalised(product)
        return vector, norm, estimate, count + 1

    def has_not_converged(carry: Any) -> jax.Array:
        _, estimate, previous, count = carry
        is_stationary = jnp.abs(estimate - previous) <= jnp.asarray(tolerance, estimate.dtype) * estimate
        return (count < num_iterations) & ~(is_stationary & (count > 1))

    start, _ = normalised(optax.tree.random_like(jax.random.key(0) if key is None else key, params))
    unknown = jnp.full((), -1, _numerics.default_float_dtype())
    _, estimate, _, _ = jax.lax.while_loop(has_not_converged, body, (start, unknown, unknown, 0))
    return estimate


class LocalSmoothnessState(NamedTuple):
    """State of :func:`local_smoothness`."""

    count: jax.Array  # shape=(), dtype=int32; estimates so far
    latest: jax.Array  # shape=(), dtype=float; latest estimate
    mean: jax.Array  # shape=(), dtype=float; running mean
    maximum: jax.Array  # shape=(), dtype=float; maximum so far
    previous_params: optax.Params
    previous_gradient: optax.Updates


def local_smoothness(decay: ArrayLike = 0.9) -> optax.GradientTransformation:
    """Estimates ``|g_t - g_{t-1}| / |params_t - params_{t-1}|`` in training; leaves the updates unchanged.

    Put it first in a chain, where the updates are the gradients. With full gradients the estimate is a lower
    bound of L; with gradients of different batches it is too high, because their difference contains noise.
    So does that of gradients with rounding errors: compute the gradients under
    ``jax.default_matmul_precision("highest")`` on a TPU or GPU.

    Args:
      decay: of the exponential moving average, in [0, 1), which starts at the first estimate; may be traced.

    Returns:
      A gradient transformation that requires ``params``. Its state holds ``latest`` and ``mean``, NaN before
      the second step, ``maximum``, 0 before it, and one copy of parameters and gradients. Steps without a
      change of the parameters, or with gradients that are not finite, are ignored.

    Raises:
      ValueError: if ``decay`` is out of its range; ``update`` raises it if ``params`` is missing.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from greedylr_jax.theory import local_smoothness
      >>> tx = optax.chain(local_smoothness(), optax.sgd(0.1))
      >>> params = jnp.array([1.0, 0.0])
      >>> state = tx.init(params)
      >>> for _ in range(2):
      ...     grads = jax.grad(lambda p: 3.0 * jnp.sum(p**2))(params)
      ...     updates, state = tx.update(grads, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> print(f"{state[0].latest:.3f}")
      6.000
    """
    decay = _checks.check_real("decay", decay, low=0.0, high=1.0, high_open=True)

    def init_fn(params: optax.Params) -> LocalSmoothnessState:
        dtype = _numerics.default_float_dtype()
        unknown = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan, dtype=jnp.result_type(leaf)), params)
        return LocalSmoothnessState(
            count=jnp.zeros((), jnp.int32),
            latest=jnp.full((), jnp.nan, dtype),
            mean=jnp.full((), jnp.nan, dtype),
            maximum=jnp.zeros((), dtype),
            previous_params=unknown,
            previous_gradient=jax.tree.map(jnp.array, unknown),
        )

    def update_fn(
        updates: optax.Updates, state: LocalSmoothnessState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, LocalSmoothnessState]:
        if params is None:
            raise ValueError("local_smoothness requires params: call tx.update(grads, opt_state, params).")
        distance = _norm(optax.tree.sub(params, state.previous_params))
        change = _norm(optax.tree.sub(updates, state.previous_gradient))
        known = (distance > 0) & jnp.isfinite(distance) & jnp.isfinite(change)
        estimate = change / jnp.where(known, distance, 1)
        weight = jnp.where(state.count == 0, 1, 1 - jnp.asarray(decay, estimate.dtype))
        mean = jnp.where(state.count == 0, 0, state.mean)
        advanced = (
            jnp.asarray(optax.safe_increment(state.count)),
            estimate,
            mean + weight * (estimate - mean),
            jnp.maximum(state.maximum, estimate),
        )
        unchanged = (state.count, state.latest, state.mean, state.maximum)
        numbers = _numerics.select(known, advanced, unchanged)
        # Gradients need not have the dtype of the parameters, which is that of the state.
        previous_params = _numerics.like(params, state.previous_params)
        previous_gradient = _numerics.like(updates, state.previous_gradient)
        return updates, LocalSmoothnessState(*numbers, previous_params, previous_gradient)

    return optax.GradientTransformation(init_fn, cast(Any, update_fn))


def optimal_factor(smoothness: ArrayLike) -> jax.Array:
    """GreedyLR's factor for an L-smooth objective, F = 1 - 1/L: claimed, neither derived nor recommended.

    The abstract states that an optimal factor is derived and prints no formula; 1 - 1/L is what is reported
    of the paper. It cannot be optimal for every objective. Train c f with the learning rate a / c instead of
    f with a, for any c > 0: the iterates are the same, and with a relative threshold so are GreedyLR's
    decisions, so the best factor is the same as well. But the smoothness of c f is c L, and 1 - 1/(c L)
    differs from 1 - 1/L. (L has a unit, that of the loss over that of a squared parameter; a factor has
    none.) ``python -m experiments study theory`` compares it with other factors.

    Args:
      smoothness: L_max, > 1 in the units of the problem; otherwise the factor is not in (0, 1). May be traced
        and is not checked then.

    Returns:
      A scalar in (0, 1), for ``greedy_lr(factor=...)``.

    Raises:
      ValueError: if ``smoothness`` is not traced and not a finite number above 1.

    Examples:
      >>> from greedylr_jax.theory import optimal_factor
      >>> print(optimal_factor(20.0))
      0.95

    Source: "Dynamic Learning Rate Scheduling based on Loss Changes Leads to Faster Convergence"; its abstract
    claims the derivation.
    """
    smoothness = _checks.check_real("smoothness", smoothness, low=1.0, low_open=True, high_open=True)
    return 1 - 1 / jnp.asarray(smoothness, _numerics.default_float_dtype())


def convergence_bound(
    learning_rates: ArrayLike, *, smoothness: float, initial_distance: float, strong_convexity: float = 0.0
) -> np.ndarray:
    """Upper bound of ``f - f*`` after each step of gradient descent with the given learning rates.

    For a convex, L-smooth f with minimizer x*, ``D = |x_0 - x*|``, and learning rates a_t in (0, 2/L) that
    may depend on all previous steps, as those of GreedyLR do:

    * *Descent.* ``f(x_{t+1}) <= f(x_t) - a_t (1 - L a_t / 2) |g_t|^2``, by smoothness, so f decreases in
      every step.
    * *Distance.* ``|x_{t+1} - x*|^2 = |x_t - x*|^2 - 2 a_t <g_t, x_t - x*> + a_t^2 |g_t|^2``, where
      convexity bounds ``<g_t, x_t - x*>`` from below by ``f(x_t) - f*``.
    * Combined, with c_t = a_t / (1 - L a_t / 2):
      ``2 a_t (f(x_t) - f*) <= |x_t - x*|^2 - |x_{t+1} - x*|^2 + c_t (f(x_t) - f(x_{t+1}))``.
    * *Learning rates up to 1/L*: c_t <= 2 a_t, so f(x_t) can be replaced by f(x_{t+1}) on the left if the
      last term is dropped. Summed over t, since f decreases:  ``f(x_T) - f* <= D^2 / (2 sum a_t)``.
    * *Learning rates below 2/L*: c_t <= C = max c_t, and the last terms sum to at most C (f(x_0) - f*), which
      is at most C L D^2 / 2:  ``f(x_T) - f* <= D^2 (1 + C L / 2) / (2 sum a_t)``.
    * *Strong convexity* m > 0: each step multiplies the distance by at most
      ``max(|1 - a_t m|, |1 - a_t L|)``, so ``f(x_T) - f*`` is at most ``(L / 2) D^2`` times the product of
      their squares. The smallest valid bound is returned.

    A bound for GreedyLR in advance: its learning rates are at least its minimum a, so if its maximum is at
    most 1/L, the bound with all ``learning_rates`` equal to a holds (the bound decreases in each learning
    rate).

    Args:
      learning_rates: a_t, shape (steps,), each in (0, 2/L).
      smoothness: L > 0.
      initial_distance: D >= 0.
      strong_convexity: m in [0, L].

    Returns:
      Shape (steps,), float64: the bound on f - f* after 1, 2, ... steps.

    Raises:
      ValueError: if an argument is out of its range.

    Examples:
      >>> from greedylr_jax.theory import convergence_bound
      >>> print(convergence_bound([0.5, 0.25, 0.25], smoothness=2.0, initial_distance=1.0))
      [1.         0.66666667 0.5       ]
    """
    limit = _checks.check_real("smoothness", smoothness, low=0.0, low_open=True, high_open=True)
    distance = _checks.check_real("initial_distance", initial_distance, low=0.0, high_open=True)
    strong = _checks.check_real("strong_convexity", strong_convexity, low=0.0, high=limit)
    rates = np.asarray(learning_rates, np.float64)
    if rates.ndim != 1 or not ((rates > 0) & (rates < 2 / limit)).all():
        raise ValueError(
            f"learning_rates must be of shape (steps,) with each in (0, {2 / limit:g}), which is 2 over the "
            f"smoothness, got shape {rates.shape} and values from {rates.min():g} to {rates.max():g}."
        )
    total = np.cumsum(rates)
    small = np.where(np.maximum.accumulate(rates) <= 1 / limit, distance**2 / (2 * total), np.inf)
    worst = np.maximum.accumulate(rates / (1 - limit * rates / 2))
    general = distance**2 * (1 + worst * limit / 2) / (2 * total)
    contraction = np.maximum(np.abs(1 - rates * strong), np.abs(1 - rates * limit))
    contracting = limit / 2 * distance**2 * np.cumprod(contraction**2) if strong else np.inf
    return np.minimum(np.minimum(small, general), contracting)


def _norm(tree: Any) -> jax.Array:
    """The Euclidean norm of a pytree, in float32 or wider."""
    dtype = _numerics.default_float_dtype()
    squares = [jnp.sum(jnp.square(jnp.abs(leaf).astype(dtype))) for leaf in jax.tree.leaves(tree)]
    return jnp.sqrt(sum(squares, start=jnp.zeros((), dtype)))
