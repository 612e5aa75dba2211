"""GreedyLR: hyperparameters, published behaviour, metamorphic relations, cost."""

import dataclasses
import inspect
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import greedylr_jax
from greedylr_jax import get_scale, greedy_lr, greedy_lr_schedule
from tests.greedylr_jax.rules import losses, mostly_slow, scales


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"factor": 0.0}, r"factor must be a number in \(0, 1\), got 0.0"),
        ({"factor": 1.0}, r"factor must be a number in \(0, 1\), got 1.0"),
        ({"factor": np.nan}, "factor must be"),
        ({"factor": "0.5"}, "factor must be"),
        ({"factor": True}, "factor must be"),
        ({"factor": 0.5j}, "factor must be"),
        ({"factor": jnp.array([0.5, 0.9])}, r"factor must be a scalar, got shape \(2,\).*jax.vmap"),
        ({"patience": -1}, r"patience must be an integer in \[0, 2147483647\], got -1"),
        ({"patience": 2**31}, "patience must be"),
        ({"patience": 2.5}, "patience must be"),
        ({"patience": None}, "patience must be"),
        ({"threshold": -1e-6}, r"threshold must be a number in \[0, inf\), got -1e-06"),
        ({"threshold": np.inf}, "threshold must be"),
        ({"threshold_mode": "relative"}, "threshold_mode must be one of 'abs', 'rel', got 'relative'"),
        ({"cooldown": -1}, "cooldown must be"),
        ({"warmup": 1.5}, "warmup must be"),
        ({"min_scale": -0.1}, "min_scale must be"),
        ({"min_scale": np.inf}, r"min_scale must be a number in \[0, inf\), got inf"),
        ({"min_scale": 2.0}, "min_scale must not exceed the initial scale.*min_scale=2.0"),
        ({"min_scale": 20.0}, "min_scale must not exceed max_scale"),
        ({"max_scale": 0.5}, "the initial scale must not exceed max_scale.*max_scale=0.5"),
        ({"max_scale": 0.0, "min_scale": 0.0}, r"max_scale must be a number in \(0, inf\), got 0.0"),
        ({"max_scale": np.inf}, "max_scale must be"),
        ({"window": 0}, r"window must be an integer in \[1, "),
        ({"window": 2.0}, "window must be"),
        ({"reset_at_min": 0}, "reset_at_min must be"),
        ({"reset_after": -3}, "reset_after must be"),
        ({"reset_after": 0}, r"reset_after must be an integer in \[1, "),
        ({"mode": "maximum"}, "mode must be one of 'min', 'max'"),
        ({"mode": None}, "mode must be one of"),
        ({"eps": -1.0}, "eps must be"),
        ({"eps": np.inf}, "eps must be"),
        ({"only_decrease": 1}, "only_decrease must be True or False, known before tracing, got 1"),
        ({"algorithm": "algorithm1"}, "algorithm must be one of 'reference', 'paper'"),
        (
            {"algorithm": "paper", "reset_at_min": 3},
            r"^reset_at_min must be None.*, got 3: Algorithm 1 resets by count \(reset_after\)",
        ),
        ({"algorithm": "paper", "eps": 1e-8}, "^eps must be 0 with algorithm='paper', got 1e-08"),
    ],
)
def test_a_bad_hyperparameter_is_named_with_its_value_and_range(settings, message):
    with pytest.raises(ValueError, match=message):
        greedy_lr(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"init_value": 0.0}, r"init_value must be a number in \(0, inf\)"),
        ({"init_value": 1e-6}, "min_learning_rate must not exceed init_value"),
        ({"init_value": 1.0}, "init_value must not exceed max_learning_rate"),
        ({"min_learning_rate": 0.5}, "min_learning_rate must not exceed max_learning_rate"),
        ({"max_learning_rate": np.nan}, "max_learning_rate must be"),
    ],
)
def test_bad_bounds_of_the_schedule_are_named(settings, message):
    arguments = {"init_value": 1e-3, "min_learning_rate": 1e-4, "max_learning_rate": 1e-2} | settings
    with pytest.raises(ValueError, match=message):
        greedy_lr_schedule(**arguments)


