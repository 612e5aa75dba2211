"""The trend rule: against a plain-Python model, and on losses of known trend."""

import math

import jax
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from greedylr_jax import trend_lr, trend_lr_schedule
from tests.greedylr_jax.rules import scales, scan_scales


def model(losses, *, window=20, raise_factor=1.3, accelerated_factor=2.0, cut_factor=0.49, drift=1.1,
          decay=0.5, significance=2.0, low=1e-4, high=5.0):  # fmt: skip
    """The rule with lists of losses as windows."""
    scale, exponent, rose, speed = 1.0, 1.0, False, 0.0
    current, recent, baseline = [], [], None
    result = []
    for loss in losses:
        factor, better, worse = 1.0, False, False
        current.append(loss)
        recent.append(loss)
        if not math.isfinite(loss):
            worse, factor = True, cut_factor
            current, recent, baseline = [], [], None
        elif len(recent) >= window:
            if baseline is not None:
                rise, bound, distance = compare(baseline, current, significance)
                better, worse = rise < -bound, rise > bound
                factor = drift
                if better:
                    assume(
                        not math.isclose(-rise / distance, 0.7 * speed)
                    )  # rounding would change the decision
                    factor = (
                        accelerated_factor if speed > 0 and -rise / distance >= 0.7 * speed else raise_factor
                    )
                    speed = -rise / distance
                elif worse:
                    factor = cut_factor
                factor **= exponent
            if baseline is None or better or worse:
                baseline, current = recent, []
            elif len(current) >= 2 * len(baseline):
                baseline, current = current, []
            recent = []
        if worse:
            speed = 0.0
            exponent = max(exponent * decay, 1 / 8) if rose else exponent
        rose = factor > 1 if factor != 1 else rose
        scale = min(max(scale * factor, low), high)
        result.append(scale)
    return result


def compare(baseline, current, significance):
    """The rise of the mean, its significance bound, and the steps between the middles of the windows."""
    errors = (np.var(part, ddof=1) / len(part) for part in (baseline, current))
    rise = np.mean(current) - np.mean(baseline)
    return rise, significance * math.sqrt(sum(errors)), (len(baseline) + len(current)) / 2


@jax.jit  # one program for all examples
def scales_of(losses, window, significance):
    return scan_scales(trend_lr(window=window, significance=significance), losses)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.floats(-4, 4, width=32).map(lambda x: round(x * 64) / 64), min_size=60, max_size=60),
    # Few, as each clears all windows.
    st.dictionaries(st.integers(0, 59), st.sampled_from([math.nan, math.inf, -math.inf]), max_size=2),
    # Irrational squares: a bound never equals a difference of means exactly.
    st.sampled_from([(2, 0.6 * math.pi), (3, math.pi / 4), (5, math.pi / 3), (20, 0.6 * math.pi)]),
)
def test_the_rule_equals_the_model(losses, bad, numbers):
    losses = [bad.get(index, loss) for index, loss in enumerate(losses)]
    window, significance = numbers
    with jax.enable_x64(True):  # rounding of a mean could change a decision
        got = scales_of(np.array(losses), window, significance)
    expected = model(losses, window=window, significance=significance)
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def noisy(levels, noise=0.1, seed=0):
    return (
        np.repeat(levels, 20) + noise * np.random.default_rng(seed).standard_normal(20 * len(levels))
    ).astype("f4")


def factors_of(tx, levels, noise=0.1):
    """The factors of the scale at every twentieth loss."""
    got = scales(tx, noisy(levels, noise))[19::20]
    return got[1:] / got[:-1]


def test_a_falling_loss_raises_the_rate_and_a_rising_one_cuts_it():
    got = factors_of(trend_lr(decay=1.0), [3, 2, 1.5, 2, 3])
    np.testing.assert_allclose(got, [1.3, 1.3, 0.49, 0.49], rtol=1e-5)


def test_an_increase_that_keeps_the_speed_of_the_loss_accelerates_the_next_one():
    tx = trend_lr(max_scale=100.0)
    # Speeds of 0.05, 0.045 and 0.025 per step.
    np.testing.assert_allclose(factors_of(tx, [5, 4, 3.1, 2.6], 1e-3), [1.3, 2.0, 1.3], rtol=1e-5)
    # The same after an accelerated increase: 0.03 per step is four fifths of the previous 0.0375.
    np.testing.assert_allclose(factors_of(tx, [5, 4, 3.25, 2.65, 2.3], 1e-3), [1.3, 2.0, 2.0, 1.3], rtol=1e-5)
    # A cut resets the speed.
    np.testing.assert_allclose(
        factors_of(trend_lr(decay=1.0), [5, 4, 5, 4, 3], 1e-3), [1.3, 0.49, 1.3, 2.0], rtol=1e-5
    )


