"""Training many runs in one compiled program.

A run is one ``lax.scan``. The runs of a call are an axis that is spread over all devices (on a CPU: one
for each core) and mapped with ``lax.map`` on each, which suits networks: a ``vmap`` over their weights
would turn convolutions and small matrix products into slower batched ones. What tells runs apart (seed,
rates, adaptive rule) is an input, so one compilation serves all schedules of a task and an optimizer.
"""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec

from experiments.schedules import ScheduleInputs, adaptive_scale, schedule_inputs
from experiments.tasks.base import Task

OPTIMIZERS: dict[str, Callable[[float], optax.GradientTransformation]] = {
    "adamw": optax.adamw,
    "sgd": optax.sgd,
}
RUNS_PER_DEVICE = 5  # in one call: what is between two reports of progress


class RunSpec(NamedTuple):
    """One training run."""

    schedule: str
    learning_rate: float
    seed: int


class RunResult(NamedTuple):
    """What a run leaves."""

    loss: np.ndarray  # shape=(steps,); the batch's loss before each update
    rate: np.ndarray  # shape=(steps,); the learning rate of each update
    test_loss: np.ndarray  # shape=()
    test_accuracy: np.ndarray  # shape=()


def configure_devices() -> None:
    """Lets JAX see a CPU as one device a core, so that runs can go side by side.

    Does nothing where JAX has started already: it then works with the devices that it has.
    """
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", os.cpu_count() or 1)


class Engine:
    """Trains runs of one task with one optimizer; compiles once, at the first call."""

    def __init__(self, task: Task, optimizer: str, steps: int):
        self.task, self.optimizer, self.steps = task, optimizer, steps
        self.num_compilations = 0
        devices = jax.local_devices()
        if devices[0].platform == "cpu":  # more devices than cores would only take turns
            devices = devices[: os.cpu_count()]
        self._mesh = jax.sharding.Mesh(np.array(devices), ("runs",))
        self._compiled: Callable[..., RunResult] | None = None

    @property
    def runs_per_call(self) -> int:
        """How many runs one call of the compiled program trains."""
        return self._mesh.size * RUNS_PER_DEVICE

    def train(self, specs: Sequence[RunSpec]) -> Iterator[list[tuple[RunSpec, RunResult]]]:
        """Trains the runs, and yields them in groups as they finish."""
        for start in range(0, len(specs), self.runs_per_call):
            group = specs[start : start + self.runs_per_call]
            # A short last group is filled up with repetitions: another shape would compile again.
            filled = [group[i % len(group)] for i in range(self.runs_per_call)]
            inputs = [schedule_inputs(s.schedule, s.learning_rate, self.steps) for s in filled]
            stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *inputs)
            seeds = np.array([spec.seed for spec in filled], np.uint32)
            results = jax.device_get(self._program(seeds, stacked)(seeds, stacked))
            yield [
                (spec, jax.tree.map(lambda leaf, row=row: leaf[row], results))
                for row, spec in enumerate(group)
            ]

    def _program(self, seeds: np.ndarray, inputs: ScheduleInputs) -> Callable[..., RunResult]:
        if self._compiled is None:
            runs = PartitionSpec("runs")
            mapped = jax.shard_map(
                lambda seeds, inputs: jax.lax.map(lambda run: self._run(*run), (seeds, inputs)),
                mesh=self._mesh,
                in_specs=runs,
                out_specs=runs,
                check_vma=False,
            )
            self._compiled = jax.jit(mapped).lower(seeds, inputs).compile()
            self.num_compilations += 1
        return self._compiled

    def _run(self, seed: jax.Array, inputs: ScheduleInputs) -> RunResult:
        task = self.task
        init_key, batch_key = jax.random.split(jax.random.key(seed))
        params = task.init(init_key)
        # The rate is not a part of the optimizer: it comes step by step, and the rule acts on it.
        optimizer = optax.with_extra_args_support(OPTIMIZERS[self.optimizer](1.0))
        rule = adaptive_scale(inputs.adaptive, task.steps_per_epoch)
        state = (optimizer.init(params), rule.init(params))

        def body(carry: Any, step_inputs: Any) -> Any:
            params, (optimizer_state, rule_state) = carry
            rate, indices = step_inputs
            batch = jax.tree.map(lambda examples: jnp.asarray(examples)[indices], task.train)
            loss, grads = jax.value_and_grad(task.loss)(params, batch)
            updates, optimizer_state = optimizer.update(grads, optimizer_state, params, value=loss)
            # The one beside the updates comes back as the scale, whatever rule it is.
            (updates, scale), rule_state = rule.update((updates, jnp.ones(())), rule_state, value=loss)
            updates = jax.tree.map(lambda update: rate * update, updates)
            params = optax.apply_updates(params, updates)
            return (params, (optimizer_state, rule_state)), (loss, rate * scale)

        (params, _), (loss, rate) = jax.lax.scan(
            body, (params, state), (inputs.rates, batch_indices(task, self.steps, batch_key))
        )
        return RunResult(loss, rate, task.loss(params, task.test), task.accuracy(params, task.test))


def batch_indices(task: Task, steps: int, key: jax.Array) -> jax.Array:
    """Indices of each step's examples: every epoch a new permutation, its remainder left out.

    Returns:
      Shape (steps, batch size).
    """
    per_epoch, size = task.steps_per_epoch, task.batch_size
    examples = len(next(iter(task.train.values())))
    keys = jax.random.split(key, -(-steps // per_epoch))
    permuted = jax.vmap(functools.partial(jax.random.permutation, x=examples))(keys)
    return permuted[:, : per_epoch * size].reshape(-1, size)[:steps]
