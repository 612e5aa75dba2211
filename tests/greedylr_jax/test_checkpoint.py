"""Orbax checkpoints in the middle of a run, for every rule."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
import pytest

import greedylr_jax
from greedylr_jax.checkpoint import check_restorable
from tests.greedylr_jax.rules import BASE_RATE, RATE_OPTIMIZERS, SCALE_RULES, losses, mostly_slow

PARAMS = {"w": jnp.linspace(-1.0, 1.0, 6), "b": jnp.zeros(2)}


def make_run(tx):
    """A run that steps one at a time, all through one compiled step."""

    def value_fn(params):
        return sum(jnp.sum((leaf - 0.25) ** 2) for leaf in params.values())

    @jax.jit
    def step(params, state, value):
        grads = jax.tree.map(lambda leaf: leaf - 0.25, params)
        updates, state = tx.update(grads, state, params, value=value, value_fn=value_fn)
        return optax.apply_updates(params, updates), state, greedylr_jax.metrics(state)

    def run(params, state, values):
        history = []
        for value in values:
            params, state, read = step(params, state, value)
            history.append(jax.device_get(read))
        return params, state, history

    return run


def with_rule(case, adapter):
    if adapter == "schedule":
        return optax.inject_hyperparams(optax.adam)(learning_rate=case.schedule(every=2))
    return optax.chain(optax.adam(BASE_RATE), case.transformation(every=2))


# Every rule, in each of its adapters.
OPTIMIZERS = {
    f"{case.name}-{adapter}": with_rule(case, adapter)
    for case in SCALE_RULES
    for adapter in ("transformation", "schedule")
} | RATE_OPTIMIZERS


@pytest.mark.parametrize(
    "name",
    # Both adapters store the same state of a rule. ARC's network takes seconds to compile.
    mostly_slow(OPTIMIZERS, *(name for name in OPTIMIZERS if "-schedule" not in name)),
)
@pytest.mark.parametrize(
    "cuts",
    [(23,), pytest.param((0, 44), marks=pytest.mark.slow), pytest.param((1, 59), marks=pytest.mark.slow)],
)
def test_a_resumed_run_is_bit_identical(name, cuts, tmp_path):
    tx, values = optax.with_extra_args_support(OPTIMIZERS[name]), losses(60)
    run = make_run(tx)
    whole = run(PARAMS, tx.init(PARAMS), values)
    moving = {key for key in whole[2][0] if key.split("/")[-1].startswith(("scale", "learning_rate"))}
    assert any(len({float(read[key]) for read in whole[2]}) > 1 for key in moving)
    with ocp.StandardCheckpointer() as checkpointer:
        for cut in cuts:  # with every=2 in the middle of a pair of losses, and between two
            params, state, _ = run(PARAMS, tx.init(PARAMS), values[:cut])
            checkpointer.save(tmp_path / str(cut), {"params": params, "opt_state": state})
            checkpointer.wait_until_finished()
            target = {"params": PARAMS, "opt_state": jax.eval_shape(tx.init, PARAMS)}
            check_restorable(checkpointer.metadata(tmp_path / str(cut)).item_metadata, target)
            restored = checkpointer.restore(tmp_path / str(cut), target)
            assert type(restored["opt_state"]) is type(state)
            resumed = run(restored["params"], restored["opt_state"], values[cut:])
            chex.assert_trees_all_equal(resumed[:2], whole[:2])
            assert resumed[2] == whole[2][cut:]


@pytest.fixture
def saved(tmp_path):
    """A function that saves a tree and returns what Orbax knows of the checkpoint."""

    def save(tree):
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / "saved", tree)
            checkpointer.wait_until_finished()
            return checkpointer.metadata(tmp_path / "saved").item_metadata

    return save


@pytest.mark.parametrize(("window", "other"), [(50, 20), (50, None), (None, 3)])
def test_another_window_is_a_clear_error(saved, window, other):
    def opt_state(window):
        return {"opt_state": optax.chain(optax.adam(1.0), greedylr_jax.greedy_lr(window=window)).init(PARAMS)}

    metadata = saved(opt_state(window))
    check_restorable(metadata, opt_state(window))
    shapes = rf"float32\[{window or 1}\] saved, float32\[{other or 1}\] expected"
    with pytest.raises(
        ValueError, match=rf"opt_state.1.rule.history.values: {shapes} \(the window of the rule"
    ):
        check_restorable(metadata, opt_state(other))


def test_a_field_of_another_version_is_named(saved):
    state = greedylr_jax.greedy_lr().init(PARAMS)

    class OlderState(NamedTuple):
        scale: jax.Array
        streak: jax.Array

    older = state._replace(rule=OlderState(state.rule.scale, jnp.int32(0)))
    metadata = saved(older._asdict())
    with pytest.raises(ValueError, match=r"rule.best_value: nothing saved, float32") as error:
        check_restorable(metadata, state._asdict())
    assert "and " in str(error.value) and "more" in str(error.value)
    with pytest.raises(ValueError, match=r"fit: streak: int32\[\] saved, nothing expected"):
        check_restorable(older.rule, {"scale": state.rule.scale})


def test_a_float64_checkpoint_does_not_fit_a_float32_run():
    state = greedylr_jax.greedy_lr(window=None).init(None)
    with jax.enable_x64(True):
        wide = greedylr_jax.greedy_lr(window=None).init(None)
        with pytest.raises(ValueError, match=r"rule.scale: float64\[\] saved, float32\[\] expected"):
            check_restorable(wide, state)


def test_missing_metadata_is_explained():
    with pytest.raises(ValueError, match="item_handlers"):
        check_restorable(None, {})
