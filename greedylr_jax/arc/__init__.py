"""ARC, a learned controller of the learning rate: the rule, its network, its features and its weights.

Examples:
  >>> import jax.numpy as jnp, optax
  >>> from greedylr_jax.arc import arc
  >>> tx = optax.chain(optax.adamw(1e-3), arc(steps_per_cycle=100))
  >>> updates, state = tx.update(jnp.ones(3), tx.init(jnp.ones(3)), jnp.ones(3), value=1.0)
"""

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
