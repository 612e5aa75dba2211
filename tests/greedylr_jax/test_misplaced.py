"""The warning for a rule whose effect is undone by what follows it: in wrong orders, and in no right one."""

import warnings

import jax
import jax.numpy as jnp
import optax
import pytest
from optax import contrib

import greedylr_jax
from greedylr_jax import MisplacedRuleWarning, greedy_lr, greedy_lr_schedule, trend_lr

PARAMS = {"w": jnp.linspace(-1.0, 1.0, 12).reshape(3, 4), "b": jnp.zeros(4)}
LABELS = {"w": "weights", "b": "bias"}
BOTH = {"w": True, "b": True}
SCHEDULE = greedy_lr_schedule(1e-3, min_learning_rate=1e-4, max_learning_rate=1e-2)
WARMUP = optax.warmup_cosine_decay_schedule(0.0, 1e-3, 10, 100)
NEGATIVE_WARMUP = optax.warmup_cosine_decay_schedule(0.0, -1e-3, 10, 100)


def loss_fn(params):
    return sum((jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(params)), start=jnp.zeros(()))


def messages(tx, params=PARAMS):
    """The warnings while a training step with ``tx`` is traced, twice."""
    if not isinstance(tx, optax.MultiSteps):
        tx = optax.with_extra_args_support(tx)

    def step(params, state):
        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, state = tx.update(grads, state, params, value=loss, value_fn=loss_fn)
        return optax.apply_updates(params, updates), state

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        state = tx.init(params)
        for _ in range(2):
            jax.jit(lambda *arguments: step(*arguments)).trace(params, state)  # noqa: PLW0108 (traced anew)
    found = [each for each in caught if issubclass(each.category, MisplacedRuleWarning)]
    assert all(each.filename == __file__ for each in found)
    return [str(each.message) for each in found]


RIGHT = {
    "after adamw": lambda: optax.chain(optax.adamw(1e-3), greedy_lr()),
    "between adam and the rate": lambda: optax.chain(optax.scale_by_adam(), greedy_lr(), optax.scale(-1e-3)),
    "before weight decay": lambda: optax.chain(
        optax.scale_by_adam(), greedy_lr(), optax.add_decayed_weights(0.1), optax.scale_by_learning_rate(1e-3)
    ),
    "after clipping and sgd": lambda: optax.chain(
        optax.clip_by_global_norm(1.0), optax.sgd(0.1, momentum=0.9), greedy_lr()
    ),
    "before plain sgd": lambda: optax.chain(greedy_lr(), optax.sgd(0.1)),
    "before clipping": lambda: optax.chain(greedy_lr(), optax.clip_by_global_norm(1.0), optax.sgd(0.1)),
    "before a moving average": lambda: optax.chain(optax.adam(1e-3), greedy_lr(), optax.ema(0.9)),
    "before a schedule": lambda: optax.chain(
        optax.scale_by_adam(), greedy_lr(), optax.scale_by_schedule(NEGATIVE_WARMUP)
    ),
    "before zero_nans": lambda: optax.chain(optax.adam(1e-3), greedy_lr(), optax.zero_nans()),
    "after a warm-up": lambda: optax.chain(optax.adamw(WARMUP), greedy_lr()),
    "greedylr_jax.chain": lambda: greedylr_jax.chain(greedy_lr(), optax.adamw(1e-3)),
    "nested greedylr_jax.chain": lambda: greedylr_jax.chain(
        greedylr_jax.chain(greedy_lr(), optax.identity()), optax.adamw(1e-3)
    ),
    "schedule": lambda: optax.inject_hyperparams(optax.adamw)(learning_rate=SCHEDULE),
    "schedule in a chain": lambda: optax.chain(
        optax.clip(1.0), optax.inject_hyperparams(optax.adamw)(learning_rate=SCHEDULE)
    ),
    "masked": lambda: optax.chain(optax.adamw(1e-3), optax.masked(greedy_lr(), {"w": True, "b": False})),
    "inside masked": lambda: optax.masked(optax.chain(optax.adamw(1e-3), greedy_lr()), BOTH),
    "partition": lambda: optax.partition(
        {"weights": optax.chain(optax.adamw(1e-3), greedy_lr()), "bias": optax.set_to_zero()}, LABELS
    ),
    "MultiSteps": lambda: optax.MultiSteps(optax.chain(optax.adamw(1e-3), greedy_lr()), 2),
    "multi_steps": lambda: greedylr_jax.multi_steps(optax.chain(optax.adamw(1e-3), greedy_lr()), 2),
    "with_rollback": lambda: greedylr_jax.with_rollback(optax.chain(optax.adamw(1e-3), greedy_lr())),
    "inside lr_tuner": lambda: greedylr_jax.lr_tuner(
        optax.chain(optax.sgd(1.0), greedy_lr()), 0.1, explore_steps=3, recompute_every=3
    ),
    "named_chain": lambda: optax.named_chain(("optimizer", optax.adamw(1e-3)), ("rule", greedy_lr())),
    "injected rate": lambda: optax.inject_hyperparams(
        lambda learning_rate: optax.chain(optax.adam(learning_rate), greedy_lr())
    )(1e-3),
    "apply_if_finite": lambda: optax.apply_if_finite(optax.chain(optax.adamw(1e-3), greedy_lr()), 3),
    "schedule_free": lambda: contrib.schedule_free(optax.chain(optax.sgd(0.1), greedy_lr()), 0.1),
    "mechanize": lambda: contrib.mechanize(optax.chain(optax.sgd(1.0), greedy_lr())),
    "after prodigy": lambda: optax.chain(contrib.prodigy(), greedy_lr()),
    "hybrid": lambda: optax.chain(greedylr_jax.hypergradient(optax.adam(1.0), 1e-3, 1e-3), greedy_lr()),
    "two rules": lambda: optax.chain(optax.adam(1e-3), greedy_lr(), trend_lr()),
    "factor_polling": lambda: optax.chain(optax.sgd(0.1), greedylr_jax.factor_polling()),
}
NO_EFFECT = {
    "before adamw": lambda: optax.chain(greedy_lr(), optax.adamw(1e-3)),
    "between clipping and adam": lambda: optax.chain(optax.clip(1.0), trend_lr(), optax.adam(1e-3)),
    "before scale_by_adam": lambda: optax.chain(greedy_lr(), optax.scale_by_adam(), optax.scale(-1e-3)),
    "before lion": lambda: optax.chain(greedy_lr(), optax.lion(1e-3)),
    "before adafactor": lambda: optax.chain(greedy_lr(), optax.adafactor(1e-3)),
    "before lars": lambda: optax.chain(greedy_lr(), optax.lars(0.1)),
    "in a chain before adamw": lambda: optax.chain(
        optax.chain(optax.clip(1.0), greedy_lr()), optax.adamw(1e-3)
    ),
    "masked before adamw": lambda: optax.chain(optax.masked(greedy_lr(), BOTH), optax.adamw(1e-3)),
    "masked in greedylr_jax.chain": lambda: greedylr_jax.chain(
        optax.masked(greedy_lr(), BOTH), optax.adamw(1e-3)
    ),
    "named_chain": lambda: optax.named_chain(("rule", greedy_lr()), ("optimizer", optax.adamw(1e-3))),
    "inside with_rollback": lambda: greedylr_jax.with_rollback(optax.chain(greedy_lr(), optax.adamw(1e-3))),
    "before a partition": lambda: optax.chain(
        greedy_lr(), optax.partition({"weights": optax.adam(1e-3), "bias": optax.rmsprop(0.01)}, LABELS)
    ),
    "before MultiSteps": lambda: optax.chain(
        greedy_lr(), optax.MultiSteps(optax.adam(1e-3), 2).gradient_transformation()
    ),
    "before a mask by name": lambda: optax.chain(
        greedy_lr(), optax.masked(optax.adam(1e-3), lambda params: {name: True for name in params})
    ),
    "factor_polling": lambda: optax.chain(greedylr_jax.factor_polling(), optax.adam(1e-3)),
}
SCALED = {
    "ScheduleFreeState": lambda: optax.chain(contrib.schedule_free(optax.sgd(0.1), 0.1), greedy_lr()),
    "MechanicState": lambda: optax.chain(contrib.mechanize(optax.sgd(1.0)), greedy_lr()),
    "RollbackState": lambda: optax.chain(greedylr_jax.with_rollback(optax.adam(1e-3)), greedy_lr()),
    "LRTunerState": lambda: optax.chain(
        greedylr_jax.lr_tuner(optax.sgd(1.0), 0.1, explore_steps=3, recompute_every=3), greedy_lr()
    ),
}


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_order_causes_no_warning(name):
    assert messages(RIGHT[name]()) == []


