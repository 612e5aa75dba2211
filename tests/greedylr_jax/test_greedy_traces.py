"""GreedyLR against recorded runs of the published implementation and of Algorithm 1."""

from collections import defaultdict

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import greedylr_jax
from tests.greedylr_jax.rules import thinned
from tests.reference_data import read_fixtures, read_full

FILES = {"reference": "greedylr_transformers.jsonl", "paper": "greedylr_algorithm1.jsonl"}
COUNTS = {
    "num_good": "num_good",
    "num_bad": "num_bad",
    "cooldown_counter": "cooldown_count",
    "warmup_counter": "warmup_count",
}


def read_traces():
    traces = [trace | {"full": False} for trace in read_fixtures("greedy_traces.json")]
    for algorithm, name in FILES.items():
        traces += [trace | {"algorithm": algorithm, "full": True} for trace in read_full(f"greedylr/{name}")]
    return traces


TRACES = read_traces()
EXACT = [trace for trace in TRACES if trace["exact_in_float32"]]


def static_settings(trace):
    config = trace["config"]
    return dict(
        algorithm=trace["algorithm"],
        mode=config.get("mode", "min"),
        threshold_mode=config.get("threshold_mode", "abs"),
        window=config["window_size"] if config["smooth"] else None,
    )


def numeric_settings(trace):
    config = trace["config"]
    numbers = {name: config[name] for name in ("factor", "patience", "threshold", "cooldown", "warmup")}
    numbers |= {"min_learning_rate": config["min_lr"], "max_learning_rate": config["max_lr"]}
    if trace["algorithm"] == "reference":
        numbers |= {"eps": config["eps"], "reset_at_min": config["reset_start"]}
    elif config["reset"]:
        numbers["reset_after"] = config["reset"]
    return numbers


def rule_history(static, numbers, init_value, metrics):
    schedule = greedylr_jax.greedy_lr_schedule(init_value, **static, **numbers)

    def body(state, metric):
        state = schedule.update(state, value=metric)
        return state, state.rule_state.rule._replace(history=0)

    return jax.lax.scan(body, schedule.init(), metrics)[1]


def steps_to_compare(trace):
    """All steps, except for a documented departure from the source.

    The source writes a relative threshold as best * (1 - threshold), which puts the bound on the worse
    side of a negative best; the runs differ from the first negative best value on.
    """
    config = trace["config"]
    if config.get("threshold_mode") == "rel" and config["threshold"] > 0:
        negative = np.array(trace["best"], float) < 0
        finite = np.isfinite(np.array(trace["best"], float))
        if (negative & finite).any():
            return int(np.argmax(negative & finite))
    return len(trace["metrics"])


# With a negative loss first, the departure leaves no step to compare.
COMPARABLE = [trace for trace in TRACES if steps_to_compare(trace) > 0]


def assert_equal_counts(history, trace, steps):
    for theirs, ours in COUNTS.items():
        got = getattr(history, ours)[:steps]
        np.testing.assert_array_equal(got, trace[theirs][:steps], err_msg=f"{trace['id']} {ours}")
    if trace["algorithm"] == "reference":
        np.testing.assert_array_equal(history.reset_countdown[:steps], trace["reset_start"][:steps])


def test_the_fixtures_cover_both_algorithms_resets_and_the_departure():
    fixtures = [trace for trace in TRACES if not trace["full"]]
    assert {trace["algorithm"] for trace in fixtures} == {"reference", "paper"}
    assert any(trace["resets"] for trace in fixtures)
    steps = np.array([steps_to_compare(trace) for trace in fixtures])
    lengths = np.array([len(trace["metrics"]) for trace in fixtures])
    assert ((steps > 0) & (steps < lengths)).sum() == 2
    assert (steps == 0).sum() == 3


def in_bounds(trace):
    config = trace["config"]
    return config["min_lr"] <= trace["init_lr"] <= config["max_lr"]


