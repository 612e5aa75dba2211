"""The trend rule: against a plain-Python model, and in the situations that it is for."""

import math

import jax
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from greedylr_jax import trend_lr, trend_lr_schedule
from tests.greedylr_jax.rules import scales, scan_scales


def model(losses, *, window=20, raise_factor=1.3, leap_factor=2.0, cut_factor=0.49, drift=1.1, fade=0.5,
          significance=2.0, low=1e-4, high=5.0):  # fmt: skip
    """The rule as one would say it; a stretch of losses is the list of them."""
    scale, boldness, rose, speed = 1.0, 1.0, False, 0.0
    block, recent, reference = [], [], None
    result = []
    for loss in losses:
        factor, better, worse = 1.0, False, False
        block.append(loss)
        recent.append(loss)
        if not math.isfinite(loss):
            worse, factor = True, cut_factor
            block, recent, reference = [], [], None
        elif len(recent) >= window:
            if reference is not None:
                rise, bound, distance = compare(reference, block, significance)
                better, worse = rise < -bound, rise > bound
                factor = drift
                if better:
                    assume(not math.isclose(-rise / distance, 0.7 * speed))  # rounding would decide
                    factor = leap_factor if speed > 0 and -rise / distance >= 0.7 * speed else raise_factor
                    speed = -rise / distance
                elif worse:
                    factor = cut_factor
                factor **= boldness
            if reference is None or better or worse:
                reference, block = recent, []
            elif len(block) >= 2 * len(reference):
                reference, block = block, []
            recent = []
        if worse:
            speed = 0.0
            boldness = max(boldness * fade, 1 / 8) if rose else boldness
        rose = factor > 1 if factor != 1 else rose
        scale = min(max(scale * factor, low), high)
        result.append(scale)
    return result


def compare(reference, block, significance):
    """By how much the mean has risen, what of that may be noise, and the steps between the middles."""
    errors = (np.var(part, ddof=1) / len(part) for part in (reference, block))
    rise = np.mean(block) - np.mean(reference)
    return rise, significance * math.sqrt(sum(errors)), (len(reference) + len(block)) / 2


@jax.jit  # one program for all examples
def scales_of(losses, window, significance):
    return scan_scales(trend_lr(window=window, significance=significance), losses)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.floats(-4, 4, width=32).map(lambda x: round(x * 64) / 64), min_size=60, max_size=60),
    # Seldom, as each begins everything anew.
    st.dictionaries(st.integers(0, 59), st.sampled_from([math.nan, math.inf, -math.inf]), max_size=2),
    # No square of these is rational, as a bound is that a difference of means could meet exactly.
    st.sampled_from([(2, 0.6 * math.pi), (3, math.pi / 4), (5, math.pi / 3), (20, 0.6 * math.pi)]),
)
def test_the_rule_is_that_of_the_model(losses, bad, numbers):
    losses = [bad.get(index, loss) for index, loss in enumerate(losses)]
    window, significance = numbers
    with jax.enable_x64(True):  # the rounding of a mean could decide
        got = scales_of(np.array(losses), window, significance)
    expected = model(losses, window=window, significance=significance)
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def noisy(levels, noise=0.1, seed=0):
    return (
        np.repeat(levels, 20) + noise * np.random.default_rng(seed).standard_normal(20 * len(levels))
    ).astype("f4")


def steps_of(tx, levels, noise=0.1):
    """What the scale is multiplied by after each twenty losses."""
    got = scales(tx, noisy(levels, noise))[19::20]
    return got[1:] / got[:-1]


def test_a_loss_that_falls_raises_the_rate_and_one_that_rises_cuts_it():
    got = steps_of(trend_lr(fade=1.0), [3, 2, 1.5, 2, 3])
    np.testing.assert_allclose(got, [1.3, 1.3, 0.49, 0.49], rtol=1e-5)


