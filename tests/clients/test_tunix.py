"""The tunix hook of the examples, with tunix's own trainer."""

import numpy as np
import optax
import pytest

pytest.importorskip("tunix")

from examples import tunix_hook
from greedylr_jax import get_learning_rate, get_scale, value_from_observe, with_rollback
from tests.greedylr_jax.rules import BASE_RATE, SCALE_RULES


class Recorder(tunix_hook.ObserveLoss):
    def __init__(self):
        self.losses, self.rates = [], []

    def on_train_step_end(self, train_ctx, train_step, train_loss):
        self.losses.append(float(train_loss))
        self.rates.append(float(get_learning_rate(train_ctx.optimizer.opt_state, BASE_RATE)))
        super().on_train_step_end(train_ctx, train_step, train_loss)


@pytest.mark.parametrize("case", SCALE_RULES, ids=lambda case: case.name)
@pytest.mark.parametrize("adapter", ["transformation", "schedule"])
@pytest.mark.parametrize("accumulation", [None, 2])
def test_rules_see_every_loss_in_tunix(case, adapter, accumulation):
    if adapter == "schedule":
        inner = optax.inject_hyperparams(optax.sgd)(case.schedule())
    else:
        inner = optax.chain(optax.sgd(BASE_RATE), case.transformation())
    recorder = Recorder()
    tunix_hook.train(value_from_observe(inner), recorder, 12, accumulation)
    assert len(recorder.losses) == 12
    # The hook reports step t when step t + 1 has been made; the rule acts at step t + 2. The loss of the
    # first step is reported after the second, those of the last two come too late.
    rule = case.transformation()
    state, expected = rule.init(None), []
    for loss in recorder.losses[:10]:
        _, state = rule.update(None, state, value=np.float32(loss))
        expected.append(float(get_scale(state)) * BASE_RATE)
    np.testing.assert_allclose(recorder.rates[1:11], expected, rtol=1e-5)
    assert len(set(expected)) > 1


def test_rollback_works_in_tunix():
    tx = value_from_observe(with_rollback(optax.sgd(0.1), window=2))
    trainer, loss = tunix_hook.train(tx, tunix_hook.ObserveLoss(), 12)
    assert np.isfinite(loss)
    assert int(trainer.optimizer.opt_state.inner_state.num_skipped[...]) == 0


def test_the_example_raises_a_rate_that_is_too_low(capsys):
    tunix_hook.main()
    constant, greedy = (line.split() for line in capsys.readouterr().out.splitlines()[-2:])
    assert float(greedy[2].strip(",")) < 0.5 * float(constant[2])
