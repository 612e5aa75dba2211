"""A rule that sets the learning rate of Keras (JAX backend), from a callback.

Keras has its own optimizers, so the rule is used as a schedule outside of any Optax transformation. The
callback feeds it the loss of every batch and assigns the rate to the optimizer when it changes.

    KERAS_BACKEND=jax python examples/keras_callback.py
"""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")

import jax
import keras
import numpy as np

import greedylr_jax


class LearningRateRule(keras.callbacks.Callback):
    """Sets ``model.optimizer.learning_rate`` by a schedule of greedylr_jax, from the loss of each batch.

    Keras logs the running mean of the losses of an epoch, in which every loss is visible only at 1/n. The
    callback undoes it: with means m and M after n - 1 and n batches, the loss of batch n is n M - (n - 1) m.
    (Keras weighs by batch size. In a smaller last batch, this gives a mean of its loss and the epoch's.)

    Args:
      schedule: the rule, such as ``greedylr_jax.greedy_lr_schedule(...)``, whose initial value replaces the
        optimizer's rate.
    """

    def __init__(self, schedule):
        super().__init__()
        self.schedule = schedule
        self.state = schedule.init()
        self._observe = jax.jit(lambda state, loss: schedule.update(state, value=loss))

    @property
    def learning_rate(self):
        return float(self.schedule(self.state))

    def on_train_begin(self, logs=None):
        self.model.optimizer.learning_rate = self.learning_rate

    def on_epoch_begin(self, epoch, logs=None):
        self._batches, self._mean = 0, 0.0

    def on_train_batch_end(self, batch, logs=None):
        batches, mean = batch + 1, float(logs["loss"])  # with steps_per_execution, several batches
        if not np.isfinite(self._mean):
            return  # the mean stays NaN until the end of the epoch: the losses are unknown
        loss = (batches * mean - self._batches * self._mean) / (batches - self._batches)
        self._batches, self._mean = batches, mean
        before = self.learning_rate
        self.state = self._observe(self.state, np.float32(loss))
        if self.learning_rate != before:
            self.model.jax_state_sync()  # fit() reads variables again after a synchronization only
            self.model.optimizer.learning_rate = self.learning_rate


def make_model(learning_rate):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.layers.Dense(64, activation="tanh"), keras.layers.Dense(1)])
    model.compile(keras.optimizers.Adam(learning_rate), "mse")
    return model


def main():
    x = np.random.default_rng(0).normal(size=(2048, 8)).astype(np.float32)
    y = np.sin(x[:, :1] + x[:, 1:2])
    schedule = greedylr_jax.trend_lr_schedule(1e-5, min_learning_rate=1e-6, max_learning_rate=1e-1)
    for name, callbacks in {"constant": [], "trend_lr": [LearningRateRule(schedule)]}.items():
        model = make_model(1e-5)
        history = model.fit(x, y, batch_size=32, epochs=8, verbose=0, callbacks=callbacks)
        rate = float(model.optimizer.learning_rate)
        print(f"{name}: loss {history.history['loss'][-1]:.4f}, learning rate {rate:.5f}")


if __name__ == "__main__":
    main()
