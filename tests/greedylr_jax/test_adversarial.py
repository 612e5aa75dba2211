"""All rules under JAX's own checks and with unusual parameters; GreedyLR at its limits in long runs."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import greedylr_jax
from tests.greedylr_jax.greedy_model import GreedyModel
from tests.greedylr_jax.rules import BASE_RATE, RATE_OPTIMIZERS, SCALE_RULES, losses, rule_parameters

HUGE = 2**31 - 1
LARGEST = float(np.finfo(np.float32).max)
TINY = float(np.finfo(np.float32).tiny)

START = {"w": jnp.linspace(-1.0, 1.0, 6), "b": jnp.ones(2)}


def optimizers() -> list:
    """Every rule in an optimizer for ``START``, the zeroth-order ones in both adapters.

    The code of the schedule is the same for all rules, so only the first rule's schedule runs by default.
    """
    table = []
    for parameter in rule_parameters():
        (case,) = parameter.values
        behind = optax.chain(optax.adam(BASE_RATE), case.transformation())
        inside = optax.inject_hyperparams(optax.adam)(learning_rate=case.schedule())
        table.append(pytest.param(behind, id=f"{case.name}-transformation", marks=parameter.marks))
        marks = parameter.marks if case is SCALE_RULES[0] else pytest.mark.slow
        table.append(pytest.param(inside, id=f"{case.name}-schedule", marks=marks))
    return [*table, *(pytest.param(tx, id=name) for name, tx in RATE_OPTIMIZERS.items())]


WITH_ADAM = ("hypergradient-multiplicative", "lr_tuner-taylor")  # Optax's promotes an integer
every_optimizer = pytest.mark.parametrize("tx", optimizers())
every_rate_optimizer = pytest.mark.parametrize("name", RATE_OPTIMIZERS)


def loss_fn(params):
    return sum(jnp.sum(jnp.square(leaf - 0.5)) for leaf in jax.tree.leaves(params))


def make_step(tx):
    tx = optax.with_extra_args_support(tx)

    def step(params, state):
        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, state = tx.update(grads, state, params, value=loss, value_fn=loss_fn)
        return optax.apply_updates(params, updates), state

    return step


@every_optimizer
def test_a_healthy_run_compiles_once_and_never_makes_a_nan(tx):
    """With ``jax.debug_nans`` a NaN in any output of a step raises, including those in its state."""
    chex.clear_trace_counter()  # it counts by the name of the function
    with jax.debug_nans(True):
        step = jax.jit(chex.assert_max_traces(make_step(tx), n=1))
        params, state = START, tx.init(START)
        for _ in range(40):
            params, state = step(params, state)
    assert np.isfinite(loss_fn(params))


@pytest.mark.parametrize("name", [name for name in RATE_OPTIMIZERS if name not in WITH_ADAM])
def test_strict_dtype_promotion_of_rate_optimizers(name):
    with jax.numpy_dtype_promotion("strict"):
        jax.jit(make_step(RATE_OPTIMIZERS[name])).lower(START, RATE_OPTIMIZERS[name].init(START))


# Checking for leaks is slow. Each kind of rule is checked by default.
CHECKED = ("greedy-reference-transformation", "greedy-reference-schedule", "with_rollback", "lr_tuner-fit")


@pytest.mark.parametrize(
    "tx",
    [
        pytest.param(*each.values, id=each.id, marks=each.marks if each.id in CHECKED else pytest.mark.slow)
        for each in optimizers()
    ],
)
def test_nothing_traced_outlives_its_trace(tx):
    with jax.checking_leaks():
        step = jax.jit(make_step(tx))
        params, state = step(START, tx.init(START))
        step(params, state)


@every_rate_optimizer
def test_empty_and_missing_leaves_pass_through(name):
    tx = RATE_OPTIMIZERS[name]
    odd = {"w": {"kernel": START["w"], "none": None, "empty": jnp.zeros((0, 3))}, "b": START["b"]}
    step = jax.jit(make_step(tx))
    params, state = odd, tx.init(odd)
    for _ in range(8):
        params, state = step(params, state)
    assert jax.tree.structure(params) == jax.tree.structure(odd)
    assert params["w"]["empty"].shape == (0, 3)
    assert loss_fn(params) < loss_fn(odd)


@every_rate_optimizer
def test_parameters_without_an_update_are_left_alone(name):
    """Equinox's gradients are None where the model has integer arrays."""
    tx = optax.with_extra_args_support(RATE_OPTIMIZERS[name])

    def run(rest):
        @jax.jit
        def step(trained, state):
            loss, grads = jax.value_and_grad(loss_fn)(trained)
            params = {"w": trained["w"], "b": {"bias": trained["b"]["bias"], "n": rest}}
            value_fn = lambda params: loss_fn((params["w"], params["b"]["bias"]))  # noqa: E731
            updates, state = tx.update(grads, state, params, value=loss, value_fn=value_fn)
            return optax.apply_updates(trained, updates), state

        trained = {"w": START["w"], "b": {"bias": START["b"], "n": None}}
        state = tx.init(trained)
        for _ in range(8):
            trained, state = step(trained, state)
        return trained

    chex.assert_trees_all_equal(run(jnp.arange(3)), run(None))


