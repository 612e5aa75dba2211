"""ARC, the learned controller: the rule, its network, its features and its weights."""

from greedylr_jax.arc._controller import ArcState, arc, arc_schedule
from greedylr_jax.arc._features import batch_features
from greedylr_jax.arc._network import ACTIONS, action_probabilities, initial_weights
from greedylr_jax.arc._weights import load_keras_weights, load_weights

__all__ = [
    "ACTIONS",
    "ArcState",
    "action_probabilities",
    "arc",
    "arc_schedule",
    "batch_features",
    "initial_weights",
    "load_keras_weights",
    "load_weights",
]
