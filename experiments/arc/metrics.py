"""Metrics of a candidate network on held-out samples, and how well they predict how it controls a training.

Paper: X. Dong et al., "To Raise or Not To Raise: The Autonomous Learning Rate Question", Appendix A.1,
Table 5 and Figure 7: none of accuracy, Matthews correlation coefficient, validation loss, calibration error
and weighted accuracy selects a better candidate than the end of training does.
"""

import numpy as np
import polars as pl
from scipy import stats
from sklearn.metrics import matthews_corrcoef

# Reward of an action (columns) for a label (rows), both in the order raise, keep, lower. Right: 1; one action
# off: 0; raising where the rate should be lowered, which may diverge: -1; lowering instead of raising: -0.5.
# The entries of the paper's Table 5 are not in the copy of it that this was written from.
REWARDS = np.array([[1.0, 0.0, -0.5], [0.0, 1.0, 0.0], [-1.0, 0.0, 1.0]])
METRICS = ("accuracy", "mcc", "loss", "calibration_error", "weighted_accuracy")
LOWER_IS_BETTER = ("loss", "calibration_error")
_BINS = 10


def held_out_metrics(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """The five metrics of Appendix A.1.

    Args:
      probabilities: of raise, keep and lower, shape (n, 3).
      labels: indices of the right actions, shape (n,).

    Returns:
      A dict with the keys :data:`METRICS`: ``accuracy``; ``mcc``: Matthews correlation coefficient; ``loss``:
      mean cross-entropy; ``calibration_error``: mean absolute difference between confidence and accuracy over
      ten bins of confidence, weighted by their samples; ``weighted_accuracy``: mean of :data:`REWARDS`.

    Examples:
      >>> certain = np.eye(3)[[0, 1, 2, 0]]
      >>> {name: round(float(value), 2) for name, value in held_out_metrics(certain, [0, 1, 2, 2]).items()}
      {'accuracy': 0.75, 'mcc': 0.7, 'loss': 6.91, 'calibration_error': 0.25, 'weighted_accuracy': 0.5}
    """
    labels = np.asarray(labels)
    actions = probabilities.argmax(axis=1)
    is_right, confidence = actions == labels, probabilities.max(axis=1)
    bins = np.minimum((confidence * _BINS).astype(int), _BINS - 1)
    gaps = [
        abs(is_right[bins == each].mean() - confidence[bins == each].mean()) * (bins == each).mean()
        for each in np.unique(bins)
    ]
    right = np.maximum(probabilities[np.arange(len(labels)), labels], 1e-12)
    return {
        "accuracy": float(is_right.mean()),
        "mcc": float(matthews_corrcoef(labels, actions)),
        "loss": float(-np.log(right).mean()),
        "calibration_error": float(np.sum(gaps)),
        "weighted_accuracy": float(REWARDS[labels, actions].mean()),
    }


def by_metric(measured: pl.DataFrame, scores: dict[int, float]) -> pl.DataFrame:
    """Figure 7: for each metric, the candidate that it selects and that candidate's score as a controller.

    Args:
      measured: one row per candidate with ``candidate`` and the columns :data:`METRICS`.
      scores: by candidate, on a training that it controls; the higher the better.

    Returns:
      A frame with ``metric`` (last "proxy task": selection by the score itself), ``candidate``, ``score``,
      and ``correlation``: Spearman's, of the metric with the score, positive where a better metric goes with
      a better score; None where it is not defined.
    """
    ordered = np.array([scores[number] for number in measured["candidate"]])
    rows = []
    for name in METRICS:
        values = measured[name].to_numpy() * (-1 if name in LOWER_IS_BETTER else 1)
        varies = np.ptp(values) > 0 and np.ptp(ordered) > 0
        chosen = int(np.argmax(values))
        rows.append(
            {
                "metric": name,
                "candidate": int(measured["candidate"][chosen]),
                "score": float(ordered[chosen]),
                "correlation": float(stats.spearmanr(values, ordered).statistic) if varies else None,
            }
        )
    best = int(np.argmax(ordered))
    rows.append(
        {
            "metric": "proxy task",
            "candidate": int(measured["candidate"][best]),
            "score": float(ordered[best]),
            "correlation": None,
        }
    )
    return pl.DataFrame(rows, infer_schema_length=None)
