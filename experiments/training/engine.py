"""Training many runs in one compiled program.

A run is one ``lax.scan``. The runs of a call are spread over all devices (on a CPU: one for each core), each
of which trains its share one after the other, which suits networks: a ``vmap`` over their weights would turn
convolutions and small matrix products into slower batched ones. What tells runs apart (seed, rates, adaptive
rule and its settings, disturbance), how many there are, and the data are inputs, so one compilation serves
all schedules of a task and an optimizer.
"""

import contextlib
import functools
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec

import greedylr_jax
from experiments.tasks.base import Batch, Params, Task
from experiments.training.disturbance import Disturbance, disturbance_inputs
from experiments.training.schedules import (
    OWN_RATES,
    PEERS,
    SUPERBATCHES,
    VALIDATED,
    ScheduleInputs,
    adaptive_scale,
    parse,
    schedule_inputs,
)
from greedylr_jax import superbatch_loss

OPTIMIZERS: dict[str, Callable[[float], optax.GradientTransformation]] = {
    "adamw": optax.adamw,
    "sgd": optax.sgd,
    "adagrad": optax.adagrad,
    # As the Hugging Face trainer sets it up: the rate is absolute, and not relative to the parameters.
    "adafactor": lambda rate: optax.adafactor(rate, multiply_by_parameter_scale=False),
    "momentum": lambda rate: optax.sgd(rate, momentum=0.9),
    "adam": optax.adam,
    "lion": optax.lion,
    "muon": optax.contrib.muon,
}
RUNS_PER_DEVICE = 16  # at most in one call
SECONDS_PER_CALL = 5.0  # about what is between two reports of progress


class RunSpec(NamedTuple):
    """One training run."""

    schedule: str
    learning_rate: float
    seed: int
    disturbance: str = "none"


def make_specs(
    schedules: Sequence[str], learning_rates: Sequence[float], seeds: Iterable[int]
) -> list[RunSpec]:
    """Every schedule at every initial rate with every seed."""
    return [
        RunSpec(schedule, rate, seed) for seed in seeds for rate in learning_rates for schedule in schedules
    ]


class Settings(NamedTuple):
    """What all runs of an engine have in common."""

    steps: int
    evaluations: int = 1  # on the held-out examples, evenly over the steps, the last at the end
    disturbed: bool = False  # whether runs have disturbances; they cost random numbers
    # Whether every other held-out example is given to the rules that look at validation losses, before each
    # evaluation; what is reported is of the rest then.
    validated: bool = False


class RunResult(NamedTuple):
    """What a run leaves."""

    loss: np.ndarray  # shape=(steps,); the batch's loss before each update
    rate: np.ndarray  # shape=(steps,); the learning rate of each update
    test_loss: np.ndarray  # shape=(evaluations,)
    test_metric: np.ndarray  # shape=(evaluations,)


class Inputs(NamedTuple):
    """What tells one run of a compiled program from another."""

    seed: np.ndarray  # shape=(), dtype=uint32
    schedule: ScheduleInputs
    disturbance: Disturbance | None


def configure(cpus: int | None = None) -> None:
    """Lets JAX see a CPU as one device a core, and keep what it compiles on disk.

    Compiled programs lie in ``JAX_COMPILATION_CACHE_DIR`` or, if that is not set, in the user's cache folder.
    Where JAX has started already it works with the devices that it has.

    Args:
      cpus: devices to make of the CPU; None: one for each core.
    """
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", cpus or os.cpu_count() or 1)
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "greedylr_jax" / "xla"
        jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def device_mesh() -> jax.sharding.Mesh:
    """All devices of this process along one axis, ``"runs"``; of a CPU as many as there are cores."""
    devices = jax.local_devices()
    if devices[0].platform == "cpu":
        devices = devices[: os.cpu_count()]  # more devices than cores would only take turns
    return jax.sharding.Mesh(np.array(devices), ("runs",))


def place(tree: Any, mesh: jax.sharding.Mesh, *, split: bool = False) -> Any:
    """Puts arrays on all devices, or a part of each array's leading axis on each."""
    spec = PartitionSpec("runs") if split else PartitionSpec()
    return jax.device_put(tree, jax.sharding.NamedSharding(mesh, spec))


