"""The study of rules without a learning rate: its arithmetic, its selection, and a small call of it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import polars as pl
import pytest
from rich.console import Console

from experiments.errors import UsageError
from experiments.studies import initial_rate
from experiments.studies.base import Job, Selection
from experiments.studies.initial_rate import REFERENCE, RULES, Measured
from experiments.tasks import make_task
from experiments.tasks.suite import SUITE, half
from experiments.training.engine import Engine, RunSpec, Settings
from experiments.training.schedules import parse
from tests.experiments.figures import assert_is_drawn, lines_of


def measured(measure="accuracy", best=0.9, **rules):
    """The reference is best at its third rate; every rule has the same value at three seeds, or a list."""
    reference = np.full((len(REFERENCE), 3), best + (0.5 if measure == "loss" else -0.5))
    reference[0] = np.nan
    reference[2] = best
    rates = np.array([1e-3 * rule.rate for rule in REFERENCE])
    values = {name: np.broadcast_to(np.array(value, float), 3) for name, value in rules.items()}
    return Measured("task", measure, rates, reference, values)


@pytest.mark.parametrize(
    ("measure", "best", "value", "gap", "outcome"),
    [
        ("accuracy", 0.9, 0.86, 2.0, "worse"),
        ("accuracy", 0.9, 0.89, 0.5, "equal"),
        ("accuracy", 0.9, 0.93, -1.5, "better"),
        ("loss", 2.0, 2.2, 1.0, "equal"),  # by exactly one tolerance
        ("loss", -2.0, -1.0, 5.0, "worse"),
        ("loss", 2.0, np.nan, np.inf, "worse"),
        ("return", 0.5, 0.6, -2.0, "better"),
        ("return", -0.5, -0.6, 2.0, "worse"),
        ("loss", 0.0, 0.0, 0.0, "equal"),
    ],
)
def test_a_gap_is_in_tolerances_and_positive_if_worse(measure, best, value, gap, outcome):
    (row,) = initial_rate.gaps([measured(measure, best, auto=value)]).iter_rows(named=True)
    assert row["gap"] == pytest.approx(gap) and row["outcome"] == outcome
    assert row["reference"] == best and row["best_rate"] == pytest.approx(1e-3)


def test_rules_are_counted_with_intervals_over_the_seeds():
    every = [
        measured(auto=0.93, dog=0.9),
        measured(auto=[0.9, 0.8, 0.9], dog=0.8),  # two seeds equal, one worse
        measured("loss", 1.0, auto=2.0, dog=1.0),
    ]
    auto, dog = initial_rate.summarize(every).iter_rows(named=True)
    assert [auto[name] for name in ("tasks", "within", "better", "equal", "worse")] == [3, 2, 1, 1, 1]
    # A bootstrap sample of three has a median of 0.8 with a probability of 7/27.
    assert (auto["within_low"], auto["within_high"]) == (1, 2)
    assert (auto["better_low"], auto["better_high"]) == (1, 1)
    assert auto["mean"] == pytest.approx((-1.5 + 0 + 3) / 3)  # a gap of 10 is clipped to 3
    assert auto["mean_low"] < auto["mean"] < auto["mean_high"]
    assert auto["worst"] == pytest.approx(10.0)
    assert auto["auto_better"] is None
    assert (dog["auto_better"], dog["auto_equal"], dog["auto_worse"]) == (2, 0, 1)


def test_a_figure_has_a_line_for_each_task_and_a_profile_for_each_rule():
    every = [measured(auto=0.93, dog=0.9), measured(auto=0.85, dog=0.7)]
    left, right = initial_rate.draw(every).axes
    assert len(left.lines) == 2 + 2  # their median and the tolerance
    x, fractions = lines_of(right)["auto_lr"]
    assert (fractions[x < -1.6] == 0).all() and (fractions[(x > -1.4) & (x < 2.4)] == 0.5).all()
    assert fractions[-1] == 1.0


def test_the_selection_is_a_half_or_named_entries():
    whole = initial_rate.select("full", Selection())
    assert whole.entries == half("development") and whole.steps == [250, 1000, 5000]
    assert [rule.name for rule in whole.rules] == list(RULES)
    held_out = initial_rate.select("quick", Selection(split="held-out", rule="auto,dog", steps="100"))
    assert held_out.entries == half("held-out") and held_out.steps == [100]
    assert [rule.name for rule in held_out.rules] == ["auto", "dog"]
    named = initial_rate.select("quick", Selection(task="wine-logistic"))
    assert named.entries == [SUITE["wine-logistic"]]
    assert not {entry.half for entry in initial_rate.select("quick", Selection()).entries} - {"development"}


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        (Selection(split="both"), "--split must be one of development, held-out"),
        (Selection(split="development", task="wine-logistic"), "--task must be one or more of"),
        (Selection(rule="adam"), "--rule must be one or more of cosine-1e-3,"),
        (Selection(steps="10"), "--steps must be integers of at least 20, got '10'"),
        (Selection(steps="1e3"), "--steps must be integers of at least 20, got '1e3'"),
    ],
)
def test_a_selection_of_nothing_is_an_error(selection, message):
    with pytest.raises(UsageError, match=message):
        initial_rate.select("quick", selection)


def test_rates_have_the_unit_of_the_parameters_where_a_rule_has_one():
    task = make_task("mnist1d-parameters-1e6")
    assert RULES["cosine-1e-2"].learning_rate(task, "adamw") == pytest.approx(1e4)
    assert RULES["cosine-1e-2"].learning_rate(task, "lion") == pytest.approx(1e3)
    assert RULES["schedule-free"].learning_rate(task, "lion") == pytest.approx(2.5e3)
    assert RULES["prodigy"].learning_rate(task, "adamw") == 1.0


def test_a_variant_with_the_settings_of_auto_lr_is_auto_lr():
    def updates_of(schedule):
        entry, settings = parse(schedule)
        tx = entry.optimizer(optax.sgd(1.0, momentum=0.9), 1.0, 100, **settings)

        def body(state, gradient):
            updates, state = tx.update(gradient, state, jnp.ones(3))
            return state, updates

        gradients = jax.random.normal(jax.random.key(0), (100, 3))
        return jax.lax.scan(body, tx.init(jnp.ones(3)), gradients)[1]

    variant = initial_rate.VARIANTS["relative-0.03-30"].schedule
    np.testing.assert_allclose(updates_of(variant), updates_of("auto"), rtol=1e-4, atol=1e-8)
    other = updates_of(initial_rate.VARIANTS["relative-0.04-50"].schedule)
    assert not np.allclose(other, updates_of("auto"), rtol=0.1)


@pytest.mark.slow
def test_gradients_are_averaged_over_steps():
    """Two steps of half the batch are one step of the whole; the updates of the first steps are zero."""
    task = make_task("mnist1d-batch-4")
    with_two = Engine(task, "sgd", Settings(4), accumulation=2)
    ((_, constant, _),) = next(with_two.train([RunSpec("constant", 0.1, 0)]))
    ((_, auto, _),) = next(with_two.train([RunSpec("auto-without-steps", 1.0, 0)]))
    ((_, every_step, _),) = next(Engine(task, "sgd", Settings(4)).train([RunSpec("constant", 0.1, 0)]))
    # The losses of the first two steps are those of the initial parameters.
    np.testing.assert_allclose(constant.loss[:2], auto.loss[:2], rtol=1e-6)
    assert constant.loss[0] == every_step.loss[0] and constant.loss[1] != every_step.loss[1]
    assert constant.loss[2] != auto.loss[2]


@pytest.mark.slow
def test_a_second_call_trains_only_what_is_missing(tmp_path, monkeypatch):
    trained = []
    train = Engine.train

    def counted(self, specs):
        trained.append(len(specs))
        return train(self, specs)

    monkeypatch.setattr(Engine, "train", counted)
    console = Console(record=True, width=200)
    selection = Selection(task="cancer-logistic", rule="auto,cosine-1e-2", steps="20")
    job = Job("initial-rate", "quick", tmp_path, console, selection=selection)
    initial_rate.run(job)
    assert trained == [(7 + 1) * 3]
    both = selection._replace(task="cancer-logistic,wine-logistic")
    initial_rate.run(job._replace(selection=both))
    assert trained == [24, 24]
    initial_rate.run(job._replace(selection=both))
    assert trained == [24, 24]
    folder = tmp_path / "20-steps"
    runs = pl.read_parquet(folder / "runs.parquet")
    assert len(runs) == 48 and set(runs["task"]) == {"cancer-logistic", "wine-logistic"}
    recomputed = initial_rate.gaps(
        initial_rate.measure(
            runs, [SUITE[name] for name in ("cancer-logistic", "wine-logistic")], [RULES["cosine-1e-2"]]
        )
    )
    written = pl.read_csv(folder / "tasks.csv").filter(rule="cosine-1e-2")
    assert written["gap"].to_list() == pytest.approx(recomputed["gap"].to_list())
    assert_is_drawn(folder / "rules.png")
    page = (folder / "report.html").read_text()
    assert "--preset quick --task cancer-logistic,wine-logistic --rule auto,cosine-1e-2 --steps 20." in page
    with pytest.raises(UsageError, match="there are no runs of cancer-logistic with dog"):
        initial_rate.measure(runs, [SUITE["cancer-logistic"]], [RULES["dog"]])
