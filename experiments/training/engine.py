"""Training many runs in one compiled program.

A run is one ``lax.scan``. The runs of a call are distributed over all devices (on a CPU: one per core), and
each device trains its share sequentially, because a ``vmap`` over the weights of networks would turn
convolutions and small matrix products into slower batched ones. Everything that distinguishes runs (seed,
learning rates, adaptive scale and its settings, disturbance), their number, and the data are inputs, so one
compilation serves all schedules of a task and an optimizer.
"""

import contextlib
import functools
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec

from experiments import welcome
from experiments.tasks.base import Batch, Params, Task
from experiments.training.disturbance import Disturbance, disturbance_inputs
from experiments.training.loop import batch_indices, take
from experiments.training.schedules import ScheduleInputs, program_of, schedule_inputs
from experiments.training.stepper import make_stepper
from greedylr_jax import superbatch_loss

OPTIMIZERS: dict[str, Callable[[float], optax.GradientTransformation]] = {
    "adamw": optax.adamw,
    "sgd": optax.sgd,
    "adagrad": optax.adagrad,
    # As in the Hugging Face trainer: the learning rate is absolute, not relative to the parameters.
    "adafactor": lambda rate: optax.adafactor(rate, multiply_by_parameter_scale=False),
    "momentum": lambda rate: optax.sgd(rate, momentum=0.9),
    # The weight decay of ResNet-18 on CIFAR-10 in the LRTuner paper.
    "momentum-decay": lambda rate: optax.chain(
        optax.add_decayed_weights(5e-4), optax.sgd(rate, momentum=0.9)
    ),
    "adam": optax.adam,
    "lion": optax.lion,
    "muon": optax.contrib.muon,
}
RUNS_PER_DEVICE = 16  # maximum in one call
SECONDS_PER_CALL = 5.0  # approximate time between two reports of progress


class RunSpec(NamedTuple):
    """One training run.

    Attributes:
      schedule: as :func:`experiments.training.schedules.parse` reads it.
      learning_rate: the initial one, > 0.
      seed: of parameters, batches and disturbance.
      disturbance: as :func:`experiments.training.disturbance.parse` reads it.
      label: what the study calls the run, such as the name of a variant; stored with the results.
    """

    schedule: str
    learning_rate: float
    seed: int
    disturbance: str = "none"
    label: str = ""


def make_specs(
    schedules: Sequence[str], learning_rates: Sequence[float], seeds: Iterable[int], *, label: str = ""
) -> list[RunSpec]:
    """Every schedule at every initial learning rate with every seed, all with one label."""
    return [
        RunSpec(schedule, rate, seed, label=label)
        for seed in seeds
        for rate in learning_rates
        for schedule in schedules
    ]


class Settings(NamedTuple):
    """Settings that all runs of an engine share.

    Attributes:
      steps: number of steps, a multiple of ``evaluations``.
      evaluations: number of evaluations on the held-out examples, evenly spaced, the last at the end.
      disturbed: whether runs have disturbances, which cost random numbers.
      validated: whether every other held-out example is used for validation losses, which are given to the
        schedules that read them before each evaluation; results are then of the other half.
      text: whether the final parameters predict the text of the held-out examples, on tasks that have a
        :class:`~experiments.tasks.base.TextScore`.
    """

    steps: int
    evaluations: int = 1
    disturbed: bool = False
    validated: bool = False
    text: bool = False


class RunResult(NamedTuple):
    """The histories of a run."""

    loss: np.ndarray  # shape=(steps,); the loss of the batch before each update
    rate: np.ndarray  # shape=(steps,); the learning rate of each update
    test_loss: np.ndarray  # shape=(evaluations,)
    test_metric: np.ndarray  # shape=(evaluations,)
    predictions: np.ndarray | None = None  # of the task's text score, of the final parameters


class Inputs(NamedTuple):
    """The inputs of a compiled program for one run."""

    seed: np.ndarray  # shape=(), dtype=uint32
    schedule: ScheduleInputs
    disturbance: Disturbance | None


