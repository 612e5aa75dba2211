"""The compiled rule against the plain-Python model, on random settings and losses."""

import functools
import math

import jax
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import greedylr_jax
from tests.greedylr_jax.greedy_model import GreedyModel

LENGTH = 48  # the same for all: one compilation per window
WINDOWS = [None, 3, 8, 21]  # 21: two whole blocks and five more values
NEVER = 2**31 - 1  # in place of None: one program for runs with and without resets
STATIC = ("window", "mode", "threshold_mode", "algorithm", "only_decrease")
NOT_FINITE = [math.nan, math.inf, -math.inf]

pytestmark = pytest.mark.filterwarnings("ignore:overflow", "ignore:underflow")


@functools.partial(jax.jit, static_argnames=STATIC)
def run_rule(losses, init_value, numbers, *, window, mode, threshold_mode, algorithm, only_decrease):
    schedule = greedylr_jax.greedy_lr_schedule(
        init_value,
        window=window,
        mode=mode,
        threshold_mode=threshold_mode,
        algorithm=algorithm,
        only_decrease=only_decrease,
        **numbers,
    )

    def body(state, loss):
        state = schedule.update(state, value=loss)
        return state, state.rule_state.rule

    return jax.lax.scan(body, schedule.init(), losses)[1]


@st.composite
def cases(draw):
    window = draw(st.sampled_from(WINDOWS))
    if window is None:
        # Nothing is averaged, so every float32 must be handled exactly, except near the subnormal range:
        # XLA flushes subnormal numbers to zero, NumPy does not.
        finite = st.floats(-1e4, 1e4, width=32).map(lambda x: x if abs(x) > 1e-30 else 0.0)
    else:
        # Multiples of 1/64 in [-64, 64]: sums over the window are exact in any order.
        finite = st.integers(-4096, 4096).map(lambda n: n / 64)
    trend = draw(st.sampled_from(["any", "falling", "rising", "few values"]))
    losses = draw(st.lists(finite | st.sampled_from(NOT_FINITE), min_size=LENGTH, max_size=LENGTH))
    if trend in ("falling", "rising"):
        losses = sorted(losses, key=lambda loss: -math.inf if math.isnan(loss) else loss)
        losses = losses if trend == "rising" else losses[::-1]
    elif trend == "few values":
        choices = draw(st.lists(finite | st.sampled_from(NOT_FINITE), min_size=1, max_size=3))
        losses = [choices[i % len(choices)] for i in range(LENGTH)]
    algorithm = draw(st.sampled_from(["reference", "paper"]))
    reference = algorithm == "reference"
    floor = draw(st.sampled_from([0.0, 2.0**-6, 0.05, 0.1]))
    numbers = dict(
        factor=draw(st.sampled_from([0.5, 0.75, 0.95, 0.1, 0.999])),
        patience=draw(st.integers(0, 5)),
        threshold=draw(st.sampled_from([0.0, 1e-6, 2.0**-6, 0.5, 1.0, 2.0])),
        cooldown=draw(st.integers(0, 4)),
        warmup=draw(st.integers(0, 4)),
        min_learning_rate=floor,
        max_learning_rate=draw(st.sampled_from([0.1, 0.25, 8.0])),
    )
    if reference:
        numbers["eps"] = draw(st.sampled_from([0.0, 1e-4, 0.05]))
    resets = {"reset_after": draw(st.none() | st.integers(1, 30))}
    if reference:
        resets["reset_at_min"] = draw(st.none() | st.integers(1, 4))
    return dict(
        losses=losses,
        numbers=numbers,
        resets=resets,
        window=window,
        mode=draw(st.sampled_from(["min", "max"])),
        threshold_mode=draw(st.sampled_from(["abs", "rel"])),
        algorithm=algorithm,
        only_decrease=window is None and draw(st.booleans()),  # fewer programs to compile
    )


TO_ZERO = dict(
    losses=[0.0] * LENGTH,
    numbers=dict(
        factor=0.1,
        patience=0,
        threshold=0.0,
        cooldown=0,
        warmup=0,
        min_learning_rate=0.0,
        max_learning_rate=0.1,
    ),
    resets={"reset_after": None},
    window=None,
    mode="min",
    threshold_mode="abs",
    algorithm="paper",
    only_decrease=False,
)


@settings(max_examples=60, deadline=None)
@given(cases())
@example(TO_ZERO)
def test_rule_equals_the_plain_python_model(case):
    compare(case)


@pytest.mark.slow
@settings(max_examples=2000, deadline=None)
@given(cases())
def test_rule_equals_the_plain_python_model_on_many_more(case):
    compare(case)


def compare(case):
    init_value = 0.1
    numbers, resets = case["numbers"], case["resets"]
    model = GreedyModel(
        rate=init_value,
        **{name: numbers[name] for name in ("factor", "patience", "threshold", "cooldown", "warmup")},
        min_rate=numbers["min_learning_rate"],
        max_rate=numbers["max_learning_rate"],
        reset_at_min=resets.get("reset_at_min"),
        reset_after=resets["reset_after"],
        eps=numbers.get("eps", 0.0),
        **{name: case[name] for name in STATIC},
    )
    expected = []
    for loss in case["losses"]:
        model.observe(loss)
        expected.append((model.rate, model.best, model.good, model.bad, model.cooling, model.warming))

    resets = {name: NEVER if value is None else value for name, value in resets.items()}
    got = run_rule(
        np.array(case["losses"], np.float32),
        init_value,
        numbers | resets,
        **{name: case[name] for name in STATIC},
    )
    names = ("scale", "best_value", "num_good", "num_bad", "cooldown_count", "warmup_count")
    for name, column in zip(names, zip(*expected, strict=True), strict=True):
        np.testing.assert_array_equal(getattr(got, name), np.array(column), err_msg=name)
