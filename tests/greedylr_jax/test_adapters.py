"""The guarantees of every rule in both adapters, tested over the table of rules."""

import importlib.util
from pathlib import Path
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import parameterized
from jax.sharding import PartitionSpec

import greedylr_jax
from greedylr_jax import _numerics, _observe
from tests.greedylr_jax.rules import (
    BASE_RATE,
    RATE_OPTIMIZERS,
    SCALE_RULES,
    losses,
    rule_parameters,
    scales,
    scan_scales,
)

PARAMS = {"w": jnp.arange(6.0).reshape(2, 3) / 8, "b": jnp.ones(3) / 4}
GRADS = {"w": jnp.ones((2, 3)) / 2, "b": -jnp.arange(3.0)}

every_rule = pytest.mark.parametrize("case", rule_parameters())


def with_rule(case, adapter, inner=optax.sgd, **options):
    """The rule around an optimizer, in the named adapter."""
    if adapter == "schedule":
        return optax.inject_hyperparams(inner)(learning_rate=case.schedule(**options))
    return optax.chain(inner(BASE_RATE), case.transformation(**options))


def train(tx, values, params=PARAMS, step=None):
    """Params and learning rates of a run that steps one at a time."""
    step = step or jax.jit(tx.update)
    state, rates = tx.init(params), []
    for value in values:
        updates, state = step(GRADS, state, params, value=value)
        params = optax.apply_updates(params, updates)
        rates.append(float(greedylr_jax.get_learning_rate(state, BASE_RATE)))
    return params, np.array(rates), state


@every_rule
def test_the_rule_moves_both_ways_on_the_test_losses(case):
    moves = np.diff(scales(case.transformation(), losses()))
    assert (moves > 0).any() and (moves < 0).any()


@every_rule
@pytest.mark.parametrize("adapter", ["transformation", "schedule"])
def test_eager_jit_and_scan_agree_bit_for_bit(case, adapter):
    tx, values = with_rule(case, adapter), losses(40)
    stepped = train(tx, values)
    eager = train(tx, values[:6], step=tx.update)
    np.testing.assert_array_equal(eager[1], stepped[1][:6])

    def body(carry, value):
        params, state = carry
        updates, state = tx.update(GRADS, state, params, value=value)
        rate = greedylr_jax.get_learning_rate(state, BASE_RATE)
        return (optax.apply_updates(params, updates), state), rate

    (params, state), rates = jax.jit(lambda values: jax.lax.scan(body, (PARAMS, tx.init(PARAMS)), values))(
        values
    )
    np.testing.assert_array_equal(rates, stepped[1])
    chex.assert_trees_all_equal(params, stepped[0])
    chex.assert_trees_all_equal(state, stepped[2])


class TestVariants(chex.TestCase):
    """Every optimizer with and without ``jit``: the same structure, dtypes and numbers."""

    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.named_parameters(
        [(case.name, with_rule(case, "transformation")) for case in SCALE_RULES if case.name != "arc"]
        + list(RATE_OPTIMIZERS.items())
    )
    def test_a_step_gives_the_same_in_every_variant(self, tx):
        tx = optax.with_extra_args_support(tx)

        def value_fn(params):
            return sum(jnp.sum((leaf - 0.25) ** 2) for leaf in jax.tree.leaves(params))

        def step(params, state, value):
            updates, state = tx.update(GRADS, state, params, value=value, value_fn=value_fn)
            return optax.apply_updates(params, updates), state

        variant, expected = self.variant(step), jax.jit(step)
        got = wanted = (PARAMS, tx.init(PARAMS))
        for value in losses(3):
            got, wanted = variant(*got, value), expected(*wanted, value)
            chex.assert_trees_all_equal_shapes_and_dtypes(got, wanted)
            chex.assert_trees_all_close(got, wanted, rtol=1e-5, atol=1e-6)


@every_rule
def test_both_adapters_agree_on_timing_to_the_bit(case):
    values = losses()
    params, rates, _ = train(with_rule(case, "transformation"), values)
    schedule_params, schedule_rates, state = train(with_rule(case, "schedule"), values)
    np.testing.assert_array_equal(rates, schedule_rates)
    chex.assert_trees_all_equal(params, schedule_params)
    assert float(state.hyperparams["learning_rate"]) == rates[-1]


