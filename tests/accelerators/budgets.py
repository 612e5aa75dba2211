"""What each rule may add to a train step, counted in the program compiled for a TPU or GPU.

The numbers are those of JAX 0.10.2, and of 0.12 where its programs for GPUs differ, for the perceptron of
``bench accelerators`` with AdamW, whose bare step has 15 kernels and one copy on an H100. A change that
lowers one should lower its budget here, too.
"""

from typing import NamedTuple

import jax


class Budget(NamedTuple):
    """Upper bounds, relative to the bare optimizer.

    Most copies are of single numbers of the state. Bytes are those that each step reads and writes, in copies
    of the parameters, with float32 and with bfloat16 parameters.
    """

    one_gpu: tuple[int, int]  # kernels and copies on one H100
    several_gpus: tuple[int, int]  # the same on each of several, over which the batch is split
    gpu_bytes: tuple[float, float]
    tpu_bytes: tuple[float, float]  # on a v5e
    conditionals: int = 0
    loops: int = 0
    all_reduces: int = 0  # with a batch that is split over devices
    mapped_all_reduces: int = 0  # under shard_map with axis_name


SMALL = (0.011, 0.011)  # no operation on the parameters: the smaller matrix is 0.038 of them

BUDGETS = {
    "reduce_on_plateau": Budget((1, 4), (1, 4), SMALL, SMALL, conditionals=1),
    "greedy_lr, window None": Budget((4, 2), (4, 0), SMALL, SMALL),
    "greedy_lr": Budget((2, 0), (2, 0), SMALL, SMALL),
    "greedy_lr, paper": Budget((5, 2), (5, 2), SMALL, SMALL),
    "trend_lr": Budget((3, 3), (10, 6), SMALL, SMALL),
    "arc": Budget((4, 1), (4, 3), SMALL, SMALL, conditionals=1),
    "hypergradient": Budget((9, -1), (7, 0), (3.94, 4.03), (2.01, 2.01)),
    "auto_lr": Budget((7, 0), (7, 0), (4.01, 3.05), SMALL),
    "lr_tuner": Budget(
        (19, 8),
        (19, 10),
        (13.03, 14.05),
        (11.2, 11.32),
        conditionals=1,
        loops=1,
        all_reduces=1,
        mapped_all_reduces=3,
    ),
    "factor_polling": Budget(
        (5, 0), (5, 1), (4.01, 3.01), (2.09, 3.25), conditionals=1, all_reduces=1, mapped_all_reduces=1
    ),
    "with_rollback": Budget((16, 28), (16, 29), (7.51, 14.75), (6.01, 6.01), loops=1, mapped_all_reduces=2),
}

# What is different with JAX 0.12. Over several GPUs some rules move one or two copies of float32 parameters
# more; on one GPU with bfloat16 the smaller matrix is read and written once more.
_LATER = {
    "reduce_on_plateau": {"gpu_bytes": (0.011, 0.076)},
    "greedy_lr, window None": {"gpu_bytes": (0.011, 0.077)},
    "greedy_lr": {"gpu_bytes": (0.011, 0.079), "one_gpu": (2, 1)},
    "greedy_lr, paper": {"gpu_bytes": (1.011, 0.079)},
    "trend_lr": {"gpu_bytes": (1.011, 0.078), "one_gpu": (3, 4)},
    "arc": {"gpu_bytes": (1.011, 0.086), "one_gpu": (4, 4)},
    "hypergradient": {"one_gpu": (8, 0), "several_gpus": (6, 0)},
    "auto_lr": {"gpu_bytes": (5.01, 4.01)},
    "lr_tuner": {"gpu_bytes": (15.03, 14.05), "one_gpu": (18, 9), "several_gpus": (18, 10)},
    "factor_polling": {"one_gpu": (4, 0), "several_gpus": (4, 0)},
    "with_rollback": {"gpu_bytes": (8.51, 14.79), "one_gpu": (16, 29)},
}


def budget_of(rule: str) -> Budget:
    """The budget of a rule with the installed version of JAX."""
    is_later = jax.version.__version_info__ >= (0, 11)
    return BUDGETS[rule]._replace(**(_LATER[rule] if is_later else {}))