def test_a_state_of_parameters_without_an_update_is_an_error():
    params = {"w": jnp.ones(2), "n": jnp.arange(3)}
    tx = greedylr_jax.with_rollback(optax.sgd(0.1))
    right_call = r"with_rollback: tx.init was called with other parameters .* \['n'\]. Call tx.init with"
    with pytest.raises(ValueError, match=right_call):
        tx.update({"w": jnp.ones(2), "n": None}, tx.init(params), params, value=1.0)


@every_rate_optimizer
def test_no_parameters_at_all_are_no_error(name):
    tx = RATE_OPTIMIZERS[name]
    empty = {"w": jnp.zeros((0,)), "b": jnp.zeros((0, 2))}
    step = jax.jit(make_step(tx))
    params, state = empty, tx.init(empty)
    for _ in range(3):
        params, state = step(params, state)
    assert all(leaf.size == 0 for leaf in jax.tree.leaves(params))
    read = {
        key: value
        for key, value in greedylr_jax.metrics(state).items()
        if key.startswith(("scale", "learning_rate")) or "/learning_rate" in key
    }
    assert bool(read) == (name != "hypergradient-parameter")  # which has one rate for each element: none
    assert np.isfinite(list(read.values())).all()


SETTINGS = dict(
    factor=0.5,
    patience=1,
    threshold=0.0,
    threshold_mode="abs",
    cooldown=0,
    warmup=0,
    window=None,
    reset_at_min=None,
    reset_after=None,
    mode="min",
    eps=0.0,
    algorithm="reference",
)
LIMITS = [
    {"factor": float(np.nextafter(np.float32(1), np.float32(0)))},
    {"factor": TINY},
    {"patience": 0},
    {"patience": HUGE},
    {"patience": HUGE, "algorithm": "paper"},
    {"threshold": LARGEST},
    {"threshold": LARGEST, "threshold_mode": "rel"},
    {"threshold": 1.0, "threshold_mode": "rel"},
    {"cooldown": HUGE, "patience": 0},
    {"warmup": HUGE, "patience": 0},
    {"cooldown": HUGE, "algorithm": "paper"},
    {"warmup": HUGE, "algorithm": "paper"},
    {"window": 1},
    {"window": 300},
    {"reset_at_min": 1, "patience": 0},
    {"reset_at_min": HUGE, "patience": 0},
    {"reset_after": 1, "patience": 0},
    {"reset_after": HUGE, "patience": 0},
    {"reset_after": 1, "algorithm": "paper"},
    {"eps": LARGEST},
    {"min_learning_rate": BASE_RATE},
    {"max_learning_rate": BASE_RATE},
    {"min_learning_rate": BASE_RATE, "max_learning_rate": BASE_RATE},
    {"min_learning_rate": TINY, "max_learning_rate": LARGEST, "patience": 0},
    {"min_learning_rate": 0.0, "patience": 0},
]


@pytest.mark.filterwarnings("ignore:overflow", "ignore:underflow", "ignore:invalid")
@pytest.mark.parametrize("mode", ["min", pytest.param("max", marks=pytest.mark.slow)])
@pytest.mark.parametrize("limits", LIMITS, ids=str)
def test_each_argument_at_its_limit_follows_the_model(limits, mode):
    settings = (
        SETTINGS
        | {"min_learning_rate": BASE_RATE / 16, "max_learning_rate": BASE_RATE * 16, "mode": mode}
        | limits
    )
    got, expected = both(settings, losses(160))
    np.testing.assert_array_equal(got, expected)
    assert np.isfinite(got).all()