def side_by_side(
    function: Callable[..., Any], mesh: jax.sharding.Mesh, *, split: Sequence[bool]
) -> Callable[..., Any]:
    """Runs a function on each device, and puts the results one after another along their leading axis.

    Args:
      function: of what is on one device.
      mesh: of :func:`device_mesh`.
      split: of each argument, whether each device gets a part of its leading axis, or all of it.
    """
    runs, everywhere = PartitionSpec("runs"), PartitionSpec()
    in_specs = tuple(runs if is_split else everywhere for is_split in split)
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=runs, check_vma=False)


def compiler_options() -> dict[str, int] | None:
    """What training programs are compiled with."""
    # LLVM's second level takes up to twice the time to compile, and the programs run no faster.
    return {"xla_backend_optimization_level": 1} if jax.default_backend() == "cpu" else None


class Engine:
    """Trains runs of one task with one optimizer.

    All passive and zeroth-order schedules share one compilation, at the first call; each rule that keeps its
    own rates (:data:`experiments.training.schedules.OWN_RATES`) has another, with each of its settings.
    """

    def __init__(self, task: Task, optimizer: str, settings: Settings):
        if settings.steps % settings.evaluations:
            raise ValueError(
                f"steps must be a multiple of evaluations, got {settings.steps} and {settings.evaluations}."
            )
        self.task, self.optimizer, self.settings = task, optimizer, settings
        self._mesh = device_mesh()
        parts = (slice(0, None, 2), slice(1, None, 2)) if settings.validated else (slice(0), slice(None))
        validation, test = (jax.tree.map(lambda rows, part=part: rows[part], task.test) for part in parts)
        self._data = place((task.train, validation, test), self._mesh)
        self._compiled: dict[str | None, Callable[..., RunResult]] = {}  # None: the shared one

    @property
    def num_compilations(self) -> int:
        """How many training programs were compiled so far."""
        return len(self._compiled)

    def train(self, specs: Sequence[RunSpec]) -> Iterator[list[tuple[RunSpec, RunResult, float]]]:
        """Trains the runs, and yields them in groups as they finish, each with its seconds."""
        by_program: dict[str | None, list[RunSpec]] = {}
        for spec in specs:
            name, _ = parse(spec.schedule)
            by_program.setdefault(spec.schedule if name in OWN_RATES else None, []).append(spec)
        for rule, together in by_program.items():
            share, start = 1, 0
            while start < len(together):
                group = together[start : start + share * self._mesh.size]
                trained = self._train_group(rule, group)
                start += len(group)
                yield trained
                share = int(np.clip(SECONDS_PER_CALL / trained[0][2], 1, RUNS_PER_DEVICE))

    def _train_group(self, rule: str | None, group: list[RunSpec]) -> list[tuple[RunSpec, RunResult, float]]:
        devices = self._mesh.size
        # A device's place in the arrays is of a fixed size, and how much of it is used is an input.
        rows = [index % devices * RUNS_PER_DEVICE + index // devices for index in range(len(group))]
        filled = [group[0]] * (devices * RUNS_PER_DEVICE)
        for row, spec in zip(rows, group, strict=True):
            filled[row] = spec
        made = {spec: self._inputs(spec) for spec in set(group)}
        stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *(made[spec] for spec in filled))
        counts = np.array([len(group[device::devices]) for device in range(devices)], np.int32)
        program = self._program(rule, counts, stacked)
        start = time.perf_counter()
        results = jax.device_get(program(counts, stacked, self._data))
        seconds = (time.perf_counter() - start) / int(counts[0])
        return [
            (spec, jax.tree.map(lambda leaf, row=row: leaf[row], results), seconds)
            for row, spec in zip(rows, group, strict=True)
        ]

    def _inputs(self, spec: RunSpec) -> Inputs:
        steps = self.settings.steps
        return Inputs(
            np.uint32(spec.seed),
            schedule_inputs(spec.schedule, spec.learning_rate, steps),
            disturbance_inputs(spec.disturbance, steps, spec.seed) if self.settings.disturbed else None,
        )

    def _program(self, rule: str | None, counts: np.ndarray, inputs: Inputs) -> Callable[..., RunResult]:
        if rule not in self._compiled:
            run_all = functools.partial(self._run_all, rule)
            mapped = side_by_side(run_all, self._mesh, split=(True, True, False))
            lowered = jax.jit(mapped).lower(counts, inputs, self._data)
            self._compiled[rule] = lowered.compile(compiler_options=compiler_options())
        return self._compiled[rule]

    def _run_all(
        self, rule: str | None, count: jax.Array, inputs: Inputs, data: tuple[Batch, Batch, Batch]
    ) -> RunResult:
        """The runs of one device, ``count`` of them; the rest of the result is zero."""
        steps, evaluations = self.settings.steps, self.settings.evaluations
        results = RunResult(
            *(jnp.zeros((RUNS_PER_DEVICE, n)) for n in (steps, steps, evaluations, evaluations))
        )

        def body(index: jax.Array, results: RunResult) -> RunResult:
            run = self._run(rule, jax.tree.map(lambda leaf: leaf[index], inputs), data)
            return jax.tree.map(lambda all_runs, one: all_runs.at[index].set(one), results, run)

        return jax.lax.fori_loop(0, count[0], body, results)

    def _run(self, rule: str | None, inputs: Inputs, data: tuple[Batch, Batch, Batch]) -> RunResult:
        task, (steps, evaluations, disturbed, validated) = self.task, self.settings
        train, validation, test = data
        init_key, batch_key = jax.random.split(jax.random.key(inputs.seed))
        params = task.init(init_key)
        optimizer = optax.with_extra_args_support(OPTIMIZERS[self.optimizer](1.0))
        name, options = (None, {}) if rule is None else parse(rule)
        if name is None:
            stepper = _shared_stepper(optimizer, inputs.schedule, task.steps_per_epoch)
        else:
            stepper = _own_rate_stepper(
                OWN_RATES[name](optimizer, inputs.schedule.rates[0], steps, **options),
                reads_rate=name not in PEERS,
                validated=validated and name in VALIDATED,
            )
        batches = batch_indices(task, steps, batch_key)
        source = task.collector.init(jax.random.fold_in(batch_key, 2), params)
        if disturbed:
            _, first_batch = task.collector.collect(source, params, take(train, batches[0]))
            first_loss = jnp.abs(task.loss(params, first_batch))
            first_norm = optax.tree.norm(params)
            noise_key = jax.random.fold_in(batch_key, 1)

        def body(carry: Any, step_inputs: Any) -> Any:
            params, state, source = carry
            rate, step, indices, noise = step_inputs
            source, batch = task.collector.collect(source, params, take(train, indices))
            loss, grads = jax.value_and_grad(task.loss)(params, batch)
            observed = loss

            def collected(row: jax.Array) -> Batch:
                return task.collector.collect(source, params, take(train, batches[row]))[1]

            def value_fn(params: Params) -> jax.Array:
                # The loss on the batch of the step, or on a superbatch, is asked for only now and then.
                if name not in SUPERBATCHES:
                    return task.loss(params, batch)
                rows = (step + jnp.arange(SUPERBATCHES[name])) % len(batches)
                return superbatch_loss(lambda p, row: task.loss(p, collected(row)), rows)(params)

            def validation_fn(params: Params) -> jax.Array:
                # The last step before an evaluation brings a validation loss.
                is_due = (step + 1) % (steps // evaluations) == 0
                # As an operand: a module's parameters must belong to the branch that merges them.
                return jax.lax.cond(
                    is_due,
                    lambda params: task.held_out_loss(params, validation),
                    lambda params: jnp.nan,
                    params,
                )

            if disturbed:
                key, against = jax.random.fold_in(noise_key, step), inputs.disturbance.against
                direction = _direction(key, grads, against)
                observed = loss + noise[0] * first_loss
                grads = optax.tree.add_scale(grads, noise[1] * optax.tree.norm(grads), direction)
            updates, state, rate = stepper.update(
                grads, state, params, rate, observed, value_fn, validation_fn
            )
            params = optax.apply_updates(params, updates)
            if disturbed:
                params = optax.tree.add_scale(params, -noise[2] * first_norm, direction)
            return (params, state, source), (loss, rate)

        def segment(carry: Any, segment_inputs: Any) -> Any:
            carry, histories = jax.lax.scan(body, carry, segment_inputs)
            params, state, _ = carry
            final = stepper.evaluated(state, params)
            return carry, (*histories, task.held_out_loss(final, test), task.metric(final, test))

        noise = inputs.disturbance[:3] if disturbed else None
        xs = (inputs.schedule.rates, jnp.arange(steps), batches, noise)
        xs = jax.tree.map(lambda leaf: leaf.reshape(evaluations, -1, *leaf.shape[1:]), xs)
        carry = (params, stepper.init(params), source)
        _, (loss, rate, *tests) = jax.lax.scan(segment, carry, xs)
        return RunResult(loss.ravel(), rate.ravel(), *tests)


def _direction(key: jax.Array, grads: Params, against: jax.Array) -> Params:
    """A direction of norm 1: random, or that of descent."""
    leaves, structure = jax.tree.flatten(grads)
    keys = jax.random.split(key, len(leaves))
    random = structure.unflatten(
        [jax.random.normal(key, leaf.shape, leaf.dtype) for key, leaf in zip(keys, leaves, strict=True)]
    )
    chosen = jax.tree.map(lambda r, g: jnp.where(against, -g, r), random, grads)
    return optax.tree.scale(1 / jnp.maximum(optax.tree.norm(chosen), 1e-30), chosen)


class _Stepper(NamedTuple):
    """From gradients to updates, and to the rate that they were made with."""

    init: Callable[[Params], Any]
    update: Callable[..., tuple[optax.Updates, Any, jax.Array]]
    evaluated: Callable[[Any, Params], Params]  # the parameters to evaluate


def _shared_stepper(
    optimizer: optax.GradientTransformationExtraArgs, inputs: ScheduleInputs, steps_per_epoch: int
) -> _Stepper:
    """Any passive or zeroth-order schedule: which one is an input of the program."""
    rule = adaptive_scale(inputs, steps_per_epoch)

    def update(grads, state, params, rate, loss, value_fn, validation_fn):
        del value_fn, validation_fn
        optimizer_state, rule_state = state
        updates, optimizer_state = optimizer.update(grads, optimizer_state, params, value=loss)
        # A rule only scales what it is given, so a 1 comes back as the scale, whatever rule it is; the
        # updates themselves would be copied on their way through the choice of rules.
        scale, rule_state = rule.update(jnp.ones(()), rule_state, value=loss)
        updates = jax.tree.map(lambda leaf: rate * scale * leaf, updates)
        return updates, (optimizer_state, rule_state), rate * scale

    return _Stepper(
        lambda params: (optimizer.init(params), rule.init(params)), update, lambda state, params: params
    )


def _own_rate_stepper(
    tx: optax.GradientTransformationExtraArgs, *, reads_rate: bool, validated: bool
) -> _Stepper:
    """A rule that keeps its own rates, around the optimizer; the rate of a peer is the one it was given."""
    tx = optax.with_extra_args_support(tx)

    def update(grads, state, params, rate, loss, value_fn, validation_fn):
        extra = {"validation_value": validation_fn(params)} if validated else {}
        updates, state = tx.update(grads, state, params, value=loss, value_fn=value_fn, grad=grads, **extra)
        read = greedylr_jax.metrics(state) if reads_rate else {}
        return updates, state, read.get("learning_rate", rate * read.get("scale", 1))

    def evaluated(state, params):
        if isinstance(state, optax.contrib.ScheduleFreeState):
            return optax.contrib.schedule_free_eval_params(state, params)
        return params

    return _Stepper(tx.init, update, evaluated)


def take(examples: Batch, indices: jax.Array) -> Batch:
    """The examples at ``indices``, whose shape takes the place of the leading axis."""
    return jax.tree.map(lambda leaf: leaf[indices], examples)


def batch_indices(task: Task, steps: int, key: jax.Array) -> jax.Array:
    """Indices of each step's examples: every epoch a new permutation, its remainder left out.

    Returns:
      Shape (steps, batch size).
    """
    per_epoch, size = task.steps_per_epoch, task.batch_size
    keys = jax.random.split(key, -(-steps // per_epoch))
    permuted = jax.vmap(functools.partial(jax.random.permutation, x=task.num_examples))(keys)
    return permuted[:, : per_epoch * size].reshape(-1, size)[:steps]