@every_rule
def test_a_loss_acts_on_the_update_of_its_own_step(case):
    tx, schedule = case.transformation(), case.schedule()
    update, rate, advance = jax.jit(tx.update), jax.jit(schedule), jax.jit(schedule.update)
    state, schedule_state = tx.init(None), schedule.init()
    for value in losses():
        updates, state = update(jnp.ones(()), state, value=value)
        expected = rate(schedule_state, value=value)
        schedule_state = advance(schedule_state, value=value)
        assert updates == greedylr_jax.get_scale(state) == expected / BASE_RATE
        assert schedule(schedule_state) == expected


@every_rule
def test_state_is_float32_and_updates_keep_bfloat16(case):
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), PARAMS)
    tx = case.transformation()
    state = tx.init(params)
    updates, state = jax.jit(tx.update)(params, state, params, value=jnp.bfloat16(0.5))
    chex.assert_trees_all_equal_dtypes(updates, params)
    for leaf in jax.tree.leaves(state):
        assert leaf.dtype in (jnp.float32, jnp.int32, jnp.bool)
    # The rates of a bfloat16 run are those of a float32 run: nothing of the rule is kept in bfloat16.
    _, rates, _ = train(with_rule(case, "transformation"), losses(), params=params)
    np.testing.assert_array_equal(rates, train(with_rule(case, "transformation"), losses())[1])


@every_rule
@pytest.mark.parametrize("adapter", ["transformation", "schedule"])
def test_state_is_float64_with_x64(case, adapter):
    with jax.enable_x64(True):
        params = {"w": jnp.ones(3, jnp.float32)}
        tx = with_rule(case, adapter)
        state = tx.init(params)
        updates, after = jax.jit(tx.update)(params, state, params, value=0.5)
        chex.assert_trees_all_equal_shapes_and_dtypes(state, after)
        assert greedylr_jax.get_scale(after).dtype == jnp.float64
        if adapter == "transformation":
            assert updates["w"].dtype == jnp.float32


@every_rule
def test_bad_losses_count_as_worse_and_do_not_propagate(case):
    tx = case.transformation()
    storm = np.array([np.nan, np.inf, -np.inf] * 20, np.float32)
    values = np.concatenate([losses(32), storm, losses(64, seed=1)])
    got = scales(tx, values)
    assert np.isfinite(got).all()
    low, high = case.bounds
    assert got.min() >= low and got.max() <= high

    update, state = jax.jit(tx.update), tx.init(None)
    for value in values:
        _, state = update(None, state, value=value)
        for name, leaf in state.rule._asdict().items():
            assert not any(np.isnan(each).any() for each in jax.tree.leaves(leaf)), name
    assert len(set(got[-64:])) > 1  # it still answers to the losses that follow


@every_rule
def test_a_storm_of_bad_losses_lowers_the_rate_until_a_reset_or_the_floor(case):
    got = scales(case.transformation(), np.full(12, np.nan, np.float32))
    assert (np.diff(got) <= 0).all() and got[-1] <= 1 / 4


@every_rule
def test_every_k_decides_on_means_of_k_losses(case):
    values, k = losses(96), 4
    got = scales(case.transformation(every=k), values)
    means = values.reshape(-1, k).mean(axis=1)
    expected = scales(case.transformation(), means)
    assert np.ptp(expected) > 0
    np.testing.assert_array_equal(got[k - 1 :: k], expected)
    held = np.concatenate([[1.0], expected])[:-1]
    np.testing.assert_array_equal(got.reshape(-1, k)[:, :-1], np.repeat(held[:, None], k - 1, axis=1))


@every_rule
def test_every_may_be_traced(case):
    values = losses()
    run = jax.jit(jax.vmap(lambda every: _scales_traced(case.transformation(every=every), values)))
    got = run(jnp.array([1, 2, 8]))
    for row, every in enumerate([1, 2, 8]):
        np.testing.assert_array_equal(got[row], scales(case.transformation(every=every), values))