def test_a_change_below_the_noise_of_twenty_losses_is_detected_in_more():
    slow = 1 - 0.0008 * np.arange(400) + 0.1 * np.random.default_rng(3).standard_normal(400)
    short = scales(trend_lr(drift=1.0), slow.astype("f4")[:60])
    assert (short == 1).all()
    assert scales(trend_lr(drift=1.0), slow.astype("f4"))[-1] > 1.3


def test_without_a_significant_change_the_rate_drifts_and_cuts_after_increases_shrink_all_factors():
    got = factors_of(trend_lr(max_scale=100.0), [1, 1, 2, 2, 3, 4, 4], 1e-3)
    # The first and the second cut follow an increase, the third follows a cut.
    expected = [1.1, 0.49, 1.1**0.5, 0.49**0.5, 0.49**0.25, 1.1**0.25]
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    constant = scales(trend_lr(drift=1.0), noisy([1, 1, 1, 1]))
    np.testing.assert_allclose(constant, 1)


def test_the_step_exponent_has_a_minimum():
    got = factors_of(trend_lr(decay=0.0, max_scale=100.0), [1, 1, 2, 2, 3], 1e-3)
    np.testing.assert_allclose(got, [1.1, 0.49, 1.1**0.125, 0.49**0.125], rtol=1e-5)


def test_a_divergence_cuts_at_once_and_clears_the_baseline():
    losses = noisy([3, 1])
    losses[25] = np.nan
    got = scales(trend_lr(), np.concatenate([losses, noisy([1, 1], seed=1)]))
    assert (got[:25] == 1).all() and (got[25:65] == got[25]).all()
    # The next window becomes the baseline; the change after it is not significant.
    np.testing.assert_allclose(got[[45, 65]], [0.49, 0.49 * 1.1], rtol=1e-5)


def test_a_divergence_cuts_by_the_full_factor_whatever_the_step_exponent():
    losses = np.append(noisy([1, 1, 2, 2, 3], noise=1e-3), np.float32(np.inf))
    got = scales(trend_lr(), losses)
    np.testing.assert_allclose(got[-1] / got[-2], 0.49, rtol=1e-5)


def test_the_rate_stays_within_its_bounds():
    falling, rising = noisy(range(40, 0, -1)), noisy(range(40))
    assert scales(trend_lr(max_scale=2.0), falling).max() == 2
    assert scales(trend_lr(min_scale=0.25), rising).min() == 0.25
    assert np.isinf(scales(trend_lr(max_scale=np.inf, accelerated_factor=1e30), falling)).any()


def test_numbers_may_be_traced():
    losses = noisy([3, 2, 2, 3])
    windows, factors = np.array([10, 20], np.int32), np.array([1.2, 1.5], np.float32)

    def run(window, factor):
        return scan_scales(trend_lr(window=window, raise_factor=factor), losses)[-1]

    got = jax.jit(jax.vmap(run))(windows, factors)
    assert got[0] != got[1]
    for index in range(2):
        alone = scales(trend_lr(window=int(windows[index]), raise_factor=float(factors[index])), losses)[-1]
        np.testing.assert_allclose(got[index], alone, rtol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"window": 1}, "window"),
        (
            {"window": 2**24 + 1},
            r"window must be an integer in \[2, 16777216\]",
        ),  # float32 counts exactly up to it
        ({"raise_factor": 0.9}, "raise_factor"),
        ({"accelerated_factor": 0.9}, "accelerated_factor"),
        ({"cut_factor": 1.0}, "cut_factor"),
        ({"drift": 0.5}, "drift"),
        ({"decay": 2.0}, "decay"),
        ({"significance": -1.0}, "significance"),
        ({"min_scale": 0.0}, "min_scale"),
        ({"max_scale": 0.5}, "max_scale"),
    ],
)
def test_an_argument_out_of_range_is_an_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        trend_lr(**arguments)


def test_a_schedule_with_an_initial_rate_out_of_bounds_is_an_error():
    with pytest.raises(ValueError, match="init_value must not exceed max_learning_rate"):
        trend_lr_schedule(2.0, min_learning_rate=0.1, max_learning_rate=1.0)