def test_a_traced_window_is_refused():
    with pytest.raises(ValueError, match="window fixes the shape"):
        jax.jit(lambda window: greedy_lr(window=window).init(None))(3)


@pytest.mark.parametrize("number", [np.float32(0.5), np.float64(0.5), jnp.float32(0.5), jnp.array(0.5)])
def test_hyperparameters_may_be_any_kind_of_scalar(number):
    patience = jnp.int32(2)
    expected = scales(greedy_lr(0.5, 2, window=2, cooldown=1), losses())
    assert np.ptp(expected) > 0
    got = scales(greedy_lr(number, patience, window=np.int64(2), cooldown=np.int8(1)), losses())
    np.testing.assert_array_equal(got, expected)


def test_a_grid_of_settings_trains_in_one_compilation():
    values = losses(200)
    factors, patiences = np.array([0.5, 0.75, 0.9, 0.95], np.float32), np.arange(5)

    @jax.jit
    def run(factor, patience, threshold):
        tx = greedy_lr(factor, patience, threshold=threshold, cooldown=patience, reset_at_min=patience + 1)

        def body(state, value):
            _, state = tx.update(None, state, value=value)
            return state, get_scale(state)

        return jax.lax.scan(body, tx.init(None), values)[1]

    over_patience = jax.vmap(run, in_axes=(None, 0, None))
    got = jax.jit(jax.vmap(over_patience, in_axes=(0, None, None)))(factors, patiences, 1 / 64)
    assert got.shape == (4, 5, 200)
    for i, factor in enumerate(factors):
        for j, patience in enumerate(patiences):
            expected = run(factor, patience, 1 / 64)
            np.testing.assert_array_equal(got[i, j], expected)
            if i != j:
                continue
            settings = dict(cooldown=int(patience), reset_at_min=int(patience) + 1)
            known = greedy_lr(float(factor), int(patience), threshold=1 / 64, **settings)
            np.testing.assert_array_equal(scales(known, values), expected)
    assert run._cache_size() == 1


DEFAULTS = dict(
    factor=0.95,
    patience=10,
    threshold=1e-6,
    threshold_mode="abs",
    cooldown=0,
    warmup=0,
    window=50,
    reset_at_min=None,
    reset_after=None,
    mode="min",
    eps=0.0,
    algorithm="reference",
    only_decrease=False,
    every=1,
    axis_name=None,
)


@pytest.mark.parametrize(
    ("factory", "bounds"),
    [(greedy_lr, dict(min_scale=0.1, max_scale=10.0)), (greedy_lr_schedule, {})],
)
def test_defaults_are_the_documented_ones(factory, bounds):
    parameters = inspect.signature(factory).parameters
    given = {name: each.default for name, each in parameters.items() if each.default is not each.empty}
    assert given == DEFAULTS | bounds


