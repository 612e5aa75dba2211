"""The trend rule: against a plain-Python model, and on losses of known trend."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from greedylr_jax import trend_lr, trend_lr_schedule
from tests.greedylr_jax.rules import scales, scan_scales


def model(losses, *, window=20, raise_factor=1.3, accelerated_factor=2.0, cut_factor=0.49, drift=1.1,
          decay=0.5, significance=2.0, low=1e-4, high=5.0):  # fmt: skip
    """The rule with lists of losses as windows."""
    scale, exponent, rose, speed = 1.0, 1.0, False, 0.0
    pause, next_pause = 0, 1
    current, recent, baseline = [], [], None
    result = []
    for loss in losses:
        factor, better, worse = 1.0, False, False
        current.append(loss if baseline is None else clipped(loss, baseline))
        recent.append(loss)
        is_test = not math.isfinite(loss) or len(recent) >= window
        if not math.isfinite(loss):
            worse, factor = True, cut_factor
            current, recent, baseline = [], [], None
        elif len(recent) >= window:
            if baseline is not None:
                rise, bound, distance = compare(baseline, current, significance)
                better, worse = rise < -bound, rise > bound
                factor = drift
                if better:
                    new_speed = -rise / distance
                    assume(not math.isclose(new_speed, 0.7 * speed))  # rounding would change the decision
                    keeps_speed = speed > 0 and new_speed >= 0.7 * speed
                    factor = accelerated_factor if keeps_speed else raise_factor
                    speed = new_speed if pause == 0 else speed
                factor = cut_factor ** max(exponent, 1 / 2) if worse else factor**exponent
                if pause > 0 and not worse:
                    factor = 1.0
            if baseline is None or better or worse:
                baseline, current = recent, []
            elif len(current) >= 2 * len(baseline):
                baseline, current = current, []
            recent = []
        if is_test:
            pause = max(pause - 1, 0)
        if worse:
            speed = 0.0
        if worse and rose:
            exponent = max(exponent * decay, 1 / 8)
            pause, next_pause = next_pause, 2 * next_pause
        rose = factor > 1 if factor != 1 else rose
        scale = min(max(scale * factor, low), high)
        result.append(scale)
    return result


ROUNDING = 4 * 2.0**-23


def clipped(loss, baseline):
    """The loss, if finite at most ten standard deviations above the mean of the baseline."""
    mean = np.mean(baseline)
    bound = mean + 10 * max(np.std(baseline, ddof=1), ROUNDING * abs(mean))
    return min(loss, bound) if math.isfinite(loss) else loss


def compare(baseline, current, significance):
    """The rise of the mean, its significance bound, and the steps between the middles of the windows."""
    parts = (baseline, current)
    errors = (max(np.var(part, ddof=1) / len(part), (ROUNDING * np.mean(part)) ** 2) for part in parts)
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
    # A cut resets the speed, and pauses the increases for one test.
    np.testing.assert_allclose(
        factors_of(trend_lr(decay=1.0), [5, 4, 5, 4, 3, 2], 1e-3), [1.3, 0.49, 1.0, 1.3, 2.0], rtol=1e-5
    )


def test_a_change_below_the_noise_of_twenty_losses_is_detected_in_more():
    slow = 1 - 0.0008 * np.arange(400) + 0.1 * np.random.default_rng(3).standard_normal(400)
    short = scales(trend_lr(drift=1.0), slow.astype("f4")[:60])
    assert (short == 1).all()
    assert scales(trend_lr(drift=1.0), slow.astype("f4"))[-1] > 1.3


def test_without_a_significant_change_the_rate_drifts():
    np.testing.assert_allclose(factors_of(trend_lr(), [1, 1, 1], 1e-3), 1.1, rtol=1e-5)
    constant = scales(trend_lr(drift=1.0), noisy([1, 1, 1, 1]))
    np.testing.assert_allclose(constant, 1)


def test_cuts_after_increases_shrink_all_factors_and_pause_the_increases():
    got = factors_of(trend_lr(max_scale=100.0), [1, 1, 2, 2, 2, 3, 3, 3, 3, 4, 5], 1e-3)
    # Pauses of one and two tests. The last cut follows a cut.
    expected = [1.1, 0.49, 1, 1.1**0.5, 0.49**0.5, 1, 1, 1.1**0.25, 0.49**0.5, 0.49**0.5]
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_the_step_exponent_has_a_minimum():
    got = factors_of(trend_lr(decay=0.0, max_scale=100.0), [1, 1, 2, 2, 2, 3], 1e-3)
    np.testing.assert_allclose(got, [1.1, 0.49, 1, 1.1**0.125, 0.49**0.5], rtol=1e-5)


def ulps(base, count, seed=0):
    """A constant loss with rounding errors of up to two units in the last place."""
    steps = np.random.default_rng(seed).integers(-2, 3, count)
    return (np.float32(base) * (1 + steps * np.finfo(np.float32).eps)).astype(np.float32)


@pytest.mark.parametrize("base", [1e-6, 1.0, -3.0, 1e6])
def test_rounding_errors_of_a_constant_loss_are_not_a_trend(base):
    constant = np.full(100, base, np.float32)
    step = np.nextafter(constant, np.float32(np.inf))
    assert (scales(trend_lr(drift=1.0), np.concatenate([constant, step, ulps(base, 200)])) == 1).all()
    # A change of a thousandth is significant.
    changed = constant + np.float32(abs(base) * 1e-3)
    np.testing.assert_allclose(scales(trend_lr(drift=1.0), np.append(constant, changed))[-1], 0.49, rtol=1e-5)


@pytest.mark.parametrize("outlier", [10.0, 1e3, 1e20])
def test_one_outlier_decides_nothing_and_hides_nothing(outlier):
    losses = noisy([1, 1, 1, 1], noise=0.01)
    losses[45] = outlier
    assert (scales(trend_lr(drift=1.0), losses) == 1).all()
    rising = np.concatenate([losses, noisy([1.2], noise=0.01, seed=1)])
    np.testing.assert_allclose(scales(trend_lr(drift=1.0), rising)[-1], 0.49, rtol=1e-5)


@pytest.mark.parametrize("rate", [3e-4, 1e-3])
def test_gradient_descent_on_rosenbrock_converges(rate):
    """Without pauses the rate returns to the largest stable one again and again, and the loss ends at 0.5."""
    tx = optax.chain(optax.sgd(rate), trend_lr())

    def loss_fn(params):
        x, y = params
        return (1 - x) ** 2 + 100 * (y - x**2) ** 2

    def body(carry, _):
        params, state = carry
        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, state = tx.update(grads, state, value=loss)
        return (optax.apply_updates(params, updates), state), loss

    start = (jnp.zeros(()), jnp.zeros(()))
    _, losses = jax.jit(lambda start: jax.lax.scan(body, (start, tx.init(start)), length=10_000))(start)
    assert losses[-200:].max() < 1e-4


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
