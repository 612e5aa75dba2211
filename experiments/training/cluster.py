"""The same studies on many machines, by Ray: each unit of work is the runs of one task and optimizer.

Every machine of the cluster needs this package. A unit whose worker dies is trained again by another one;
units that are finished are in the store and are not lost when the driver itself is interrupted.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from experiments.errors import UsageError

_RETRIES = 3  # of a unit whose worker died


def train_groups(
    groups: Sequence[Any], settings: Any, address: str, train: Callable[[Any, Any], Iterator[list[dict]]]
) -> Iterator[list[dict]]:
    """Trains groups side by side on a cluster, and yields the rows of each as it finishes.

    Args:
      groups: what to train, each a unit of work.
      settings: given to ``train`` with each.
      address: ``"auto"`` for the cluster that runs on this machine, or ``HOST:PORT`` or ``ray://HOST:PORT``.
      train: trains a group; what it yields is collected by the worker.

    Raises:
      UsageError: if Ray is not installed, or there is no cluster at the address.
    """
    try:
        import ray  # noqa: PLC0415  (an extra that only clusters need)
    except ImportError as error:
        raise UsageError('--cluster needs Ray: pip install "greedylr-jax[cluster]"') from error
    if not ray.is_initialized():
        try:
            ray.init(address=address, log_to_driver=False)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise UsageError(
                f"no Ray cluster at {address!r} ({error}); start one with: ray start --head, and on each "
                "other machine: ray start --address HOST:PORT"
            ) from error

    def work(group: Any) -> list[dict]:
        from experiments.training.engine import configure  # noqa: PLC0415  (JAX starts on the worker)

        configure(cpus=1)
        return [row for rows in train(group, settings) for row in rows]

    gpus = 1 if ray.cluster_resources().get("GPU") else 0
    remote = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=_RETRIES)(work)
    waiting = [remote.remote(group) for group in groups]
    try:
        while waiting:
            (done, *_), waiting = ray.wait(waiting, num_returns=1)
            yield ray.get(done)
    finally:
        for unit in waiting:
            ray.cancel(unit, force=True)
