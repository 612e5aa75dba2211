"""Learning-rate rules that adapt to the training loss inside the jitted training step.

The public names are those in ``__all__``. Modules whose names start with an underscore are private.

Examples:
  >>> import jax.numpy as jnp, optax, greedylr_jax
  >>> tx = optax.chain(optax.adamw(1e-3), greedylr_jax.greedy_lr(patience=0))
  >>> params = jnp.ones(3)
  >>> updates, state = tx.update(params, tx.init(params), params, value=1.0)
  >>> print(greedylr_jax.get_learning_rate(state, base_learning_rate=1e-3))
  0.0010526316
"""

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

from greedylr_jax import probing
from greedylr_jax._accumulation import MultiStepsState, multi_steps
from greedylr_jax._auto import AutoState, auto_lr
from greedylr_jax._chain import chain
from greedylr_jax._greedy import GreedyLRState, greedy_lr, greedy_lr_schedule
from greedylr_jax._hypergradient import HypergradientState, hypergradient
from greedylr_jax._misplaced import MisplacedRuleWarning
from greedylr_jax._placement import assert_controls_learning_rate
from greedylr_jax._reading import (
    get_learning_rate,
    get_scale,
    metrics,
    set_learning_rate,
    set_scale,
)
from greedylr_jax._relative import ScaleToParametersState, scale_to_parameters
from greedylr_jax._rollback import RollbackState, with_rollback
from greedylr_jax._rule import (
    GradientTransformationExtraLoss,
    RateState,
    Rule,
    RuleSchedule,
    RuleScheduleState,
    RuleState,
    scale_by_rule,
    schedule_by_rule,
)
from greedylr_jax._trend import TrendState, trend_lr, trend_lr_schedule
from greedylr_jax._value_sources import (
    LossSlot,
    ObservedState,
    add_loss_slot,
    fill_loss_slot,
    observe,
    value_from,
    value_from_observe,
    value_from_slot,
)
from greedylr_jax.probing import (
    FactorPollingState,
    LRTunerState,
    factor_polling,
    lr_tuner,
    superbatch_loss,
)

if TYPE_CHECKING:
    from greedylr_jax import arc, checkpoint, flax, plotting, range_test, schedules, theory

__version__ = "0.1.0"

__all__ = [
    "AutoState",
    "FactorPollingState",
    "GradientTransformationExtraLoss",
    "GreedyLRState",
    "HypergradientState",
    "LRTunerState",
    "LossSlot",
    "MisplacedRuleWarning",
    "MultiStepsState",
    "ObservedState",
    "RateState",
    "RollbackState",
    "Rule",
    "RuleSchedule",
    "RuleScheduleState",
    "RuleState",
    "ScaleToParametersState",
    "TrendState",
    "add_loss_slot",
    "arc",
    "assert_controls_learning_rate",
    "auto_lr",
    "chain",
    "checkpoint",
    "factor_polling",
    "fill_loss_slot",
    "flax",
    "get_learning_rate",
    "get_scale",
    "greedy_lr",
    "greedy_lr_schedule",
    "hypergradient",
    "lr_tuner",
    "metrics",
    "multi_steps",
    "observe",
    "plotting",
    "probing",
    "range_test",
    "scale_by_rule",
    "scale_to_parameters",
    "schedule_by_rule",
    "schedules",
    "set_learning_rate",
    "set_scale",
    "superbatch_loss",
    "theory",
    "trend_lr",
    "trend_lr_schedule",
    "value_from",
    "value_from_observe",
    "value_from_slot",
    "with_rollback",
]

# Modules that are imported at their first use: they take longer to import or need further packages.
_LAZY = frozenset({"arc", "checkpoint", "flax", "plotting", "range_test", "schedules", "theory"})


def __getattr__(name: str) -> ModuleType:
    if name in _LAZY:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