def _scales_traced(tx, values):
    def body(state, value):
        _, state = tx.update(None, state, value=value)
        return state, greedylr_jax.get_scale(state)

    return jax.lax.scan(body, tx.init(None), values)[1]


@every_rule
@pytest.mark.parametrize("every", [1, 3])
def test_steps_without_a_value_change_nothing(case, every):
    tx, values = case.transformation(every=every), losses(90)
    mask = np.random.default_rng(0).random(90) < 0.5
    noisy = np.where(mask, values, np.nan).astype(np.float32)  # what is ignored may be anything
    got = scales(tx, noisy, has_value=mask)
    expected = scales(tx, values[mask])
    assert np.ptp(expected) > 0
    np.testing.assert_array_equal(got[mask], expected)
    held = np.concatenate([[1.0], expected])[np.cumsum(mask)]
    np.testing.assert_array_equal(got, held)


@every_rule
def test_a_step_known_to_have_no_value_needs_none(case):
    tx = case.transformation()
    state = tx.init(PARAMS)
    updates, after = tx.update(GRADS, state, PARAMS, has_value=False)
    chex.assert_trees_all_equal(after, state)
    chex.assert_trees_all_equal(updates, GRADS)


@every_rule
@pytest.mark.parametrize("adapter", ["transformation", "schedule"])
def test_a_compiled_step_moves_nothing_between_host_and_device(case, adapter):
    tx = with_rule(case, adapter, inner=optax.adamw)
    state, value = tx.init(PARAMS), jnp.float32(0.5)
    with jax.transfer_guard("disallow"):
        step = jax.jit(tx.update)
        for _ in range(3):  # the first one traces and compiles
            _, state = step(GRADS, state, PARAMS, value=value)


@every_rule
def test_devices_of_an_axis_decide_alike(case):
    per_device = np.stack([losses(seed=seed) for seed in range(4)], axis=1)

    def run(values):
        return _scales_traced(case.transformation(axis_name="batch"), values)

    mapped = jax.vmap(run, in_axes=1, axis_name="batch")(per_device)
    expected = scales(case.transformation(), per_device.mean(axis=1))
    assert np.ptp(expected) > 0
    for row in mapped:
        np.testing.assert_array_equal(row, expected)

    mesh = jax.make_mesh((1,), ("batch",))
    sharded = jax.shard_map(run, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec())
    np.testing.assert_array_equal(
        jax.jit(sharded)(per_device[:, 0]), scales(case.transformation(), per_device[:, 0])
    )


def test_devices_without_a_loss_take_the_mean_of_those_that_have_one():
    per_device = np.stack([losses(seed=seed) for seed in range(4)], axis=1)
    has_value = np.random.default_rng(0).random(per_device.shape) < 0.5
    tx = SCALE_RULES[0].transformation(axis_name="batch")
    got = jax.vmap(lambda *each: scan_scales(tx, each[0], has_value=each[1]), in_axes=1, axis_name="batch")(
        per_device, has_value
    )
    observed = has_value.any(axis=1)
    means = np.where(has_value, per_device, 0).sum(axis=1)[observed] / has_value.sum(axis=1)[observed]
    expected = scales(SCALE_RULES[0].transformation(), means.astype(np.float32))
    assert 0 < observed.sum() < len(observed)
    for row in got:
        np.testing.assert_array_equal(row[observed], expected)


def test_has_value_must_be_a_scalar():
    tx = SCALE_RULES[0].transformation()
    with pytest.raises(ValueError, match=r"greedy_lr: has_value must be .* got shape \(2,\)"):
        tx.update(None, tx.init(None), value=1.0, has_value=jnp.array([True, False]))


@every_rule
def test_vmapping_equals_looping_bit_for_bit(case):
    batch = np.stack([losses(seed=seed) for seed in range(5)])
    got = jax.jit(jax.vmap(lambda values: _scales_traced(case.transformation(), values)))(batch)
    assert (np.ptp(got, axis=1) > 0).all()
    for row, values in zip(got, batch, strict=True):
        np.testing.assert_array_equal(row, scales(case.transformation(), values))