def test_published_settings_are_the_defaults():
    """Section III of paper 000: factor 0.95, patience 10, window 50, at least 10% of the first rate."""
    falling = np.linspace(2, 1, 400)
    expected = min((1 / 0.95) ** (400 // 11), 10.0)  # every 11th improvement in a row raises the rate
    np.testing.assert_allclose(scales(greedy_lr(), falling)[-1], expected, rtol=1e-5)
    rising = np.linspace(1, 2, 2000)
    np.testing.assert_allclose(scales(greedy_lr(), rising)[-1], 0.1, rtol=1e-6)


@pytest.mark.parametrize("algorithm", ["reference", "paper"])
def test_a_constant_loss_lowers_the_rate(algorithm):
    got = scales(greedy_lr(0.5, 2, window=None, algorithm=algorithm), np.ones(9))
    # The first loss improves on infinity; the third repetition exceeds the patience of 2.
    cuts = {
        "reference": [1, 1, 1, 0.5, 0.5, 0.5, 0.25, 0.25, 0.25],
        "paper": [1, 1, 1, 0.5, 0.25, 0.125] + [0.1] * 3,
    }
    np.testing.assert_allclose(got, cuts[algorithm])


def test_paper_with_a_cooldown_never_raises_and_with_a_warmup_never_lowers():
    settings = dict(patience=1, window=None, algorithm="paper")
    falling, rising = -np.arange(100.0), np.arange(100.0)
    assert (scales(greedy_lr(cooldown=2, **settings), falling) == 1).all()
    assert (scales(greedy_lr(warmup=2, **settings), rising) == 1).all()
    assert scales(greedy_lr(**settings), falling)[-1] == 10
    np.testing.assert_allclose(scales(greedy_lr(**settings), rising)[-1], 0.1)


def test_a_cooldown_holds_for_exactly_that_many_losses():
    got = scales(greedy_lr(0.5, 0, cooldown=3, window=None, min_scale=0.0), np.ones(14))
    lowered = np.flatnonzero(np.diff(got)) + 1
    np.testing.assert_array_equal(np.diff(lowered), 4)


@pytest.mark.parametrize(
    ("best", "worse", "better"),
    [(-10.0, (-9.5, -10.5, -10.99), -11.01), (10.0, (9.5, 9.01), 8.99), (0.0, (0.0, 1e-3), -1e-3)],
)
def test_a_relative_threshold_is_a_fraction_of_the_best_value_whatever_its_sign(best, worse, better):
    """From -10, a threshold of 10% requires less than -11; the published formula accepts -9.5."""
    tx = greedy_lr(patience=0, threshold=0.1, threshold_mode="rel", window=None)
    _, state = tx.update(None, tx.init(None), value=best)
    for value, improves in [*((value, False) for value in worse), (better, True)]:
        _, after = tx.update(None, state, value=value)
        assert bool(get_scale(after) > get_scale(state)) is improves, value


@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.0, 2.0])
def test_the_first_loss_improves_whatever_the_threshold(threshold):
    for mode in ("abs", "rel"):
        tx = greedy_lr(patience=0, threshold=threshold, threshold_mode=mode, window=None)
        _, state = tx.update(None, tx.init(None), value=5.0)
        assert get_scale(state) > 1


def test_a_schedule_is_compared_by_identity_and_is_immutable():
    """Flax and ``jax.jit`` treat it as static, and so hash it, even if one of its numbers is traced."""

    def make(init_value):
        schedule = greedy_lr_schedule(init_value, min_learning_rate=1e-4, max_learning_rate=1e-2)
        assert schedule in {schedule}
        return schedule.init()

    jax.jit(make)(1e-3)
    schedule = greedy_lr_schedule(1e-3, min_learning_rate=1e-4, max_learning_rate=1e-2)
    assert schedule != dataclasses.replace(schedule)
    with pytest.raises(dataclasses.FrozenInstanceError):
        schedule.every = 2


METAMORPHIC = [
    dict(window=None),
    dict(window=4),
    dict(window=4, algorithm="paper"),
    dict(window=None, cooldown=2, warmup=1, reset_at_min=2),
]


@pytest.mark.parametrize("settings", METAMORPHIC)
def test_negating_losses_and_flipping_the_mode_changes_nothing(settings):
    for threshold_mode in ("abs", "rel"):
        options = dict(factor=0.5, patience=1, threshold=1 / 16, threshold_mode=threshold_mode) | settings
        expected = scales(greedy_lr(mode="min", **options), losses(200))
        assert np.ptp(expected) > 0
        got = scales(greedy_lr(mode="max", **options), -losses(200))
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("settings", METAMORPHIC)
def test_scaling_losses_changes_nothing_with_a_relative_threshold(settings):
    options = dict(factor=0.5, patience=1, threshold=1 / 16, threshold_mode="rel") | settings
    expected = scales(greedy_lr(**options), losses(200))
    assert np.ptp(expected) > 0
    for power in (-40, 3, 60):
        np.testing.assert_array_equal(scales(greedy_lr(**options), losses(200) * 2.0**power), expected)


@pytest.mark.parametrize("settings", METAMORPHIC)
def test_shifting_losses_changes_nothing_with_an_absolute_threshold(settings):
    options = dict(factor=0.5, patience=1, threshold=1 / 16) | settings
    expected = scales(greedy_lr(**options), losses(200))
    assert np.ptp(expected) > 0
    np.testing.assert_array_equal(scales(greedy_lr(**options), losses(200) + 1024), expected)


WINDOWS = [2, 7, 8, 9, 15, 16, 17, 50, 127, 128, 129, 300]


