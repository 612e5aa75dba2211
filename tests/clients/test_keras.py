"""The Keras callback of the examples, with Keras on the JAX backend."""

import os

import numpy as np
import pytest

os.environ.setdefault("KERAS_BACKEND", "jax")
keras = pytest.importorskip("keras")

from examples import keras_callback  # noqa: E402
from greedylr_jax import greedy_lr_schedule, trend_lr_schedule  # noqa: E402
from greedylr_jax.arc import arc_schedule  # noqa: E402

X = np.random.default_rng(0).normal(size=(320, 4)).astype(np.float32)
Y = np.sign(X[:, :1]) + np.arange(320)[:, None] / 100  # batches in order have different losses
BOUNDS = dict(min_learning_rate=1e-9, max_learning_rate=1.0)


class Recorder(keras_callback.LearningRateRule):
    """Records the losses that the rule observes, and the rates that Keras uses."""

    def __init__(self, schedule):
        super().__init__(schedule)
        self.losses, self.rates = [], []
        observe = self._observe
        self._observe = lambda state, loss: (self.losses.append(loss), observe(state, loss))[1]

    def on_train_batch_begin(self, batch, logs=None):
        self.model.jax_state_sync()
        self.rates.append(float(self.model.optimizer.learning_rate))


SCHEDULES = {
    "greedy": greedy_lr_schedule(1e-3, **BOUNDS, factor=0.5, patience=1, window=2),
    "only_decrease": greedy_lr_schedule(1e-3, **BOUNDS, factor=0.5, patience=1, only_decrease=True),
    "trend": trend_lr_schedule(1e-3, **BOUNDS, window=4),
    "arc": arc_schedule(1e-3, steps_per_cycle=4),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_rule_sees_the_loss_of_every_batch_and_sets_the_next_rate(name):
    schedule = SCHEDULES[name]
    recorder = Recorder(schedule)
    model = keras_callback.make_model(1e-3)
    model.fit(X, Y, batch_size=32, epochs=2, shuffle=False, verbose=0, callbacks=[recorder])
    assert len(recorder.losses) == 20
    state, expected = schedule.init(), [1e-3]
    for loss in recorder.losses:
        state = schedule.update(state, value=loss)
        expected.append(float(schedule(state)))
    np.testing.assert_allclose(recorder.rates, expected[:-1], rtol=1e-6)
    assert float(model.optimizer.learning_rate) == pytest.approx(expected[-1], rel=1e-6)
    assert len(set(recorder.rates)) > 1


def test_the_running_mean_is_undone():
    recorder = Recorder(SCHEDULES["greedy"])
    model = keras_callback.make_model(1e-3)
    recorder.state = recorder.state._replace(  # a rate at which the model does not move
        rule_state=recorder.state.rule_state._replace(
            rule=recorder.state.rule_state.rule._replace(scale=np.float32(1e-9))
        )
    )
    model.fit(X, Y, batch_size=32, epochs=1, shuffle=False, verbose=0, callbacks=[recorder])
    batches = [slice(start, start + 32) for start in range(0, 320, 32)]
    expected = [float(np.mean((np.asarray(model(X[each])) - Y[each]) ** 2)) for each in batches]
    np.testing.assert_allclose(recorder.losses, expected, rtol=1e-4)
    assert np.ptp(expected) > 0.5


def test_a_nan_is_observed_once_and_the_next_epoch_continues():
    y = Y.copy()
    y[40] = np.nan
    recorder = Recorder(SCHEDULES["greedy"])
    keras_callback.make_model(1e-3).fit(
        X, y, batch_size=32, epochs=1, shuffle=False, verbose=0, callbacks=[recorder]
    )
    assert np.isfinite(recorder.losses[0]) and np.isnan(recorder.losses[1]) and len(recorder.losses) == 2


def test_only_decrease_equals_reduce_lr_on_plateau_of_keras():
    """``patience`` there is one more than here."""
    values = np.random.default_rng(3).normal(size=60).cumsum() / 8 + 20
    model = keras_callback.make_model(1.0)
    plateau = keras.callbacks.ReduceLROnPlateau("loss", factor=0.5, patience=3, min_delta=1e-6, min_lr=1e-3)
    plateau.set_model(model)
    plateau.on_train_begin()
    schedule = greedy_lr_schedule(
        1.0,
        min_learning_rate=1e-3,
        max_learning_rate=1.0,
        factor=0.5,
        patience=2,
        window=None,
        only_decrease=True,
    )
    state, expected, rates = schedule.init(), [], []
    for epoch, value in enumerate(values):
        plateau.on_epoch_end(epoch, {"loss": value})
        expected.append(float(model.optimizer.learning_rate))
        state = schedule.update(state, value=value)
        rates.append(float(schedule(state)))
    np.testing.assert_allclose(rates, expected, rtol=1e-6)
    assert len(set(expected)) > 4


def test_the_example_raises_a_rate_that_is_too_low(capsys):
    keras_callback.main()
    constant, trend = (line.split() for line in capsys.readouterr().out.splitlines())
    assert float(trend[2].strip(",")) < 0.7 * float(constant[2].strip(","))
    assert float(trend[-1]) > 1e-4 > float(constant[-1])
