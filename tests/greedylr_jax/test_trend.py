"""The trend rule: against a plain-Python model, and in the situations that it is for."""

import math

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import greedylr_jax
from greedylr_jax import trend_lr, trend_lr_schedule
from tests.greedylr_jax.rules import scales


def model(losses, *, window=20, raise_factor=1.3, cut_factor=0.49, drift=1.1, fade=0.5, significance=2.0,
          low=1e-4, high=5.0):  # fmt: skip
    """The rule as one would say it."""
    scale, optimism, seen, count, before = 1.0, 1.0, [], 0, None
    result = []
    for loss in losses:
        factor, worse = 1.0, False
        count += 1
        if math.isfinite(loss):
            seen.append(loss)
        if not math.isfinite(loss):
            worse, before = True, None
        elif count >= window:
            mean = np.mean(seen)
            error = np.var(seen, ddof=1) / len(seen) if len(seen) > 1 else 0.0
            if before is not None:
                bound = significance * math.sqrt(error + before[1])
                if mean - before[0] < -bound:
                    factor = raise_factor
                elif mean - before[0] > bound:
                    worse = True
                else:
                    factor = drift**optimism
            before = mean, error
        if worse:
            factor, optimism = cut_factor, optimism * fade
        if worse or count >= window:
            seen, count = [], 0
        scale = min(max(scale * factor, low), high)
        result.append(scale)
    return result


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.floats(-4, 4, width=32).map(lambda x: round(x * 64) / 64),
            st.sampled_from([math.nan, math.inf, -math.inf]),
        ),
        min_size=60,
        max_size=60,
    ),
    # No square of these is rational, as a bound is that a difference of means could meet exactly.
    st.sampled_from([(2, 0.6 * math.pi), (3, math.pi / 4), (5, math.pi / 3), (20, 0.6 * math.pi)]),
)
def test_the_rule_is_that_of_the_model(losses, numbers):
    window, significance = numbers
    with jax.enable_x64(True):  # the rounding of a mean could decide
        got = scales(trend_lr(window=window, significance=significance), np.array(losses))
    expected = model(losses, window=window, significance=significance)
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def noisy(levels, noise=0.1, seed=0):
    return (
        np.repeat(levels, 20) + noise * np.random.default_rng(seed).standard_normal(20 * len(levels))
    ).astype("f4")


def test_a_loss_that_falls_raises_the_rate_and_one_that_rises_cuts_it():
    got = scales(trend_lr(), noisy([3, 2, 1, 2, 3]))[19::20]
    np.testing.assert_allclose(got, np.cumprod([1, 1.3, 1.3, 0.49, 0.49]), rtol=1e-5)


def test_no_news_is_good_news_and_the_optimism_fades_with_each_cut():
    got = scales(trend_lr(max_scale=100.0), noisy([1, 1, 2, 2, 3, 3], noise=1e-3))[19::20]
    np.testing.assert_allclose(got[1:] / got[:-1], [1.1, 0.49, 1.1**0.5, 0.49, 1.1**0.25], rtol=1e-5)
    constant = scales(trend_lr(drift=1.0), noisy([1, 1, 1, 1]))
    np.testing.assert_allclose(constant, 1)


def test_a_divergence_cuts_at_once_and_what_came_before_is_no_measure():
    losses = noisy([3, 1])
    losses[25] = np.nan
    got = scales(trend_lr(), np.concatenate([losses, noisy([1, 1], seed=1)]))
    assert (got[:25] == 1).all() and (got[25:65] == got[25]).all()
    # The next full window has nothing to be compared with, the one after it is as good.
    np.testing.assert_allclose(got[[45, 65]], [0.49, 0.49 * 1.1**0.5], rtol=1e-5)


def test_the_rate_stays_within_its_bounds():
    falling, rising = noisy(range(40, 0, -1)), noisy(range(40))
    assert scales(trend_lr(max_scale=2.0), falling).max() == 2
    assert scales(trend_lr(min_scale=0.25), rising).min() == 0.25
    assert np.isinf(scales(trend_lr(max_scale=np.inf, raise_factor=1e30), falling)).any()


def test_numbers_may_be_traced():
    losses = noisy([3, 2, 2, 3])
    windows, factors = np.array([10, 20], np.int32), np.array([1.2, 1.5], np.float32)

    def run(window, factor):
        tx = trend_lr(window=window, raise_factor=factor)
        body = lambda state, loss: (tx.update(None, state, value=loss)[1],) * 2  # noqa: E731
        return greedylr_jax.get_scale(jax.lax.scan(body, tx.init(None), losses)[0])

    got = jax.jit(jax.vmap(run))(windows, factors)
    for index in range(2):
        alone = scales(trend_lr(window=int(windows[index]), raise_factor=float(factors[index])), losses)[-1]
        np.testing.assert_allclose(got[index], alone, rtol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"window": 1}, "window"),
        ({"raise_factor": 0.9}, "raise_factor"),
        ({"cut_factor": 1.0}, "cut_factor"),
        ({"drift": 0.5}, "drift"),
        ({"fade": 2.0}, "fade"),
        ({"significance": -1.0}, "significance"),
        ({"min_scale": 0.0}, "min_scale"),
        ({"max_scale": 0.5}, "max_scale"),
    ],
)
def test_numbers_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        trend_lr(**arguments)


def test_a_schedule_out_of_its_bounds_is_refused():
    with pytest.raises(ValueError, match="init_value must not exceed max_value"):
        trend_lr_schedule(2.0, min_value=0.1, max_value=1.0)
