"""The loss from another argument, from a callback and from a loss slot, over the table of rules."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import greedylr_jax
from greedylr_jax import (
    LossSlot,
    ObservedState,
    add_loss_slot,
    fill_loss_slot,
    get_learning_rate,
    get_scale,
    greedy_lr,
    observe,
    set_scale,
    value_from,
    value_from_observe,
    value_from_slot,
)
from greedylr_jax.checkpoint import check_restorable
from tests.greedylr_jax.rules import BASE_RATE, RATE_OPTIMIZERS, SCALE_RULES, losses

PARAMS = {"w": jnp.linspace(-1.0, 1.0, 4), "b": jnp.ones(2) / 4}
VALUES = losses(40)
SUDDEN = greedy_lr(factor=0.5, patience=0, window=None)  # every loss changes the scale

every_adapter = pytest.mark.parametrize("adapter", ["transformation", "schedule"])


def optimizer(case, adapter, inner=optax.adam):
    if adapter == "schedule":
        return optax.inject_hyperparams(inner)(learning_rate=case.schedule())
    return optax.chain(inner(BASE_RATE), case.transformation())


def pseudo_loss(params, value):
    """A loss with the given value, and gradients that depend on the parameters."""
    shift = sum(jnp.sum((leaf - 0.5) ** 2) for leaf in jax.tree.leaves(params))
    return value + (shift - jax.lax.stop_gradient(shift))  # exactly the value


def run(tx, values, extra=lambda value: {}, before=lambda state, value: state, loss_fn=None, params=PARAMS):
    """Final parameters and all rates of a scan; ``before`` changes the state before each update."""
    loss_fn = loss_fn or pseudo_loss

    def body(carry, value):
        params, state = carry
        grads = jax.grad(loss_fn)(params, value)
        updates, state = tx.update(grads, before(state, value), params, **extra(value))
        return (optax.apply_updates(params, updates), state), get_learning_rate(state, BASE_RATE)

    carry = jax.jit(lambda values: jax.lax.scan(body, (params, tx.init(params)), values))
    (params, state), rates = carry(jnp.asarray(values))
    return params, state, np.asarray(rates)


class Source(NamedTuple):
    """How a loop without ``value=`` brings the loss to a rule."""

    wrap: object
    arguments: dict  # of `run`
    inner_params: object = lambda params: params


SOURCES = {
    "value_from": Source(lambda tx: value_from(tx, "loss"), {"extra": lambda value: {"loss": value}}),
    "value_from_observe": Source(value_from_observe, {"before": observe}),
    "value_from_slot": Source(
        value_from_slot,
        {"loss_fn": fill_loss_slot(pseudo_loss), "params": add_loss_slot(PARAMS)},
        lambda params: params.params,
    ),
}
every_source = pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)


def crossed(parameters, is_default):
    """Every parameter with every source; those for which ``is_default`` is false are slow."""
    return [
        pytest.param(
            each, source, id=f"{name}-{kind}", marks=[] if is_default(name, kind) else pytest.mark.slow
        )
        for name, each in parameters.items()
        for kind, source in SOURCES.items()
    ]


RULES = {case.name: case for case in SCALE_RULES}
# The sources know nothing of the rule, whose programs take seconds to compile: one rule with each by default.
RULES_AND_SOURCES = crossed(
    RULES,
    lambda name, kind: name == "greedy-reference" or (name in ("trend", "own-rule") and "observe" in kind),
)
OPTIMIZERS_AND_SOURCES = crossed(
    # rates per group have a reader per group, the tuner has a test of its own
    {name: tx for name, tx in RATE_OPTIMIZERS.items() if "group" not in name and "lr_tuner" not in name},
    lambda name, kind: name == "with_rollback" or (name == "factor_polling" and "slot" in kind),
)


@pytest.mark.parametrize(("case", "source"), RULES_AND_SOURCES)
@every_adapter
def test_a_run_equals_that_with_value(case, source, adapter):
    tx = optimizer(case, adapter)
    params, state, rates = run(tx, VALUES, lambda value: {"value": value})
    assert np.ptp(rates) > 0
    got, got_state, got_rates = run(source.wrap(tx), VALUES, **source.arguments)
    np.testing.assert_array_equal(got_rates, rates)
    chex.assert_trees_all_equal(source.inner_params(got), params)
    inner = got_state.inner_state if isinstance(got_state, ObservedState) else got_state
    chex.assert_trees_all_equal(inner, state)


@pytest.mark.parametrize(("tx", "source"), OPTIMIZERS_AND_SOURCES)
def test_optimizers_with_their_own_rate_accept_each_source(tx, source):
    tx = optax.with_extra_args_support(tx)
    fn = {"value_fn": lambda params: jnp.sum(jax.tree.leaves(params)[0] ** 2)}
    params, _, _ = run(tx, VALUES[:12], lambda value: {"value": value} | fn)
    extra = source.arguments.get("extra", lambda value: {})
    arguments = source.arguments | {"extra": lambda value: extra(value) | fn}
    got, _, _ = run(source.wrap(tx), VALUES[:12], **arguments)
    # with_rollback and hypergradient see the same numbers, in another program
    chex.assert_trees_all_close(source.inner_params(got), params, rtol=1e-6)


@pytest.mark.parametrize(("case", "source"), RULES_AND_SOURCES)
def test_readers_setters_and_checkpoints_work_with_each_source(case, source, tmp_path):
    tx = source.wrap(optimizer(case, "schedule"))
    params = source.arguments.get("params", PARAMS)
    arguments = source.arguments | {"params": params}
    _, state, rates = run(tx, VALUES[:21], **arguments)
    assert get_learning_rate(state) == rates[-1] == greedylr_jax.metrics(state)["learning_rate"]
    assert get_scale(set_scale(state, 0.5)) == 0.5
    chex.assert_trees_all_equal_shapes_and_dtypes(set_scale(state, 0.5), state)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        target = jax.eval_shape(tx.init, params)
        check_restorable(checkpointer.metadata(tmp_path / "state").item_metadata, target)
        restored = checkpointer.restore(tmp_path / "state", target)
    assert type(restored) is type(state)
    chex.assert_trees_all_equal(restored, state)


@every_source
def test_the_position_of_the_rule_is_checked_through_each_source(source):
    params = source.arguments.get("params", PARAMS)
    right, wrong = [optax.adam(0.1), greedy_lr()], [greedy_lr(), optax.adam(0.1)]
    greedylr_jax.assert_controls_learning_rate(source.wrap(optax.chain(*right)), params)
    with pytest.raises(AssertionError, match="does not control the step size"):
        greedylr_jax.assert_controls_learning_rate(source.wrap(optax.chain(*wrong)), params)


@every_source
def test_a_loss_that_is_not_finite_counts_as_worse(source):
    tx = source.wrap(optax.chain(optax.sgd(BASE_RATE), greedy_lr(factor=0.5, patience=1, window=None)))
    _, state, rates = run(tx, np.array([1.0, np.nan, np.inf, 2.0, -np.inf, 3.0]), **source.arguments)
    np.testing.assert_array_equal(rates / BASE_RATE, [1, 1, 0.5, 0.5, 0.25, 0.25])
    assert all(np.isfinite(value) for value in greedylr_jax.metrics(state).values())


def test_a_missing_value_names_the_three_ways():
    with pytest.raises(TypeError) as raised:
        SUDDEN.update(None, SUDDEN.init(None))
    for name in ("value_from(tx, 'loss')", "value_from_observe(tx)", "value_from_slot(tx)"):
        assert f"greedylr_jax.{name}" in str(raised.value)
    assert "greedylr_jax.observe(opt_state, loss)" in str(raised.value)


# value_from


def test_value_from_passes_a_function_as_value_fn_and_evaluates_it():
    def loss_fn(params):
        return jnp.sum((params - 0.25) ** 2)

    tuner = greedylr_jax.lr_tuner(optax.sgd(1.0), 0.01, explore_steps=9, recompute_every=2)
    txs = {"value": tuner, "obj_fn": value_from(tuner, "obj_fn")}
    rates = {name: [] for name in txs}
    for name, tx in txs.items():
        params, state = jnp.ones(3), tx.init(jnp.ones(3))
        for _ in range(6):
            value, grads = jax.value_and_grad(loss_fn)(params)
            extra = {"obj_fn": loss_fn} if name == "obj_fn" else {"value": value, "value_fn": loss_fn}
            updates, state = tx.update(grads, state, params, **extra)
            params = optax.apply_updates(params, updates)
            rates[name].append(float(get_learning_rate(state)))
    assert rates["obj_fn"] == rates["value"]
    assert rates["value"][-1] > 0.01
    with pytest.raises(TypeError, match=r"evaluates obj_fn at the parameters: call tx.update\(grads, opt_st"):
        txs["obj_fn"].update(params, state, obj_fn=loss_fn)


def test_value_from_renames_and_passes_value_on():
    seen = []

    def update(updates, state, params=None, **extra_args):
        seen.append(extra_args)
        return updates, state

    tx = value_from(optax.GradientTransformationExtraArgs(lambda params: (), update), "loss")
    tx.update(None, (), loss=1.0, other=3)
    tx.update(None, (), value=2.0)
    tx.update(None, (), has_value=False)
    assert seen == [{"value": 1.0, "other": 3}, {"value": 2.0}, {"has_value": False}]
    with pytest.raises(TypeError, match=r"value_from needs the loss of this step: call .*, loss=loss\)"):
        tx.update(None, ())
    with pytest.raises(ValueError, match=r"got shape \(2,\).*loss=jnp.mean\(losses\)\)"):
        tx.update(None, (), loss=jnp.ones(2))


@pytest.mark.parametrize("name", ["value", "not a name", None, jnp.ones(())])
def test_value_from_needs_the_name_of_an_argument(name):
    with pytest.raises(ValueError, match="name must be the name of an extra argument"):
        value_from(SUDDEN, name)


# value_from_observe


def test_observed_losses_act_on_the_next_update_only():
    tx = value_from_observe(optax.chain(optax.sgd(1.0), SUDDEN))
    params = jnp.ones(2)
    update = jax.jit(tx.update)
    state, scales = tx.init(params), []
    for losses_before_the_step in ([], [1.0], [], [3.0], [0.5, 0.25], []):
        for loss in losses_before_the_step:
            state = observe(state, loss)
        _, state = update(params, state, params)
        scales.append(float(get_scale(state)))
    assert scales == [1, 2, 2, 1, 2, 2]
    assert greedylr_jax.metrics(state)["best_value"] == 0.375  # the mean of two
    assert update._cache_size() == 1


def test_a_value_of_update_counts_as_observed_before_the_step():
    tx = value_from_observe(SUDDEN)
    _, state = tx.update(None, observe(tx.init(None), 1.0), value=3.0)
    assert greedylr_jax.metrics(state)["best_value"] == 2.0
    _, state = tx.update(None, tx.init(None), value=jnp.nan, has_value=jnp.array(False))
    assert get_scale(state) == 1


def test_observe_inside_multi_steps_gives_the_mean_of_the_micro_batches():
    tx = optax.MultiSteps(value_from_observe(optax.chain(optax.sgd(1.0), SUDDEN)), 2)
    state = tx.init(PARAMS)
    for loss in (1.0, 3.0, 5.0):
        _, state = tx.update(PARAMS, state, PARAMS)
        state = observe(state, loss)
    _, state = tx.update(PARAMS, state, PARAMS)
    # the first optimizer step has seen the first loss, the second one the mean of the other two
    assert greedylr_jax.metrics(state)["num_bad"] == 0 and get_scale(state) == 1
    assert greedylr_jax.metrics(state)["best_value"] == 1.0


def test_observe_reaches_the_rules_of_all_groups():
    groups = {"w": optax.chain(optax.sgd(1.0), SUDDEN), "b": optax.chain(optax.sgd(1.0), SUDDEN)}
    tx = optax.partition(
        {name: value_from_observe(each) for name, each in groups.items()}, {"w": "w", "b": "b"}
    )
    _, state = tx.update(PARAMS, observe(tx.init(PARAMS), 1.0), PARAMS)
    assert get_scale(state, group="w") == get_scale(state, group="b") == 2


def test_observe_accepts_a_loss_for_each_of_many_runs():
    tx = value_from_observe(SUDDEN)
    states = jax.vmap(lambda _: tx.init(None))(jnp.arange(3))

    def step(states):
        return jax.vmap(lambda state: tx.update(None, state)[1])(states)

    for values, expected in ((2.0, [2, 2, 2]), (jnp.array([1.0, 3.0, 1.0]), [4, 1, 4])):
        states = step(observe(states, values))
        np.testing.assert_array_equal(jax.vmap(get_scale)(states), expected)
    with pytest.raises(ValueError, match=r"observe: value must be a scalar loss, got shape \(2,\)"):
        observe(states, jnp.ones(2))


@pytest.mark.parametrize("value", ["0.5", 1j, None, True])
def test_observe_shows_the_right_call(value):
    with pytest.raises(TypeError, match=r"observe\(opt_state, loss\)"):
        observe(value_from_observe(SUDDEN).init(None), value)


def test_observe_without_a_rule_that_waits_is_an_error():
    with pytest.raises(ValueError, match=r"build it with greedylr_jax.value_from_observe\(tx\)"):
        observe(optax.chain(optax.sgd(1.0), SUDDEN).init(PARAMS), 1.0)


def test_observe_keeps_shapes_and_dtypes_and_works_under_jit():
    state = value_from_observe(optax.chain(optax.adam(1.0), SUDDEN)).init(PARAMS)
    for observed in (observe(state, 1), observe(state, np.float64(1)), jax.jit(observe)(state, 1.0)):
        chex.assert_trees_all_equal_shapes_and_dtypes(observed, state)
        assert not any(leaf.weak_type for leaf in jax.tree.leaves(observed))
        assert observed.value_sum == observed.value_count == 1


def test_rollback_with_observed_losses_restores_one_step_later():
    tx = greedylr_jax.with_rollback(optax.chain(optax.sgd(0.1), greedy_lr()), window=2)
    values = np.array([1.0, 0.9, 0.8, 0.7, 0.6, np.nan, 0.6, 0.6], np.float32)
    direct = run(tx, values, lambda value: {"value": value})
    observed = value_from_observe(tx)
    params, state = PARAMS, observed.init(PARAMS)
    rollbacks = []

    @jax.jit
    def step(params, state):
        updates, state = observed.update(jax.grad(pseudo_loss)(params, 0.0), state, params)
        return optax.apply_updates(params, updates), state

    for value in values:
        params, state = step(params, state)
        state = observe(state, value)
        rollbacks.append(int(state.inner_state.num_rollbacks))
    assert direct[1].num_rollbacks == 1
    assert rollbacks == [0, 0, 0, 0, 0, 0, 1, 1]  # the loss at index 5 is NaN
    assert get_scale(state) == 0.5


def mean_square(model, x):
    return jnp.mean(model(x) ** 2)


def test_an_nnx_optimizer_is_observed_in_place():
    model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
    tx = value_from_observe(optax.chain(optax.sgd(0.125), SUDDEN))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    def step(model, optimizer, x):
        loss, grads = nnx.value_and_grad(mean_square)(model, x)
        optimizer.update(model, grads)
        return loss

    step = nnx.cached_partial(nnx.jit(step), model, optimizer)  # as tunix calls its step
    scales = []
    for _ in range(3):
        loss = step(jnp.ones((4, 3)))
        greedylr_jax.flax.observe(optimizer, loss)
        scales.append(float(get_scale(optimizer.opt_state)))
    assert scales == [1, 2, 4]


# value_from_slot


NORMS = optax.chain(
    optax.clip_by_global_norm(0.01),
    optax.adamw(BASE_RATE, weight_decay=0.1),
    optax.scale_by_trust_ratio(),
    SUDDEN,
)


@pytest.mark.parametrize(
    "tx",
    [NORMS, optax.chain(greedylr_jax.auto_lr(optax.adamw(1.0), total_steps=40), SUDDEN)],
    ids=["clip", "auto"],
)
def test_the_slot_disturbs_no_decay_no_norm_and_no_clipping(tx):
    """Bit for bit, at losses that are a million times the gradients."""
    values = 1e6 * VALUES
    params, _, _ = run(tx, values, lambda value: {"value": value})
    got, _, _ = run(
        value_from_slot(tx), values, loss_fn=fill_loss_slot(pseudo_loss), params=add_loss_slot(PARAMS)
    )
    chex.assert_trees_all_equal(got, LossSlot(params, jnp.zeros(())))


def test_the_gradient_of_the_slot_is_the_loss():
    def loss_fn(params, static, x, *, scale):
        assert static == "static"
        loss = scale * jnp.sum(params["w"] * x)
        return loss, {"aux": x}

    filled = fill_loss_slot(loss_fn)
    params, x = add_loss_slot({"w": jnp.arange(3.0)}), jnp.ones(3)
    # equinox.partition makes a second slot, without an array
    arguments = params, LossSlot("static", None), x
    (loss, aux), grads = jax.value_and_grad(filled, has_aux=True)(*arguments, scale=2.0)
    assert loss == grads.loss_slot == 6 and aux["aux"] is x
    np.testing.assert_array_equal(grads.params["w"], 2.0)
    scaled = jax.grad(lambda *arguments: 8 * filled(*arguments, scale=2.0)[0])(*arguments)
    assert scaled.loss_slot == 48  # with loss scaling, as all gradients
    with pytest.raises(TypeError, match="no argument has a loss slot"):
        filled(params.params, "static", x, scale=2.0)


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_the_slot_brings_infinities_as_they_are(value):
    loss, grads = jax.value_and_grad(fill_loss_slot(pseudo_loss))(add_loss_slot(PARAMS), value)
    np.testing.assert_array_equal([loss, grads.loss_slot], value)


def test_a_bfloat16_loss_fills_a_float32_slot():
    filled = fill_loss_slot(lambda params: jnp.sum(params.astype(jnp.bfloat16)))
    loss, grads = jax.value_and_grad(filled)(add_loss_slot(jnp.ones(3)))
    assert loss.dtype == jnp.bfloat16 and grads.loss_slot.dtype == jnp.float32
    assert grads.loss_slot == 3


def test_second_derivatives_pass_the_slot():
    hessian = jax.hessian(fill_loss_slot(lambda params: jnp.sum(params**3)))(add_loss_slot(jnp.ones(2)))
    np.testing.assert_array_equal(hessian.params.params, 6 * np.eye(2))


def test_the_mean_gradient_over_devices_is_the_mean_loss():
    tx = value_from_slot(SUDDEN)
    params = add_loss_slot(PARAMS)

    def step(state, value):
        grads = jax.grad(fill_loss_slot(pseudo_loss))(params, value)
        return tx.update(jax.lax.pmean(grads, "devices"), state, params)[1]

    state = jax.vmap(step, (None, 0), axis_name="devices")(tx.init(params), jnp.array([1.0, 3.0, 5.0, 3.0]))
    np.testing.assert_array_equal(state.rule.best_value, 3.0)


def test_parameters_without_a_slot_are_an_error():
    tx = value_from_slot(SUDDEN)
    with pytest.raises(TypeError, match=r"params must have a loss slot, got dict: .*add_loss_slot\(params\)"):
        tx.init(PARAMS)
    state = tx.init(add_loss_slot(PARAMS))
    with pytest.raises(
        TypeError, match=r"updates must have a loss slot, got dict: .*fill_loss_slot\(loss_fn\)"
    ):
        tx.update(PARAMS, state)
    updates, _ = tx.update(add_loss_slot(PARAMS), state)  # without params, as brax calls it
    assert updates.loss_slot == 0
