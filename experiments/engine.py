"""Training many runs in one compiled program.

A run is one ``lax.scan``. The runs of a call are an axis that is spread over all devices (on a CPU: one
for each core) and mapped with ``lax.map`` on each, which suits networks: a ``vmap`` over their weights
would turn convolutions and small matrix products into slower batched ones. What tells runs apart (seed,
rates, adaptive rule) is an input, so one compilation serves all schedules of a task and an optimizer.
"""

import contextlib
import functools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec

import greedylr_jax
from experiments.schedules import (
    NEEDS_SUPERBATCH,
    OWN_RATES,
    ScheduleInputs,
    adaptive_scale,
    schedule_inputs,
)
from experiments.tasks.base import Batch, Params, Task
from greedylr_jax import superbatch_loss

OPTIMIZERS: dict[str, Callable[[float], optax.GradientTransformation]] = {
    "adamw": optax.adamw,
    "sgd": optax.sgd,
    "adagrad": optax.adagrad,
    # As the Hugging Face trainer sets it up: the rate is absolute, and not relative to the parameters.
    "adafactor": lambda rate: optax.adafactor(rate, multiply_by_parameter_scale=False),
}
SUPERBATCH = 10  # batches
RUNS_PER_DEVICE = 5  # in one call: what is between two reports of progress


class RunSpec(NamedTuple):
    """One training run."""

    schedule: str
    learning_rate: float
    seed: int


def make_specs(
    schedules: Sequence[str], learning_rates: Sequence[float], seeds: Iterable[int]
) -> list[RunSpec]:
    """Every schedule at every initial rate with every seed."""
    return [
        RunSpec(schedule, rate, seed) for seed in seeds for rate in learning_rates for schedule in schedules
    ]


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
    """Trains runs of one task with one optimizer.

    All passive and zeroth-order schedules share one compilation, at the first call; each rule that keeps its
    own rates (:data:`experiments.schedules.OWN_RATES`) has another.
    """

    def __init__(self, task: Task, optimizer: str, steps: int):
        self.task, self.optimizer, self.steps = task, optimizer, steps
        devices = jax.local_devices()
        if devices[0].platform == "cpu":  # more devices than cores would only take turns
            devices = devices[: os.cpu_count()]
        self._mesh = jax.sharding.Mesh(np.array(devices), ("runs",))
        self._compiled: dict[str | None, Callable[..., RunResult]] = {}  # None: the shared one

    @property
    def runs_per_call(self) -> int:
        """How many runs one call of the compiled program trains."""
        return self._mesh.size * RUNS_PER_DEVICE

    @property
    def num_compilations(self) -> int:
        """How many training programs were compiled so far."""
        return len(self._compiled)

    def train(self, specs: Sequence[RunSpec]) -> Iterator[list[tuple[RunSpec, RunResult]]]:
        """Trains the runs, and yields them in groups as they finish."""
        by_program: dict[str | None, list[RunSpec]] = {}
        for spec in specs:
            by_program.setdefault(spec.schedule if spec.schedule in OWN_RATES else None, []).append(spec)
        for rule, together in by_program.items():
            for start in range(0, len(together), self.runs_per_call):
                yield self._train_group(rule, together[start : start + self.runs_per_call])

    def _train_group(self, rule: str | None, group: list[RunSpec]) -> list[tuple[RunSpec, RunResult]]:
        # A short last group is filled up with repetitions: another shape would compile again.
        filled = [group[i % len(group)] for i in range(self.runs_per_call)]
        inputs = [schedule_inputs(s.schedule, s.learning_rate, self.steps) for s in filled]
        stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *inputs)
        seeds = np.array([spec.seed for spec in filled], np.uint32)
        results = jax.device_get(self._program(rule, seeds, stacked)(seeds, stacked))
        return [
            (spec, jax.tree.map(lambda leaf, row=row: leaf[row], results)) for row, spec in enumerate(group)
        ]

    def _program(
        self, rule: str | None, seeds: np.ndarray, inputs: ScheduleInputs
    ) -> Callable[..., RunResult]:
        if rule not in self._compiled:
            runs = PartitionSpec("runs")
            mapped = jax.shard_map(
                lambda seeds, inputs: jax.lax.map(lambda run: self._run(rule, *run), (seeds, inputs)),
                mesh=self._mesh,
                in_specs=runs,
                out_specs=runs,
                check_vma=False,
            )
            self._compiled[rule] = jax.jit(mapped).lower(seeds, inputs).compile()
        return self._compiled[rule]

    def _run(self, rule: str | None, seed: jax.Array, inputs: ScheduleInputs) -> RunResult:
        task = self.task
        init_key, batch_key = jax.random.split(jax.random.key(seed))
        params = task.init(init_key)
        optimizer = optax.with_extra_args_support(OPTIMIZERS[self.optimizer](1.0))
        if rule is None:
            stepper = _shared_stepper(optimizer, inputs.adaptive, task.steps_per_epoch)
        else:
            stepper = _own_rate_stepper(OWN_RATES[rule](optimizer, inputs.rates[0], self.steps))
        batches = batch_indices(task, self.steps, batch_key)

        def body(carry: Any, step_inputs: Any) -> Any:
            params, state = carry
            rate, step, indices = step_inputs
            batch = _take(task.train, indices)
            loss, grads = jax.value_and_grad(task.loss)(params, batch)

            def value_fn(params: Params) -> jax.Array:
                # The loss on the batch of the step, or on a superbatch, is asked for only now and then.
                if rule not in NEEDS_SUPERBATCH:
                    return task.loss(params, batch)
                rows = (step + jnp.arange(SUPERBATCH)) % len(batches)
                return superbatch_loss(lambda p, row: task.loss(p, _take(task.train, batches[row])), rows)(
                    params
                )

            updates, state, rate = stepper.update(grads, state, params, rate, loss, value_fn)
            return (optax.apply_updates(params, updates), state), (loss, rate)

        steps = (inputs.rates, jnp.arange(self.steps), batches)
        (params, _), (loss, rate) = jax.lax.scan(body, (params, stepper.init(params)), steps)
        return RunResult(loss, rate, task.loss(params, task.test), task.accuracy(params, task.test))