@pytest.mark.parametrize("name", NO_EFFECT)
def test_a_rule_without_effect_causes_one_warning(name):
    (message,) = messages(NO_EFFECT[name]())
    assert "has no effect" in message and "optax.chain(optax.adamw(1e-3), greedy_lr())" in message


@pytest.mark.parametrize("name", SCALED)
def test_a_rule_after_an_optimizer_that_must_not_be_scaled_causes_one_warning(name):
    (message,) = messages(SCALED[name]())
    assert f"an optimizer with a {name}" in message and "Put the rule inside" in message


def test_many_parameters_are_checked_by_few():
    params = [jnp.ones((2, 3)) for _ in range(40)]
    assert len(messages(optax.chain(greedy_lr(), optax.adamw(1e-3)), params)) == 1
    assert messages(optax.chain(optax.adamw(1e-3), greedy_lr(), optax.scale(2.0)), params) == []
    mask = [True] * 40  # which fits these parameters only
    assert len(messages(optax.chain(greedy_lr(), optax.adamw(1e-3, mask=mask)), params)) == 1


def test_what_fails_on_small_gradients_is_no_error():
    def fail(updates, state, params=None):
        assert params["w"].shape == (300, 400), "only for these parameters"
        return updates, state

    special = optax.GradientTransformation(lambda params: optax.EmptyState(), fail)
    params = {"w": jnp.ones((300, 400))}
    assert messages(optax.chain(greedy_lr(), special, optax.adam(1e-3)), params) == []


def test_one_rule_in_a_right_and_in_a_wrong_chain():
    rule = greedy_lr()
    assert messages(optax.chain(optax.adamw(1e-3), rule)) == []
    assert len(messages(optax.chain(rule, optax.adamw(1e-3)))) == 1
    assert messages(optax.chain(optax.adamw(1e-3), rule)) == []


def test_no_parameters_cause_no_warning():
    assert messages(optax.chain(greedy_lr(), optax.adamw(1e-3)), {}) == []


def test_the_first_eager_step_warns_and_later_ones_do_not():
    tx = optax.chain(greedy_lr(), optax.adamw(1e-3))
    state = tx.init(PARAMS)
    with pytest.warns(MisplacedRuleWarning):
        _, state = tx.update(PARAMS, state, PARAMS, value=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            _, state = tx.update(PARAMS, state, PARAMS, value=1.0)