def test_the_next_raise_is_a_leap_where_the_last_one_has_paid():
    tx = trend_lr(max_scale=100.0)
    # 0.05 a step, 0.045, 0.025.
    np.testing.assert_allclose(steps_of(tx, [5, 4, 3.1, 2.6], 1e-3), [1.3, 2.0, 1.3], rtol=1e-5)
    # A leap is a raise, too: 0.03 a step is four fifths of the 0.0375 that led to it, and pays.
    np.testing.assert_allclose(steps_of(tx, [5, 4, 3.25, 2.65, 2.3], 1e-3), [1.3, 2.0, 2.0, 1.3], rtol=1e-5)
    # After a cut there is no raise to have paid.
    np.testing.assert_allclose(
        steps_of(trend_lr(fade=1.0), [5, 4, 5, 4, 3], 1e-3), [1.3, 0.49, 1.3, 2.0], rtol=1e-5
    )


def test_a_change_that_is_lost_in_the_noise_of_twenty_losses_shows_in_more():
    slow = 1 - 0.0008 * np.arange(400) + 0.1 * np.random.default_rng(3).standard_normal(400)
    short = scales(trend_lr(drift=1.0), slow.astype("f4")[:60])
    assert (short == 1).all()
    assert scales(trend_lr(drift=1.0), slow.astype("f4"))[-1] > 1.3


def test_no_news_is_good_news_and_moves_become_smaller_with_each_turn():
    got = steps_of(trend_lr(max_scale=100.0), [1, 1, 2, 2, 3, 4, 4], 1e-3)
    # The second cut follows a rise, the third a cut.
    expected = [1.1, 0.49, 1.1**0.5, 0.49**0.5, 0.49**0.25, 1.1**0.25]
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    constant = scales(trend_lr(drift=1.0), noisy([1, 1, 1, 1]))
    np.testing.assert_allclose(constant, 1)


def test_moves_never_become_too_small_to_matter():
    got = steps_of(trend_lr(fade=0.0, max_scale=100.0), [1, 1, 2, 2, 3], 1e-3)
    np.testing.assert_allclose(got, [1.1, 0.49, 1.1**0.125, 0.49**0.125], rtol=1e-5)


def test_a_divergence_cuts_at_once_and_what_came_before_is_no_measure():
    losses = noisy([3, 1])
    losses[25] = np.nan
    got = scales(trend_lr(), np.concatenate([losses, noisy([1, 1], seed=1)]))
    assert (got[:25] == 1).all() and (got[25:65] == got[25]).all()
    # The next full window has nothing to be compared with, the one after it is as good.
    np.testing.assert_allclose(got[[45, 65]], [0.49, 0.49 * 1.1], rtol=1e-5)


def test_a_divergence_is_cut_whole_however_many_turns_there_were():
    losses = np.append(noisy([1, 1, 2, 2, 3], noise=1e-3), np.float32(np.inf))
    got = scales(trend_lr(), losses)
    np.testing.assert_allclose(got[-1] / got[-2], 0.49, rtol=1e-5)


def test_the_rate_stays_within_its_bounds():
    falling, rising = noisy(range(40, 0, -1)), noisy(range(40))
    assert scales(trend_lr(max_scale=2.0), falling).max() == 2
    assert scales(trend_lr(min_scale=0.25), rising).min() == 0.25
    assert np.isinf(scales(trend_lr(max_scale=np.inf, leap_factor=1e30), falling)).any()


def test_numbers_may_be_traced():
    losses = noisy([3, 2, 2, 3])
    windows, factors = np.array([10, 20], np.int32), np.array([1.2, 1.5], np.float32)

    def run(window, factor):
        return scan_scales(trend_lr(window=window, raise_factor=factor), losses)[-1]

    got = jax.jit(jax.vmap(run))(windows, factors)
    for index in range(2):
        alone = scales(trend_lr(window=int(windows[index]), raise_factor=float(factors[index])), losses)[-1]
        np.testing.assert_allclose(got[index], alone, rtol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"window": 1}, "window"),
        ({"window": 2**24 + 1}, r"window must be an integer in \[2, 16777216\]"),  # float32 counts no further
        ({"raise_factor": 0.9}, "raise_factor"),
        ({"leap_factor": 0.9}, "leap_factor"),
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
