"""Training on a Ray cluster: a unit of work is the runs of one task and optimizer.

The code of the checkout (``experiments`` and ``greedylr_jax``) is sent to the workers; the machines of the
cluster need the dependencies only. Ray trains a unit again if its worker dies. Finished units are in the
store and survive an interruption of the driver.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from experiments.errors import UsageError

_RETRIES = 3  # of a unit whose worker died
_ROOT = Path(__file__).parents[2]  # of the checkout
_PACKAGES = ("experiments", "greedylr_jax")


def runtime_env() -> dict[str, Any]:
    """Ray's runtime environment of the workers, with the packages of this checkout."""
    return {"py_modules": [str(_ROOT / name) for name in _PACKAGES], "excludes": ["__pycache__"]}


def train_groups(
    groups: Sequence[Any], settings: Any, address: str, train: Callable[[Any, Any], Iterator[list[dict]]]
) -> Iterator[list[dict]]:
    """Trains groups in parallel on a cluster and yields the rows of each as it finishes.

    Args:
      groups: the units of work.
      settings: passed to ``train`` with each group.
      address: ``"auto"`` for the cluster on this machine, ``HOST:PORT`` or ``ray://HOST:PORT``.
      train: trains a group and yields its rows, which the worker collects. It must be a function of a module
        of the checkout.

    Raises:
      UsageError: if Ray is not installed, or there is no cluster at the address.
    """
    try:
        import ray  # noqa: PLC0415  (an optional dependency)
    except ImportError as error:
        raise UsageError('--cluster needs Ray: pip install "greedylr-jax[cluster]"') from error
    if not ray.is_initialized():
        try:
            ray.init(address=address, runtime_env=runtime_env(), log_to_driver=False)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise UsageError(
                f"no Ray cluster at {address!r} ({error}); start one with: ray start --head, and on each "
                "other machine: ray start --address HOST:PORT"
            ) from error

    def work(group: Any) -> list[dict]:
        from experiments.training.engine import configure  # noqa: PLC0415  (initializes JAX on the worker)

        configure(cpus=1)
        return [row for rows in train(group, settings) for row in rows]

    gpus = 1 if ray.cluster_resources().get("GPU") else 0
    remote = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=_RETRIES)(work)
    pending = [remote.remote(group) for group in groups]
    try:
        while pending:
            (done, *_), pending = ray.wait(pending, num_returns=1)
            yield ray.get(done)
    finally:
        for unit in pending:
            ray.cancel(unit, force=True)
