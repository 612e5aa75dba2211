"""Rules lower the loss of a quadratic with every inner optimizer that descends, and reject others."""

import functools
import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import greedylr_jax
from greedylr_jax._inner import check_descends, has_momentum
from greedylr_jax.range_test import range_test
from tests.greedylr_jax.rules import crossed, thinned

PARAMS = {"w": jnp.linspace(1.0, 3.0, 6).reshape(3, 2), "b": jnp.array([2.0, 1.5])}
LABELS = {"w": "first", "b": "second"}
ONLY_W = {"w": True, "b": False}
STEPS = 60  # of which auto_lr takes half to search, and then may restore the initial parameters


class InnerCase(NamedTuple):
    """An inner optimizer, the dtype of its parameters, and whether its updates point downhill."""

    make: object
    descends: bool = True
    dtype: object = jnp.float32


def partition(first, second):
    return optax.partition({"first": first, "second": second}, LABELS)


def delayed(inner, steps):
    """No update before the last of so many steps, which is that of the mean gradient."""
    return optax.MultiSteps(inner, steps).gradient_transformation()


WARM_UP = optax.linear_schedule(0.0, 1.0, 5)
LATE = optax.join_schedules([optax.constant_schedule(0.0), optax.constant_schedule(1.0)], [12])

INNERS = {
    "sgd": InnerCase(lambda: optax.sgd(1.0)),
    "momentum": InnerCase(lambda: optax.sgd(1.0, momentum=0.9)),
    "nesterov": InnerCase(lambda: optax.sgd(1.0, momentum=0.9, nesterov=True)),
    "adam": InnerCase(lambda: optax.adam(1.0)),
    "adamw with a mask": InnerCase(lambda: optax.adamw(1.0, mask=ONLY_W)),
    "adamw with a mask function": InnerCase(
        lambda: optax.adamw(1.0, mask=lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params))
    ),
    "partition": InnerCase(lambda: partition(optax.adam(1.0), optax.sgd(1.0))),
    "partition with frozen leaves": InnerCase(lambda: partition(optax.adam(1.0), optax.set_to_zero())),
    "partition with one learning rate of 0": InnerCase(lambda: partition(optax.adam(1.0), optax.sgd(0.0))),
    "clipping": InnerCase(lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1.0))),
    "MultiSteps": InnerCase(lambda: optax.MultiSteps(optax.adam(1.0), 3)),
    "warm-up from 0": InnerCase(lambda: optax.adam(WARM_UP)),
    "zero for 12 steps": InnerCase(lambda: optax.lion(LATE)),
    "polyak_sgd": InnerCase(lambda: optax.polyak_sgd(1.0)),
    "keep_params_nonnegative": InnerCase(
        lambda: optax.chain(optax.adam(1.0), optax.keep_params_nonnegative())
    ),
    "lion": InnerCase(lambda: optax.lion(1.0)),
    "adagrad": InnerCase(lambda: optax.adagrad(1.0)),
    "adafactor": InnerCase(lambda: optax.adafactor(1.0)),
    "rmsprop": InnerCase(lambda: optax.rmsprop(1.0)),
    "muon": InnerCase(lambda: optax.contrib.muon(1.0)),
    "noise": InnerCase(lambda: optax.noisy_sgd(1.0, eta=1e-2, key=0)),
    "complex parameters": InnerCase(lambda: optax.adam(1.0), dtype=jnp.complex64),
    "bfloat16 parameters": InnerCase(lambda: optax.sgd(1.0, momentum=0.9), dtype=jnp.bfloat16),
    "scale_by_adam": InnerCase(optax.scale_by_adam, False),
    "trace": InnerCase(lambda: optax.trace(0.9), False),
    "identity": InnerCase(optax.identity, False),
    "negative learning rate": InnerCase(lambda: optax.adam(-1.0), False),
    "masked scale_by_adam": InnerCase(lambda: optax.masked(optax.scale_by_adam(), ONLY_W), False),
    "partition with one direction": InnerCase(lambda: partition(optax.adam(1.0), optax.trace(0.9)), False),
    "partition with one late direction": InnerCase(
        lambda: partition(optax.adam(1.0), delayed(optax.identity(), 9)), False
    ),
    "MultiSteps of a direction": InnerCase(lambda: optax.MultiSteps(optax.scale_by_adam(), 3), False),
    "warm-up of a direction": InnerCase(
        lambda: optax.chain(optax.scale_by_adam(), optax.scale_by_schedule(WARM_UP)), False
    ),
    "keep_params_nonnegative of a direction": InnerCase(
        lambda: optax.chain(optax.scale_by_adam(), optax.keep_params_nonnegative()), False
    ),
    "noisy direction": InnerCase(lambda: optax.add_noise(1e-2, 0.5, key=0), False),
    "complex direction": InnerCase(optax.identity, False, jnp.complex64),
}


