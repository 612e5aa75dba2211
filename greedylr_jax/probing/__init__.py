"""Rules that evaluate the loss along the step before they take it."""

from greedylr_jax.probing.lr_tuner import LRTunerState, lr_tuner
from greedylr_jax.probing.polling import FactorPollingState, factor_polling
from greedylr_jax.probing.probe import superbatch_loss

__all__ = ["FactorPollingState", "LRTunerState", "factor_polling", "lr_tuner", "superbatch_loss"]
