"""Rules that evaluate the loss along the step before they take it."""

from greedylr_jax.probing._lr_tuner import LRTunerState, lr_tuner
from greedylr_jax.probing._polling import FactorPollingState, factor_polling
from greedylr_jax.probing._probe import superbatch_loss

__all__ = ["FactorPollingState", "LRTunerState", "factor_polling", "lr_tuner", "superbatch_loss"]