def loss_fn(params, _=None):
    return sum(jnp.sum(jnp.square(jnp.abs(leaf - 0.5))) for leaf in jax.tree.leaves(params)).astype(
        jnp.float32
    )


def train(make_rule, inner, params):
    """The losses of a training."""
    tx = optax.with_extra_args_support(make_rule(inner))

    def body(carry, _):
        params, state = carry
        loss, grads = jax.value_and_grad(loss_fn)(params)
        grads = jax.tree.map(jnp.conj, grads)  # of complex parameters, the gradient is its conjugate
        updates, state = tx.update(grads, state, params, value=loss, value_fn=loss_fn)
        return (optax.apply_updates(params, updates), state), loss

    return jax.jit(lambda: jax.lax.scan(body, (params, tx.init(params)), length=STEPS)[1])()


def record_range_test(inner, params):
    """The losses of a range test up to its minimum."""
    losses = range_test(loss_fn, params, jnp.zeros((STEPS, 1)), inner=inner, max_learning_rate=0.1).losses
    return losses[: np.argmin(losses) + 1]


def hypergradient(mode, granularity):
    beta = {"additive": 1e-4, "multiplicative": 0.02}[mode]
    labels = LABELS if granularity == "group" else None
    return functools.partial(
        train,
        lambda inner: greedylr_jax.hypergradient(
            inner, 0.02, beta, mode=mode, granularity=granularity, param_labels=labels
        ),
    )


def lr_tuner(method):
    return functools.partial(
        train,
        lambda inner: greedylr_jax.lr_tuner(
            inner, 0.02, explore_steps=20, recompute_every=10, method=method, rollback=False
        ),
    )


RULES = {
    "hypergradient-additive-global": hypergradient("additive", "global"),
    "hypergradient-additive-group": hypergradient("additive", "group"),
    "hypergradient-additive-parameter": hypergradient("additive", "parameter"),
    "hypergradient-multiplicative-global": hypergradient("multiplicative", "global"),
    "hypergradient-multiplicative-group": hypergradient("multiplicative", "group"),
    "hypergradient-multiplicative-parameter": hypergradient("multiplicative", "parameter"),
    "lr_tuner-fit": lr_tuner("fit"),
    "lr_tuner-taylor": lr_tuner("taylor"),
    "auto_lr": functools.partial(train, greedylr_jax.auto_lr),
    "range_test": record_range_test,
}


@pytest.mark.parametrize(("name", "rule"), thinned(crossed(INNERS, RULES), 2))
def test_a_rule_lowers_the_loss_or_rejects_the_inner_optimizer(name, rule):
    make, descends, dtype = INNERS[name]
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), PARAMS)
    if descends:
        losses = RULES[rule](make(), params)
        assert (losses.min() if rule == "auto_lr" else losses[-1]) < 0.999 * losses[0]
        assert losses[-1] <= losses[0]
    else:
        with pytest.raises(ValueError, match="points along the gradient"):
            RULES[rule](make(), params)


