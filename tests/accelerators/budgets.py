"""What each rule may add to a train step, counted in the program compiled for a TPU or GPU.

The numbers are those of JAX 0.10.2 for the perceptron of ``bench accelerators`` with AdamW, whose bare step
has 15 kernels and one copy on an H100. A change that lowers one should lower its budget here, too.
"""

from typing import NamedTuple


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