@pytest.mark.parametrize("direction", [-1, 1])
@pytest.mark.parametrize("factor", [0.5, 0.7, 0.999])
def test_a_rate_stays_exactly_at_its_bound_for_long(factor, direction):
    settings = SETTINGS | {
        "min_learning_rate": 0.01,
        "max_learning_rate": 0.3,
        "factor": factor,
        "patience": 0,
    }
    got, _ = both(settings, direction * np.arange(30_000.0), model=False)
    bound = np.float32(0.3 if direction < 0 else 0.01)
    first = np.flatnonzero(got == bound)[0]
    assert first < 4_000
    assert (got[first:] == bound).all()


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("loss", [LARGEST, -LARGEST, TINY, -TINY])
def test_after_extreme_losses_ordinary_ones_count_again(loss, window):
    """A sum of three of the largest numbers overflows; no loss would improve on a best value of -inf."""
    schedule = greedylr_jax.greedy_lr_schedule(
        0.125,
        min_learning_rate=0.01,
        max_learning_rate=8.0,
        factor=0.5,
        patience=0,
        window=window,
        reset_after=20,
    )
    state = schedule.init()
    update = jax.jit(schedule.update)
    for value in [loss] * 12:
        state = update(state, value=value)
        assert not np.isneginf(state.rule_state.rule.best_value)
    for value in np.arange(40, 0, -1):  # the best value is reset meanwhile
        state = update(state, value=value)
    assert schedule(state) > 0.125


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["reference", "paper"])
@pytest.mark.parametrize("window", [None, 50])
def test_a_million_random_losses_follow_the_model(algorithm, window):
    """Settings change every 10,000 losses, so that resets, cooldowns and both bounds occur many times."""
    generator = np.random.default_rng([window or 0, algorithm == "paper"])
    length = 10_000
    for _ in range(100):
        settings = SETTINGS | dict(
            factor=generator.choice([0.5, 0.75, 0.95, 0.99]),
            patience=int(generator.integers(0, 12)),
            threshold=generator.choice([0.0, 1e-6, 2.0**-6]),
            threshold_mode=str(generator.choice(["abs", "rel"])),
            cooldown=int(generator.integers(0, 4)),
            warmup=int(generator.integers(0, 4)),
            window=window,
            reset_after=generator.choice([None, 300, 2_000]),
            mode=str(generator.choice(["min", "max"])),
            algorithm=algorithm,
            min_learning_rate=BASE_RATE / generator.choice([2, 10, 100]),
            max_learning_rate=BASE_RATE * generator.choice([2, 10, 100]),
        )
        if algorithm == "reference":
            settings |= dict(eps=generator.choice([0.0, 1e-3]), reset_at_min=generator.choice([None, 1, 3]))
        else:
            settings |= dict(cooldown=0, warmup=0) if generator.random() < 0.8 else {}
        # Multiples of 1/64 up to 256: sums over the window are exact in any order.
        walk = np.cumsum(generator.choice([-3, -1, 0, 1, 3], length)) + generator.integers(-9, 10, length)
        values = np.clip(walk, -(2**14), 2**14) / 64
        values[generator.random(length) < 0.01] = generator.choice([np.nan, np.inf, -np.inf])
        got, expected = both(settings, values)
        np.testing.assert_array_equal(got, expected, err_msg=str(settings))


def both(settings, values, model=True):
    """The rates of the compiled rule and of the plain model after each value, from ``BASE_RATE``."""
    schedule = greedylr_jax.greedy_lr_schedule(BASE_RATE, **settings)

    def body(state, value):
        state = schedule.update(state, value=value)
        return state, schedule(state)

    values = np.asarray(values, np.float32)
    got = jax.jit(lambda values: jax.lax.scan(body, schedule.init(), values)[1])(values)
    if not model:
        return np.asarray(got), None
    rest = {name: value for name, value in settings.items() if not name.endswith("_learning_rate")}
    plain = GreedyModel(
        rate=BASE_RATE, min_rate=settings["min_learning_rate"], max_rate=settings["max_learning_rate"], **rest
    )
    return np.asarray(got), np.array([plain.observe(value) for value in values])