class _Stepper(NamedTuple):
    """From gradients to updates, and to the rate that they were made with."""

    init: Callable[[Params], Any]
    update: Callable[..., tuple[optax.Updates, Any, jax.Array]]


def _shared_stepper(
    optimizer: optax.GradientTransformationExtraArgs, adaptive: jax.Array, steps_per_epoch: int
) -> _Stepper:
    """Any passive or zeroth-order schedule: which one is an input of the program."""
    rule = adaptive_scale(adaptive, steps_per_epoch)

    def update(grads, state, params, rate, loss, value_fn):
        del value_fn
        optimizer_state, rule_state = state
        updates, optimizer_state = optimizer.update(grads, optimizer_state, params, value=loss)
        # A rule only scales what it is given, so a 1 comes back as the scale, whatever rule it is; the
        # updates themselves would be copied on their way through the choice of rules.
        scale, rule_state = rule.update(jnp.ones(()), rule_state, value=loss)
        updates = jax.tree.map(lambda leaf: rate * scale * leaf, updates)
        return updates, (optimizer_state, rule_state), rate * scale

    return _Stepper(lambda params: (optimizer.init(params), rule.init(params)), update)


def _own_rate_stepper(tx: optax.GradientTransformationExtraArgs) -> _Stepper:
    """A rule that keeps its own rates, around the optimizer."""

    def update(grads, state, params, rate, loss, value_fn):
        updates, state = tx.update(grads, state, params, value=loss, value_fn=value_fn)
        read = greedylr_jax.metrics(state)
        return updates, state, read.get("learning_rate", rate * read.get("scale", 1))

    return _Stepper(tx.init, update)


def _take(examples: Batch, indices: jax.Array) -> Batch:
    return jax.tree.map(lambda leaf: jnp.asarray(leaf)[indices], examples)


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