@every_rule
@pytest.mark.parametrize("adapter", ["transformation", "schedule"])
def test_state_may_be_donated(case, adapter):
    tx = with_rule(case, adapter)
    step, plain = jax.jit(tx.update, donate_argnums=1), jax.jit(tx.update)
    state, expected = tx.init(PARAMS), tx.init(PARAMS)
    unread = (".decision", ".hyperparams['learning_rate']")  # overwritten: jax.jit drops such arguments
    for value in losses(3):
        before = state
        _, state = step(GRADS, state, PARAMS, value=value)
        _, expected = plain(GRADS, expected, PARAMS, value=value)
        for path, leaf in jax.tree_util.tree_leaves_with_path(before):
            assert leaf.is_deleted() or jax.tree_util.keystr(path).endswith(unread), path
    chex.assert_trees_all_equal(state, expected)


@every_rule
def test_a_rate_that_was_read_outlives_the_donated_state(case):
    schedule = case.schedule()
    state = schedule.init()
    rate = schedule(state)
    read = greedylr_jax.metrics(state) | {"rate": greedylr_jax.get_learning_rate(state)}
    read |= {"get_scale": greedylr_jax.get_scale(state)}
    expected = {name: float(value) for name, value in read.items()}
    after = jax.jit(schedule.update, donate_argnums=0)(state, value=1.0)
    assert state.rule_state.rule.scale.is_deleted()
    assert float(rate) == BASE_RATE
    assert {name: float(value) for name, value in read.items()} == expected
    assert float(schedule(after)) > 0