def check(inner, params=PARAMS):
    """The check, in which a warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_descends("hypergradient", inner, params)


def test_the_error_names_the_rule_the_leaf_and_the_right_call():
    with pytest.raises(ValueError) as caught:
        check(partition(optax.trace(0.9), optax.sgd(1.0)))
    for part in ("hypergradient: inner must be", "update of ['w'] points along", "pass optax.adam(1.0)"):
        assert part in str(caught.value)
    with pytest.raises(ValueError, match="the update points along the gradient"):
        check(optax.identity(), jnp.ones(3))


@pytest.mark.parametrize(
    "transform",
    [jax.jit, jax.vmap, lambda f: functools.partial(jax.eval_shape, f), lambda f: jax.jit(jax.vmap(f))],
    ids=["jit", "vmap", "eval_shape", "jit-vmap"],
)
def test_the_check_works_while_tracing(transform):
    def run(inner):
        return transform(lambda params: check(inner, params) or params)({"w": jnp.ones((2, 3))})

    run(optax.adam(1.0))
    run(optax.adam(WARM_UP))
    with pytest.raises(ValueError, match="points along the gradient"):
        run(optax.scale_by_adam())
    with pytest.raises(ValueError, match="points along the gradient"):
        run(delayed(optax.identity(), 5))


def test_traced_hyperparameters_of_the_inner_optimizer_are_not_checked():
    with jax.checking_leaks():
        jax.vmap(lambda scale: check(optax.sgd(scale)) or scale)(jnp.array([1.0, 0.5]))
        late = optax.join_schedules([optax.constant_schedule(0.0), lambda count: count], [3])
        jax.jit(lambda scale: check(optax.sgd(lambda count: scale * late(count))) or scale)(1.0)


def test_the_check_needs_neither_memory_nor_values_nor_transfers_of_the_parameters():
    huge = {"w": jax.ShapeDtypeStruct((10**6, 10**6), jnp.float32), "n": jax.ShapeDtypeStruct((), jnp.int32)}
    with jax.transfer_guard("disallow"), jax.debug_nans(True):
        check(optax.adam(1.0), huge)
        check(optax.adam(1.0), {"w": jnp.nan, "masked": optax.MaskedNode(), "none": None, "n": 3})
        check(optax.adam(1.0), {})


def add_constant(shape):
    """An optimizer for parameters of one shape."""
    return optax.chain(optax.sgd(1.0), optax.stateless(lambda updates, _: updates + 1e-3 * jnp.ones(shape)))


def test_an_optimizer_for_one_shape_is_checked_with_that_shape():
    check(add_constant((5, 3)), jnp.ones((5, 3)))
    with pytest.raises(ValueError, match="points along the gradient"):
        check(optax.chain(add_constant((5, 3)), optax.scale(-1.0)), jnp.ones((5, 3)))


def test_an_update_that_fails_on_small_parameters_gives_a_warning():
    with pytest.warns(UserWarning, match="lr_tuner: inner could not be checked.*broadcast"):
        check_descends("lr_tuner", add_constant((500, 300)), jnp.ones((500, 300)))
    reduced = optax.chain(optax.sgd(1.0), optax.stateless(lambda updates, _: jax.lax.pmean(updates, "data")))
    with pytest.warns(UserWarning, match="unbound axis name"):
        check_descends("lr_tuner", reduced, jnp.ones(2))


@pytest.mark.parametrize(
    "inner",
    [
        optax.adamw(1.0, weight_decay=10.0),
        optax.chain(optax.add_decayed_weights(0.1), optax.sgd(1.0)),
        optax.noisy_sgd(1.0, eta=100.0, key=0),
        optax.set_to_zero(),
        optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(5)),
        optax.contrib.momo(1.0),
        optax.contrib.schedule_free_sgd(1.0),
        optax.rprop(1.0),
    ],
    ids=["weight decay", "L2", "noise", "frozen", "line search", "momo", "schedule-free", "rprop"],
)
def test_optimizers_that_pass(inner):
    check(inner)


@pytest.mark.parametrize(
    "inner",
    [
        optax.add_noise(100.0, 0.5, key=0),
        optax.chain(optax.scale_by_lion(), optax.scale_by_schedule(LATE)),
        optax.chain(optax.scale_by_backtracking_linesearch(5), optax.scale(0.5)),
    ],
    ids=["noise", "late lion", "line search"],
)
def test_directions_that_do_not(inner):
    with pytest.raises(ValueError, match="points along the gradient"):
        check(inner)


DECAY = optax.add_decayed_weights(1e-2)
MOMENTUM = {
    "sgd": (optax.sgd(1.0), False),
    "momentum": (optax.sgd(1.0, momentum=0.9), True),
    "adam": (optax.adam(1.0), True),
    "adam without it": (optax.adam(1.0, b1=0.0), False),
    "adagrad": (optax.adagrad(1.0), False),
    "rmsprop": (optax.rmsprop(1.0), False),
    "lion": (optax.lion(1.0), True),
    "weight decay": (optax.chain(DECAY, optax.sgd(1.0)), False),
    "noise": (optax.noisy_sgd(1.0, key=0), False),
    "accumulation": (optax.MultiSteps(optax.chain(DECAY, optax.sgd(1.0)), 4), False),
    "accumulation before momentum": (optax.MultiSteps(optax.sgd(1.0, momentum=0.9), 4), True),
    "warm-up": (optax.sgd(WARM_UP), False),
    "warm-up of momentum": (optax.sgd(WARM_UP, momentum=0.9), True),
    "one leaf": (partition(optax.sgd(1.0, momentum=0.9), optax.set_to_zero()), True),
    "fails": (optax.GradientTransformation(optax.sgd(1.0).init, lambda *_: 1 / 0), True),
}


@pytest.mark.parametrize("name", MOMENTUM)
def test_momentum_is_found(name):
    inner, expected = MOMENTUM[name]
    assert has_momentum(inner, {"w": jnp.ones((64, 3)), "b": jnp.zeros(3)}) is expected


def test_a_momentum_that_is_traced_counts_as_one():
    find = lambda momentum: jnp.asarray(  # noqa: E731
        has_momentum(optax.sgd(1.0, momentum=momentum), {"w": jnp.ones(3), "b": jnp.ones(3)})
    )
    assert jax.vmap(find)(jnp.zeros(2)).all()
