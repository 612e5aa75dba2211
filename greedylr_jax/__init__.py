"""Learning-rate rules that watch training and set the rate themselves, inside the jitted step."""

import importlib
from types import ModuleType

from greedylr_jax._accumulation import MultiStepsState, multi_steps
from greedylr_jax._auto import AutoState, auto_lr
from greedylr_jax._chain import chain
from greedylr_jax._greedy import GreedyLRState, greedy_lr, greedy_lr_schedule
from greedylr_jax._hypergradient import HypergradientState, hypergradient
from greedylr_jax._reading import (
    assert_controls_learning_rate,
    get_learning_rate,
    get_scale,
    metrics,
)
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
from greedylr_jax.probing import (
    FactorPollingState,
    LRTunerState,
    factor_polling,
    lr_tuner,
    superbatch_loss,
)

# Optional parts, imported when they are first used: they need more time or further packages.
_LAZY = ("arc", "checkpoint", "flax", "plotting", "probing", "range_test", "schedules", "theory")

__version__ = "0.1.0"

__all__ = [
    "AutoState",
    "FactorPollingState",
    "GradientTransformationExtraLoss",
    "GreedyLRState",
    "HypergradientState",
    "LRTunerState",
    "MultiStepsState",
    "RateState",
    "RollbackState",
    "Rule",
    "RuleSchedule",
    "RuleScheduleState",
    "RuleState",
    "TrendState",
    "assert_controls_learning_rate",
    "auto_lr",
    "chain",
    "factor_polling",
    "get_learning_rate",
    "get_scale",
    "greedy_lr",
    "greedy_lr_schedule",
    "hypergradient",
    "lr_tuner",
    "metrics",
    "multi_steps",
    "scale_by_rule",
    "schedule_by_rule",
    "superbatch_loss",
    "trend_lr",
    "trend_lr_schedule",
    "with_rollback",
]


def __getattr__(name: str) -> ModuleType:
    if name in _LAZY:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