def best_of_falling(tx, length):
    """The best value after falling losses, which is the last mean; and the losses, whose sums are exact."""
    values = np.arange(length, 0, -1, dtype=np.float32) ** 2
    state, _ = jax.lax.scan(
        lambda state, loss: (tx.update(None, state, value=loss)[1], None), tx.init(None), values
    )
    return state.rule.best_value, values


@pytest.mark.parametrize("window", WINDOWS)
def test_the_mean_is_that_of_the_last_losses_whatever_the_window(window):
    best, values = best_of_falling(greedy_lr(window=window), 3 * window)
    assert best == np.float32(values[-window:].sum() / np.float32(window))


@pytest.mark.parametrize("window", mostly_slow(WINDOWS, *WINDOWS[::4]))
def test_after_a_reset_the_mean_is_that_of_the_losses_since(window):
    for since in {1, window // 2 + 1, window, window + 1}:
        best, values = best_of_falling(
            greedy_lr(window=window, reset_after=2 * window), 2 * window + 1 + since
        )
        counted = min(since, window)
        assert best == np.float32(values[-counted:].sum() / np.float32(counted))


def test_the_mean_recovers_from_a_bad_loss_at_once():
    """A running sum, as in the published implementation, would stay NaN."""
    values = np.array([4.0, np.nan, 3.0, 2.0, 1.0, np.inf, 0.5], np.float32)
    tx = greedy_lr(window=2)
    state = tx.init(None)
    for value in values:
        _, state = tx.update(None, state, value=value)
    np.testing.assert_array_equal(np.sort(state.rule.history.values), [0.5, 1.0])
    assert state.rule.best_value == 0.75


@pytest.mark.parametrize("algorithm", ["reference", "paper"])
def test_a_loss_that_is_not_finite_is_worse_even_if_the_mean_without_it_is_the_best(algorithm):
    tx = greedy_lr(patience=0, window=2, algorithm=algorithm)
    state = tx.init(None)
    _, state = tx.update(None, state, value=2.0)
    state = state._replace(rule=state.rule._replace(best_value=jnp.float32(3.0)))
    for value in (np.nan, np.inf, -np.inf):
        _, after = tx.update(None, state, value=value)
        assert after.rule.best_value == 3.0 and after.rule.scale < state.rule.scale


def test_a_rate_with_a_minimum_of_zero_can_increase_again():
    """Below the smallest normal number rates would be flushed to zero, and stay there."""
    values = np.concatenate([np.ones(300), -np.arange(300)]).astype(np.float32)
    got = scales(greedy_lr(0.5, 0, window=None, min_scale=0.0), values)
    assert got.min() == np.finfo(np.float32).tiny
    assert got[-1] == 10


def test_metrics_show_counts_that_a_change_of_rate_resets():
    tx = greedy_lr(0.5, patience=1, window=None)
    state, seen = tx.init(None), []
    for value in (3.0, 2.0, 1.0, 1.0, 1.0, 1.0):
        _, state = tx.update(None, state, value=value)
        shown = greedylr_jax.metrics(state)
        seen.append([int(shown[name]) for name in ("num_good", "num_bad")])
    assert seen == [[1, 0], [0, 0], [1, 0], [0, 1], [0, 0], [0, 1]]


@pytest.mark.parametrize("algorithm", ["reference", "paper"])
@pytest.mark.parametrize("value", [1.0, -1.0])
def test_counts_saturate(algorithm, value):
    huge = 2**31 - 1
    tx = greedy_lr(patience=huge, window=None, algorithm=algorithm, reset_after=huge)
    state = tx.init(None)
    count = "num_bad" if value > 0 else "num_good"
    rule = state.rule._replace(**{count: jnp.int32(huge - 2), "num_observations": jnp.int32(huge - 1)})
    state = state._replace(rule=rule._replace(best_value=jnp.float32(0.0)))
    for step in range(3):
        _, state = tx.update(None, state, value=value * (step + 1))
    assert state.rule.num_observations == huge
    assert state.rule.num_bad == (huge if value > 0 else 0)
    assert state.rule.num_good == (huge if value < 0 else 0)
    assert get_scale(state) == 1


def test_the_counts_of_a_chain_are_scalars_of_its_state():
    tx = optax.chain(optax.adamw(1e-3), greedy_lr(patience=3))
    params = jnp.ones(2)
    _, state = tx.update(params, tx.init(params), params, value=1.0)
    for name, value in {"num_good": 1, "num_bad": 0, "best_value": 1.0, "scale": 1.0, "count": 1}.items():
        assert optax.tree.get(state, name) == value
    for name, value in {"num_good": 1, "num_bad": 0, "best_value": 1.0, "scale": 1.0}.items():
        assert greedylr_jax.metrics(state)[name] == value


@pytest.mark.parametrize("schedule", [greedy_lr_schedule, greedylr_jax.trend_lr_schedule])
def test_old_names_of_the_bounds_warn(schedule):
    with pytest.warns(DeprecationWarning) as caught:
        old = schedule(0.1, min_value=0.01, max_value=1.0)
    assert [str(warning.message).split("the argument ")[1] for warning in caught] == [
        "min_value is now min_learning_rate.",
        "max_value is now max_learning_rate.",
    ]
    new = schedule(0.1, min_learning_rate=0.01, max_learning_rate=1.0)
    assert old(old.init(), value=1.0) == new(new.init(), value=1.0)
    with pytest.raises(TypeError, match="got both min_learning_rate and its old name min_value"):
        schedule(0.1, min_value=0.01, min_learning_rate=0.01, max_learning_rate=1.0)


@pytest.mark.parametrize("value", [1e-45, 1e-39, 3.4e38, -3.4e38, 0.0, -0.0])
def test_extreme_losses_keep_the_state_finite(value):
    tx = greedy_lr(patience=0, window=3)
    state = tx.init(None)
    for _ in range(5):
        _, state = tx.update(None, state, value=value)
        assert np.isfinite(get_scale(state)) and not np.isnan(state.rule.best_value)


def mlp_step(tx):
    """A compiled training step of a two-million-parameter MLP, which also returns the loss."""
    sizes = (784, 1024, 1024, 256, 10)
    shapes = [((rows, columns), (columns,)) for rows, columns in itertools.pairwise(sizes)]
    params = [tuple(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in pair) for pair in shapes]

    def loss_fn(params, x, y):
        for weights, bias in params[:-1]:
            x = jax.nn.relu(x @ weights + bias)
        logits = x @ params[-1][0] + params[-1][1]
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    def step(params, state, x, y):
        loss, grads = jax.value_and_grad(loss_fn)(params, x, y)
        updates, state = tx.update(grads, state, params, value=loss)
        return optax.apply_updates(params, updates), state, loss

    x, y = jax.ShapeDtypeStruct((64, 784), jnp.float32), jax.ShapeDtypeStruct((64,), jnp.int32)
    state = jax.eval_shape(tx.init, params)
    return jax.jit(step).lower(params, state, x, y).compile()


def test_the_rule_adds_at_most_4_kb_of_memory_traffic_to_a_step():
    adamw = optax.with_extra_args_support(optax.adamw(1e-3))
    bare = mlp_step(adamw).cost_analysis()["bytes accessed"]
    for rule in (greedy_lr(window=50), greedy_lr(window=50, cooldown=5, warmup=5, reset_at_min=5)):
        with_rule = mlp_step(greedylr_jax.chain(rule, adamw)).cost_analysis()["bytes accessed"]
        assert 0 <= with_rule - bare <= 4096


@pytest.mark.parametrize(("eps", "moves"), [(0.125, False), (0.1249, True)])
def test_a_change_must_exceed_eps(eps, moves):
    """From 0.25 with a factor of 0.5 an increase adds 0.25, a cut subtracts 0.125; equality is not enough."""
    settings = dict(min_learning_rate=0.01, max_learning_rate=1.0, factor=0.5, patience=0, window=None)
    cut = greedy_lr_schedule(0.25, eps=eps, **settings)
    state = cut.update(cut.init(), value=jnp.nan)
    assert cut(state) == (0.125 if moves else 0.25)
    raised = greedy_lr_schedule(0.25, eps=2 * eps, **settings)
    state = raised.update(raised.init(), value=1.0)
    assert raised(state) == (0.5 if moves else 0.25)