@every_rule
@pytest.mark.parametrize(
    "dtype", [jnp.bfloat16, pytest.param(jnp.float16, marks=pytest.mark.slow), jnp.float32]
)
@pytest.mark.parametrize("inner", [optax.sgd, pytest.param(optax.lion, marks=pytest.mark.slow)])
def test_a_schedule_keeps_the_dtype_of_the_updates(case, dtype, inner):
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), PARAMS)
    tx = optax.inject_hyperparams(inner)(learning_rate=case.schedule())
    state = tx.init(params)
    updates, after = jax.jit(tx.update)(params, state, params, value=1.0)
    chex.assert_trees_all_equal_dtypes(updates, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
    assert greedylr_jax.get_learning_rate(after).dtype == jnp.float32


def test_float32_hyperparameters_keep_adam_finite_in_bfloat16():
    params = jnp.ones(3, jnp.bfloat16)
    wide = optax.inject_hyperparams(optax.adam, hyperparam_dtype=jnp.float32)
    for factory, is_finite in ((wide, True), (optax.inject_hyperparams(optax.adam), False)):
        tx = factory(learning_rate=SCALE_RULES[0].schedule())
        updates, _ = tx.update(params, tx.init(params), params, value=1.0)
        assert np.isfinite(np.asarray(updates, np.float32)).all() == is_finite


@every_rule
@pytest.mark.parametrize("adapter", ["transformation", "schedule"])
def test_strict_dtype_promotion(case, adapter):
    if adapter == "schedule":
        run = case.schedule(every=2).update
        state = case.schedule(every=2).init()
    else:
        tx = case.transformation(every=2)
        state = tx.init(PARAMS)

        def run(state, value):
            return tx.update({"w": jnp.ones(2, jnp.bfloat16)}, state, value=value)[1]

    with jax.numpy_dtype_promotion("strict"):
        for _ in range(3):
            state = run(state, value=jnp.float32(1.0))


@every_rule
def test_leaves_of_every_kind(case):
    updates = {
        "half": jnp.ones(2, jnp.float16),
        "complex": jnp.array([1 + 2j, -3j], jnp.complex64),
        "integer": jnp.arange(3),
        "wide integer": np.arange(3) + 2**40,
        "empty": jnp.zeros((0, 4)),
        "none": None,
        "number": 2.0,
        "no_gradient": np.zeros(2, jax.dtypes.float0),
    }
    tx = case.transformation()
    state = tx.init(updates)
    for value in losses(8):
        scaled, state = tx.update(updates, state, value=value)
    scale = np.float32(greedylr_jax.get_scale(state))
    assert scale != 1
    np.testing.assert_array_equal(scaled["half"], np.ones(2, np.float16) * np.float16(scale))
    np.testing.assert_allclose(scaled["complex"], np.array([1 + 2j, -3j]) * scale, rtol=1e-6)
    np.testing.assert_array_equal(scaled["integer"], np.arange(3))
    np.testing.assert_array_equal(scaled["wide integer"], np.arange(3) + 2**40)
    assert scaled["empty"].shape == (0, 4)
    assert scaled["none"] is None
    assert scaled["number"] == 2 * scale
    assert scaled["no_gradient"].dtype == jax.dtypes.float0
    for name in ("half", "complex", "integer", "empty"):
        assert scaled[name].dtype == updates[name].dtype


def test_a_rule_of_ones_own_has_everything_in_under_thirty_lines():
    """The rule of ``examples/own_rule.py``, in both adapters, with all options, readers and setters."""
    path = Path(__file__).parents[2] / "examples" / "own_rule.py"
    spec = importlib.util.spec_from_file_location("own_rule", path)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    lines = path.read_text().splitlines()
    assert lines.index("def main() -> None:") - lines.index("class BoldDriverState(NamedTuple):") < 30

    values, mask = losses(12), np.arange(12) % 3 != 0
    rule = example.bold_driver(up=2.0)
    options = dict(every=2, axis_name="batch")
    chained = greedylr_jax.chain(greedylr_jax.scale_by_rule(rule, **options), optax.adam(BASE_RATE))
    schedule = greedylr_jax.schedule_by_rule(rule, BASE_RATE, **options)
    injected = optax.inject_hyperparams(optax.adam)(learning_rate=schedule)

    def rates(tx):
        def body(state, inputs):
            _, state = tx.update(GRADS, state, PARAMS, value=inputs[0], has_value=inputs[1])
            return state, greedylr_jax.get_learning_rate(state, BASE_RATE)

        start = greedylr_jax.set_learning_rate(tx.init(PARAMS), 2 * BASE_RATE, BASE_RATE)
        return jax.vmap(lambda _: jax.lax.scan(body, start, (values, mask))[1], axis_name="batch")(
            jnp.ones(2)
        )

    got = rates(chained)
    np.testing.assert_array_equal(got, rates(injected))
    means = values[mask].reshape(-1, 2).mean(axis=1)
    assert len(np.unique(got)) > 2
    factors = np.where(np.diff(means, prepend=np.inf) <= 0, 2.0, 0.5)
    np.testing.assert_array_equal(got[0][mask][1::2], 2 * BASE_RATE * np.cumprod(factors))
    greedylr_jax.assert_controls_learning_rate(
        optax.chain(optax.adam(0.1), greedylr_jax.scale_by_rule(rule)), PARAMS
    )
    assert greedylr_jax.metrics(schedule.init())["last_value"] == np.inf


class _Held(NamedTuple):
    """The state of a rule without a name that does nothing."""

    scale: jax.Array


RIGHT_CALL = "tx.update(grads, opt_state, params, value=loss)"
NO_SHAPE = "greedy_lr: value must be a scalar loss"
REDUCED = "Reduce it first: tx.update(grads, opt_state, params, value=jnp.mean(losses))."
NO_SCALAR = f"greedy_lr: value must be a real scalar loss, as in {RIGHT_CALL}"


@pytest.mark.parametrize("adapter", ["transformation", "schedule"])
@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (
            None,
            TypeError,
            f"greedy_lr needs the loss of this step: call {RIGHT_CALL}, where loss is the scalar that you "
            "differentiate (jax.value_and_grad returns it). For a step without a new loss pass "
            "has_value=False.",
        ),
        (
            jnp.ones(3),
            ValueError,
            f"{NO_SHAPE}, got shape (3,). {REDUCED}",
        ),
        (
            jnp.ones((1,)),
            ValueError,
            f"{NO_SHAPE}, got shape (1,). {REDUCED}",
        ),
        ("0.5", TypeError, f"{NO_SCALAR}, got '0.5'."),
        (1j, TypeError, f"{NO_SCALAR}, got dtype complex64."),
        (True, TypeError, f"{NO_SCALAR}, got dtype bool."),
    ],
    ids=["missing", "vector", "one element", "string", "complex", "bool"],
)
def test_a_wrong_value_shows_the_right_call(adapter, value, error, message):
    tx = with_rule(SCALE_RULES[0], adapter)
    state = tx.init(PARAMS)
    arguments = {} if value is None else {"value": value}
    with pytest.raises(error) as raised:
        tx.update(GRADS, state, PARAMS, **arguments)
    assert str(raised.value).removesuffix(f" {_observe._WITHOUT_VALUE}") == message