def assert_equal_bits(history, trace):
    steps = len(trace["metrics"])
    np.testing.assert_array_equal(history.scale[:steps], np.array(trace["lr"]), err_msg=trace["id"])
    best = np.array(trace["best"], float).astype(np.float32)
    np.testing.assert_array_equal(history.best_value[:steps], best)
    assert_equal_counts(history, trace, steps)


@pytest.mark.parametrize(
    "trace",
    [pytest.param(trace, marks=pytest.mark.slow if trace["full"] else []) for trace in EXACT],
    ids=lambda trace: f"{trace['algorithm']}-{trace['id']}",
)
def test_known_settings_equal_the_trace_bit_for_bit(trace):
    """With constant settings, for which the compiled program differs from that for traced ones."""
    static, numbers = static_settings(trace), numeric_settings(trace)
    if not in_bounds(trace):  # a departure: an error; in the source the rate drifts back
        with pytest.raises(ValueError, match="init_value"):
            greedylr_jax.greedy_lr_schedule(trace["init_lr"], **static, **numbers)
        return
    metrics = jnp.array(trace["metrics"], jnp.float32)
    assert_equal_bits(rule_history(static, numbers, trace["init_lr"], metrics), trace)


def group_by_program(traces):
    """Traces that can share one compilation: same static settings and optional resets.

    Without those of the published implementation that start out of bounds, from where their rate drifts back.
    """
    groups = defaultdict(list)
    for trace in traces:
        if trace["algorithm"] == "reference" and not in_bounds(trace):
            continue
        key = (*static_settings(trace).items(), tuple(numeric_settings(trace)), trace["full"])
        groups[key].append(trace)
    return list(groups.values())


def run_group(traces):
    """The histories of traces that share a program, under one vmap.

    Initial rates are traced, too, and so may lie outside their bounds, as Algorithm 1 allows.
    """
    length = max(len(trace["metrics"]) for trace in traces)
    padded = [np.pad(trace["metrics"], (0, length - len(trace["metrics"]))) for trace in traces]
    settings = [numeric_settings(trace) for trace in traces]
    numbers = {name: np.array([numeric[name] for numeric in settings]) for name in settings[0]}
    start = np.array([trace["init_lr"] for trace in traces])
    static = static_settings(traces[0])
    run = jax.jit(jax.vmap(lambda *arguments: rule_history(static, *arguments)))
    histories = jax.device_get(run(numbers, start, np.array(padded, float)))
    return [jax.tree.map(lambda field, row=row: field[row], histories) for row in range(len(traces))]


def with_slow_full_set(traces):
    """Parameters of a test: the fixtures by default, the full set with slow tests."""
    return [
        pytest.param(
            group,
            marks=pytest.mark.slow if group[0]["full"] else [],
            id=f"{group[0]['algorithm']}-{group[0]['id']}",
        )
        for group in group_by_program(traces)
    ]


@pytest.mark.parametrize("traces", with_slow_full_set(EXACT))
def test_float32_runs_equal_the_traces_bit_for_bit(traces):
    for history, trace in zip(run_group(traces), traces, strict=True):
        assert_equal_bits(history, trace)


@pytest.mark.parametrize("traces", thinned(with_slow_full_set(COMPARABLE), 2))
def test_float64_runs_equal_the_traces_to_1e_12(traces):
    with jax.enable_x64(True):
        histories = run_group(traces)
    for history, trace in zip(histories, traces, strict=True):
        steps = steps_to_compare(trace)
        np.testing.assert_allclose(
            history.scale[:steps], trace["lr"][:steps], rtol=1e-12, atol=0, err_msg=trace["id"]
        )
        # The source's best value carries the rounding drift of its running sum.
        best, largest = np.array(trace["best"][:steps], float), np.abs(trace["metrics"]).max()
        np.testing.assert_allclose(history.best_value[:steps], best, rtol=1e-9, atol=1e-9 * largest)
        assert_equal_counts(history, trace, steps)