def configure(cpus: int | None = None) -> None:
    """Splits the CPU into one JAX device per core and enables JAX's persistent compilation cache.

    The cache is in ``JAX_COMPILATION_CACHE_DIR`` if that is set, otherwise in the user's cache folder. Once
    JAX is initialized, the number of devices no longer changes.

    Args:
      cpus: number of CPU devices; None: one per core.
    """
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", cpus or os.cpu_count() or 1)
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(welcome.cache_folder()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def device_mesh() -> jax.sharding.Mesh:
    """All devices of this process along one axis, ``"runs"``; at most one CPU device per core."""
    devices = jax.local_devices()
    if devices[0].platform == "cpu":
        devices = devices[: os.cpu_count()]  # more devices than cores would share them
    return jax.sharding.Mesh(np.array(devices), ("runs",))


def place(tree: Any, mesh: jax.sharding.Mesh, *, split: bool = False) -> Any:
    """Replicates arrays on all devices, or splits their leading axis over the devices."""
    spec = PartitionSpec("runs") if split else PartitionSpec()
    return jax.device_put(tree, jax.sharding.NamedSharding(mesh, spec))


def side_by_side(
    function: Callable[..., Any], mesh: jax.sharding.Mesh, *, split: Sequence[bool]
) -> Callable[..., Any]:
    """Maps a function over devices and concatenates its results along their leading axis.

    Args:
      function: called with the part of each argument that is on one device.
      mesh: of :func:`device_mesh`.
      split: for each argument whether its leading axis is split over the devices or replicated.
    """
    runs, replicated = PartitionSpec("runs"), PartitionSpec()
    in_specs = tuple(runs if is_split else replicated for is_split in split)
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=runs, check_vma=False)