@pytest.mark.parametrize(
    ("tx", "name"),
    [
        (greedylr_jax.greedy_lr(), "greedy_lr"),
        (greedylr_jax.trend_lr(), "trend_lr"),
        (SCALE_RULES[-1].transformation(), "toggle"),
        (greedylr_jax.scale_by_rule(greedylr_jax.Rule(init=_Held, update=lambda state, _: state)), "rule"),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_a_missing_value_names_the_rule(tx, name):
    with pytest.raises(TypeError, match=f"^{name} needs the loss"):
        tx.update(None, tx.init(None))


@pytest.mark.parametrize("value", [1, np.float64(1.0), np.int32(1), jnp.float16(1.0), 1.0])
def test_any_real_scalar_is_a_value(value):
    tx = SCALE_RULES[0].transformation()
    _, state = tx.update(None, tx.init(None), value=value)
    assert state.rule.scale.dtype == jnp.float32


@pytest.mark.parametrize("every", [4, jnp.int32(4)])
def test_every_fourth_loss_the_rule_sees_the_mean_of_four(every):
    seen = []
    rule = greedylr_jax.Rule(init=_Held, update=lambda state, mean: seen.append(mean) or state)
    tx = greedylr_jax.scale_by_rule(rule, every=every)
    state = tx.init(None)
    for value in (1.0, 2.0, 3.0, 5.0, 4.0, 4.0, 4.0, 8.0):
        _, state = tx.update(None, state, value=value)
    assert [float(mean) for mean in seen[3::4]] == [2.75, 5.0]  # what it is shown in between is dropped


@pytest.mark.parametrize("case", SCALE_RULES, ids=lambda case: case.name)  # builds no network
@pytest.mark.parametrize("every", [0, -1, 1.5, True, "2", None])
def test_every_out_of_range(case, every):
    with pytest.raises(ValueError, match=r"every must be an integer in \[1, "):
        case.transformation(every=every)
    with pytest.raises(ValueError, match=r"every must be an integer in \[1, "):
        case.schedule(every=every)


@pytest.mark.parametrize("init_value", [0.0, -1.0, np.inf, np.nan, "1"])
def test_schedule_start_out_of_range(init_value):
    rule = greedylr_jax.Rule(lambda scale: scale, lambda state, value: state)
    with pytest.raises(ValueError, match="init_value must be a number in"):
        greedylr_jax.schedule_by_rule(rule, init_value)


def test_the_scale_is_applied_in_float32_and_rounded_once():
    """5 / 0.95 is nearest to 5.25; with the scale rounded to bfloat16 first it is 5.28125."""
    tx = greedylr_jax.greedy_lr(patience=0, window=None)
    updates, _ = tx.update(jnp.full((), 5.0, jnp.bfloat16), tx.init(None), value=1.0)
    assert updates == 5.25
    assert jnp.bfloat16(5.0) * jnp.bfloat16(1 / 0.95) == 5.28125


def test_where_broadcasts_a_number_to_the_other_operand():
    condition, counts = jnp.array([True, False]), jnp.array([3, 4], jnp.int8)
    for got, expected in (
        (_numerics.where(condition, counts, -1), [3, -1]),
        (_numerics.where(condition, -1, counts), [-1, 4]),
    ):
        assert got.dtype == jnp.int8
        np.testing.assert_array_equal(got, expected)
