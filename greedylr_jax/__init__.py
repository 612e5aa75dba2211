"""Learning-rate rules that watch training and set the rate themselves, inside the jitted step."""

from greedylr_jax.accumulation import MultiStepsState, multi_steps
from greedylr_jax.auto import AutoState, auto_lr
from greedylr_jax.base import (
    GradientTransformationExtraLoss,
    RateState,
    Rule,
    RuleSchedule,
    RuleScheduleState,
    RuleState,
    chain,
    scale_by_rule,
    schedule_by_rule,
)
from greedylr_jax.greedy import GreedyLRState, greedy_lr, greedy_lr_schedule
from greedylr_jax.hypergradient import HypergradientState, hypergradient
from greedylr_jax.probing import (
    FactorPollingState,
    LRTunerState,
    factor_polling,
    lr_tuner,
    superbatch_loss,
)
from greedylr_jax.reading import (
    assert_controls_learning_rate,
    get_learning_rate,
    get_scale,
    metrics,
)
from greedylr_jax.rollback import RollbackState, with_rollback
from greedylr_jax.trend import TrendState, trend_lr, trend_lr_schedule

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