def step_flops(task: Task, optimizer: str) -> float:
    """Floating-point operations of a training step, counted before the compiler optimizes it."""
    tx = OPTIMIZERS[optimizer](1.0)

    def step(params: Params, batch: Batch) -> Any:
        loss, grads = jax.value_and_grad(task.loss)(params, batch)
        return loss, tx.update(grads, tx.init(params), params)

    def shape_of(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((task.batch_size, *leaf.shape[1:]), leaf.dtype)

    params = jax.eval_shape(task.init, jax.random.key(0))
    counted = jax.jit(step).lower(params, jax.tree.map(shape_of, task.train)).cost_analysis()
    return float((counted or {}).get("flops", 0.0))


def compiler_options() -> dict[str, int] | None:
    """Compiler options of training programs."""
    # LLVM's level 2 doubles the compile time, and the programs do not run faster.
    return {"xla_backend_optimization_level": 1} if jax.default_backend() == "cpu" else None


class Engine:
    """Trains runs of one task with one optimizer.

    All passive schedules and adaptive scales share one compilation, at the first call; each
    :class:`~experiments.training.schedules.RateOptimizer` has another one for each of its settings that are
    not traced.
    """

    def __init__(self, task: Task, optimizer: str, settings: Settings, accumulation: int = 1):
        """Places the data on the devices.

        Args:
          task: what is trained.
          optimizer: key of :data:`OPTIMIZERS`.
          settings: of all runs.
          accumulation: number of steps whose gradients are averaged for one update, >= 1.
        """
        if settings.steps % settings.evaluations:
            raise ValueError(
                f"steps must be a multiple of evaluations, got steps={settings.steps} and "
                f"evaluations={settings.evaluations}."
            )
        self.task, self.optimizer, self.settings = task, optimizer, settings
        self.accumulation = accumulation
        self._mesh = device_mesh()
        parts = (slice(0, None, 2), slice(1, None, 2)) if settings.validated else (slice(0), slice(None))
        validation, test = (jax.tree.map(lambda rows, part=part: rows[part], task.test) for part in parts)
        self._data = place((task.train, validation, test), self._mesh)
        self._compiled: dict[str | None, Callable[..., RunResult]] = {}  # by program_of; None: the shared one

    @property
    def num_compilations(self) -> int:
        """Number of training programs compiled so far."""
        return len(self._compiled)

    def train(self, specs: Sequence[RunSpec]) -> Iterator[list[tuple[RunSpec, RunResult, float]]]:
        """Trains the runs and yields them in groups as they finish, each with its duration in seconds."""
        by_program: dict[str | None, list[RunSpec]] = {}
        for spec in specs:
            by_program.setdefault(program_of(spec.schedule), []).append(spec)
        for key, together in by_program.items():
            share, start = 1, 0
            while start < len(together):
                group = together[start : start + share * self._mesh.size]
                trained = self._train_group(key, group)
                start += len(group)
                yield trained
                share = int(np.clip(SECONDS_PER_CALL / trained[0][2], 1, RUNS_PER_DEVICE))

    def _train_group(self, key: str | None, group: list[RunSpec]) -> list[tuple[RunSpec, RunResult, float]]:
        devices = self._mesh.size
        # Each device has a fixed number of rows; the number of those in use is an input.
        rows = [index % devices * RUNS_PER_DEVICE + index // devices for index in range(len(group))]
        filled = [group[0]] * (devices * RUNS_PER_DEVICE)
        for row, spec in zip(rows, group, strict=True):
            filled[row] = spec
        made = {spec: self._inputs(spec) for spec in set(group)}
        stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *(made[spec] for spec in filled))
        counts = np.array([len(group[device::devices]) for device in range(devices)], np.int32)
        program = self._program(key, counts, stacked)
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

    def _program(self, key: str | None, counts: np.ndarray, inputs: Inputs) -> Callable[..., RunResult]:
        if key not in self._compiled:
            run_all = functools.partial(self._run_all, key)
            mapped = side_by_side(run_all, self._mesh, split=(True, True, False))
            lowered = jax.jit(mapped).lower(counts, inputs, self._data)
            self._compiled[key] = lowered.compile(compiler_options=compiler_options())
        return self._compiled[key]

    def _run_all(
        self, key: str | None, count: jax.Array, inputs: Inputs, data: tuple[Batch, Batch, Batch]
    ) -> RunResult:
        """The runs of one device, ``count`` of them; the other rows of the result are zero."""
        steps, evaluations = self.settings.steps, self.settings.evaluations
        results = RunResult(
            *(jnp.zeros((RUNS_PER_DEVICE, n)) for n in (steps, steps, evaluations, evaluations)),
            predictions=self._no_predictions(data[-1]),
        )

        def body(index: jax.Array, results: RunResult) -> RunResult:
            run = self._run(key, jax.tree.map(lambda leaf: leaf[index], inputs), data)
            return jax.tree.map(lambda all_runs, one: all_runs.at[index].set(one), results, run)

        return jax.lax.fori_loop(0, count[0], body, results)

    @property
    def _predicts(self) -> bool:
        return self.settings.text and self.task.text is not None

    def _no_predictions(self, test: Batch) -> jax.Array | None:
        """Zeros for the predictions of the runs of one device."""
        if not self._predicts:
            return None
        params = jax.eval_shape(self.task.init, jax.random.key(0))
        shape = jax.eval_shape(self.task.text.predict, params, test)
        return jnp.zeros((RUNS_PER_DEVICE, *shape.shape), shape.dtype)

    def _run(self, key: str | None, inputs: Inputs, data: tuple[Batch, Batch, Batch]) -> RunResult:
        task, (steps, evaluations, disturbed, validated, _) = self.task, self.settings
        train, validation, test = data
        init_key, batch_key = jax.random.split(jax.random.key(inputs.seed))
        params = task.init(init_key)
        optimizer = optax.with_extra_args_support(OPTIMIZERS[self.optimizer](1.0))
        stepper = make_stepper(
            key,
            optimizer,
            inputs.schedule,
            steps,
            validated=validated,
            accumulation=self.accumulation,
        )
        batches = batch_indices(task, steps, batch_key)
        source = task.collector.init(jax.random.fold_in(batch_key, 2), params)
        if disturbed:
            _, first_batch = task.collector.collect(source, params, take(train, batches[0]))
            first_loss = jnp.abs(task.loss(params, first_batch))
            first_norm = optax.tree.norm(params)
            noise_key = jax.random.fold_in(batch_key, 1)

        def body(carry: Any, step_inputs: Any) -> Any:
            params, state, source, first_gradient = carry
            rate, step, indices, noise = step_inputs
            source, batch = task.collector.collect(source, params, take(train, indices))
            loss, grads = jax.value_and_grad(task.loss)(params, batch)
            observed = loss

            def batch_at(row: jax.Array) -> Batch:
                return task.collector.collect(source, params, take(train, batches[row]))[1]

            value_fn = _value_fn(task, batch_at, len(batches), step, batch, stepper.superbatch)
            # A validation loss is computed in the last step before each evaluation.
            validation_fn = _validation_fn(task, validation, (step + 1) % (steps // evaluations) == 0)
            if disturbed:
                step_key = jax.random.fold_in(noise_key, step)
                direction = _direction(step_key, grads, inputs.disturbance.ascent)
                observed = loss + noise[0] * first_loss
                first_gradient = jnp.where(step == 0, optax.tree.norm(grads), first_gradient)
                grads = optax.tree.add_scale(grads, noise[1] * first_gradient, direction)
            updates, state, rate = stepper.update(
                grads, state, params, rate, observed, value_fn, validation_fn
            )
            params = optax.apply_updates(params, updates)
            if disturbed:
                params = optax.tree.add_scale(params, -noise[2] * first_norm, direction)
            return (params, state, source, first_gradient), (loss, rate)

        def segment(carry: Any, segment_inputs: Any) -> Any:
            carry, histories = jax.lax.scan(body, carry, segment_inputs)
            params, state, *_ = carry
            final = stepper.evaluation_params(state, params)
            return carry, (*histories, task.held_out_loss(final, test), task.metric(final, test))

        noise = inputs.disturbance[:3] if disturbed else None
        xs = (inputs.schedule.rates, jnp.arange(steps), batches, noise)
        xs = jax.tree.map(lambda leaf: leaf.reshape(evaluations, -1, *leaf.shape[1:]), xs)
        carry = (params, stepper.init(params), source, jnp.zeros(()))
        (params, state, *_), (loss, rate, *tests) = jax.lax.scan(segment, carry, xs)
        final = stepper.evaluation_params(state, params)
        predictions = task.text.predict(final, test) if self._predicts else None
        return RunResult(loss.ravel(), rate.ravel(), *tests, predictions=predictions)


def _value_fn(
    task: Task,
    batch_at: Callable[[jax.Array], Batch],
    num_batches: int,
    step: jax.Array,
    batch: Batch,
    superbatch: int,
) -> Callable[[Params], jax.Array]:
    """The loss of the batch of the step, or the mean loss of ``superbatch`` batches from ``step`` on."""
    if superbatch == 1:
        return lambda params: task.loss(params, batch)
    rows = (step + jnp.arange(superbatch)) % num_batches
    return superbatch_loss(lambda params, row: task.loss(params, batch_at(row)), rows)


def _validation_fn(task: Task, validation: Batch, is_due: jax.Array) -> Callable[[Params], jax.Array]:
    """The validation loss if it is due, otherwise NaN."""
    # The parameters are an operand, because Flax merges them at the branch's level of tracing.
    return lambda params: jax.lax.cond(
        is_due, lambda params: task.held_out_loss(params, validation), lambda params: jnp.nan, params
    )


def _direction(key: jax.Array, grads: Params, ascent: jax.Array) -> Params:
    """A direction of norm 1: random, or, for ``ascent``, that of the negative gradient.

    Added to the gradient, the latter opposes descent; subtracted from the parameters, it increases the loss.
    """
    leaves, structure = jax.tree.flatten(grads)
    keys = jax.random.split(key, len(leaves))
    random = structure.unflatten(
        [jax.random.normal(key, leaf.shape, leaf.dtype) for key, leaf in zip(keys, leaves, strict=True)]
    )
    chosen = jax.tree.map(lambda r, g: jnp.where(ascent, -g, r), random, grads)
    return optax.tree.scale(1 / jnp.maximum(optax.tree.norm(chosen), 1e-30), chosen)
