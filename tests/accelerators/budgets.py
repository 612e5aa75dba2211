"""What each rule may add to a train step, counted in the program compiled for a TPU or GPU.

The numbers are those of JAX 0.10.2 for the perceptron of ``bench accelerators`` with AdamW, whose bare step has 15
kernels and one copy on an H100. A change that lowers one should lower its budget here, too.
"""

from typing import NamedTuple


class Budget(NamedTuple):
    """Upper bounds, relative to the bare optimizer."""

    kernels: int  # on one H100
    copies: int  # on one H100; nearly all are of single numbers of the state
    gpu_streams: float  # bytes that each step reads and writes on an H100, in copies of the parameters
    tpu_streams: float  # the same on a v5e
    conditionals: int = 0
    loops: int = 0
    all_reduces: int = 0  # with a batch that is split over devices
    mapped_all_reduces: int = 0  # under shard_map with axis_name


SMALL = 0.05  # of the parameters: no operation of their size

BUDGETS = {
    "reduce_on_plateau": Budget(1, 4, SMALL, SMALL, conditionals=1),
    "greedy_lr, window None": Budget(3, 6, SMALL, SMALL),
    "greedy_lr": Budget(6, 6, SMALL, SMALL),
    "greedy_lr, paper": Budget(8, 4, SMALL, SMALL),
    "trend_lr": Budget(8, 6, SMALL, SMALL),
    "arc": Budget(6, 10, SMALL, SMALL, conditionals=1, loops=1),
    "hypergradient": Budget(9, 0, 4.0, 3.0),
    "auto_lr": Budget(8, 0, 5.0, 1.0),
    "lr_tuner": Budget(20, 9, 15.0, 11.2, conditionals=1, loops=1, all_reduces=1, mapped_all_reduces=3),
    "factor_polling": Budget(5, 0, 4.0, 3.3, conditionals=1, all_reduces=1, mapped_all_reduces=1),
    "with_rollback": Budget(27, 34, 10.0, 6.1, loops=1, mapped_all_reduces=2),
}
