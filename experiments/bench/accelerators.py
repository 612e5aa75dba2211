"""What a rule costs on a TPU and on a GPU, read from programs that are compiled on a machine without either.

XLA's TPU compiler is in the package ``libtpu`` (``pip install -e ".[tpu]"``), its GPU compiler in JAX's CUDA
plugin (``pip install -e ".[cuda]"``). Both compile for devices that are only described: :func:`compile_step`
compiles a train step for a :class:`Target`, and :func:`experiments.bench.hlo.read_program` counts in the
optimized program what a step costs there. Where JAX has an accelerator, the steps are timed on it as well.
"""

import contextlib
import functools
import importlib.metadata
import importlib.util
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich.console import Console

from experiments.bench import hlo, perceptron
from experiments.errors import UsageError
from experiments.reporting.tables import print_table
from experiments.timing import interleaved_medians
from experiments.training.store import write_atomically
from greedylr_jax import auto_lr, factor_polling, greedy_lr, hypergradient, lr_tuner, trend_lr, with_rollback
from greedylr_jax.arc import arc

AXIS = "data"  # the axis of a mesh, over which batches are split
WIDTHS = (256, 512, 10)  # a perceptron of 136,192 parameters
BATCH = 64
RATE = 1e-3
BARE = "bare"

# libtpu otherwise asks a server of a cloud machine for its topology, and refuses to be loaded by two
# processes, which could not share a TPU. Compiling for described devices needs none.
_LIBTPU_SETTINGS = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
# Autotuning would run kernels on a GPU. The tests switch optimizations off, for programs that run on the CPU.
_GPU_OPTIONS = {"xla_gpu_autotune_level": 0, "xla_backend_optimization_level": 3}
_COMPILERS = {"tpu": "libtpu", "cuda": "jax_plugins.xla_cuda12"}
_PACKAGES = ("jax", "libtpu", "jax-cuda12-plugin")


def _followed_by(rule: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    return optax.chain(optax.adamw(RATE), rule)


# AdamW with one rule each. The argument ``axis_name`` is for steps under shard_map.
RULES: dict[str, Callable[..., optax.GradientTransformationExtraArgs]] = {
    BARE: lambda **_: optax.with_extra_args_support(optax.adamw(RATE)),
    "reduce_on_plateau": lambda **_: _followed_by(optax.contrib.reduce_on_plateau()),
    "greedy_lr, window None": lambda **axis: _followed_by(greedy_lr(window=None, **axis)),
    "greedy_lr": lambda **axis: _followed_by(greedy_lr(**axis)),
    "greedy_lr, paper": lambda **axis: _followed_by(greedy_lr(algorithm="paper", **axis)),
    "trend_lr": lambda **axis: _followed_by(trend_lr(**axis)),
    "arc": lambda **axis: _followed_by(arc(steps_per_cycle=100, **axis)),
    "hypergradient": lambda **_: hypergradient(optax.adamw(1.0), RATE, 0.02, mode="multiplicative"),
    "auto_lr": lambda **_: auto_lr(optax.adamw(1.0), total_steps=100_000),
    "lr_tuner": lambda **axis: lr_tuner(
        optax.adamw(1.0), RATE, explore_steps=1000, recompute_every=100, **axis
    ),
    "factor_polling": lambda **axis: _followed_by(factor_polling(every=100, **axis)),
    "with_rollback": lambda **axis: with_rollback(_followed_by(greedy_lr(**axis)), **axis),
}


class Target(NamedTuple):
    """A kind of device to compile for."""

    name: str
    platform: str  # "tpu", "cuda" or "cpu"
    describe: Callable[[int], dict[str, str]] = lambda _: {}  # from the number of devices, for the compiler


# The numbers that XLA has in its own descriptions of these devices (xla/backends/gpu/target_config/specs).
_GPU = """
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: {cores}
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth}
  l2_cache_size: {cache}
  clock_rate_ghz: {clock}
  device_memory_size: {memory}
  shared_memory_per_block_optin: 232448
  cuda_compute_capability {{ major: {capability} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
runtime_version {{ major: 12 minor: 8 }}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 7 }}
device_description_str: "{device}"
"""


def _gpu(name: str, **numbers: Any) -> Target:
    config = _GPU.format(**numbers)
    return Target(name, "cuda", lambda count: {"target_config": config, "topology": f"1x1x{count}"})


def _tpu(name: str) -> Target:
    # The smallest topology has four chips, of which a mesh may use one.
    return Target(name, "tpu", lambda count: {"topology_name": f"{name}:{'2x2' if count <= 4 else '2x4'}"})


TARGETS = {
    "v5e": _tpu("v5e"),
    "v6e": _tpu("v6e"),
    "h100": _gpu(
        "h100",
        device="NVIDIA H100 80GB HBM3",
        cores=132,
        bandwidth=3_352_320_000_000,
        cache=52_428_800,
        clock=1.98,
        memory=84_942_979_072,
        capability=9,
    ),
    "b200": _gpu(
        "b200",
        device="NVIDIA B200",
        cores=148,
        bandwidth=7_672_320_000_000,
        cache=132_644_864,
        clock=1.965,
        memory=191_514_411_008,
        capability=10,
    ),
    "cpu": Target("cpu", "cpu"),
}


def missing_compiler(target: Target) -> str | None:
    """Which compiler is missing for a target, and how to install it; None if there is one."""
    module = _COMPILERS.get(target.platform)
    try:
        found = module is None or importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the parent package
        found = False
    if found:
        return None
    return f'no compiler for {target.name}: install {module} with pip install -e ".[{target.platform}]"'


@functools.cache
def make_mesh(target: Target, num_devices: int) -> Mesh:
    """A mesh with one axis, ``AXIS``, of devices that need not exist.

    Args:
      target: what kind of devices.
      num_devices: 1 to 8.

    Raises:
      UsageError: if the compiler is not installed.
    """
    if (reason := missing_compiler(target)) is not None:
        raise UsageError(reason)
    if target.platform == "cpu":
        devices = jax.devices("cpu")
    else:
        for name, value in _LIBTPU_SETTINGS.items():
            os.environ.setdefault(name, value)
        arguments = target.describe(num_devices)
        name = arguments.pop("topology_name", target.name)
        devices = topologies.get_topology_desc(name, target.platform, **arguments).devices
    return Mesh(np.array(devices[:num_devices]), (AXIS,), axis_types=(jax.sharding.AxisType.Auto,))


def make_step(
    loss_fn: Callable[[Any, Any], jax.Array],
    tx: optax.GradientTransformationExtraArgs,
    axis_name: str | None = None,
) -> Callable[[Any, Any, Any], tuple[Any, Any, jax.Array]]:
    """A train step that passes the optimizer all that any rule needs.

    Args:
      loss_fn: from parameters and a batch to the loss.
      tx: the optimizer.
      axis_name: mapped axis over which gradients are averaged, for steps under ``jax.shard_map``.
    """

    def step(params: Any, state: Any, batch: Any) -> tuple[Any, Any, jax.Array]:
        def value_fn(point: Any) -> jax.Array:
            return loss_fn(point, batch)

        loss, grads = jax.value_and_grad(value_fn)(params)
        if axis_name is not None:
            grads = jax.lax.pmean(grads, axis_name)
        updates, state = tx.update(grads, state, params, value=loss, value_fn=value_fn)
        return optax.apply_updates(params, updates), state, loss

    return step


def shapes_of(
    rule: str, widths: Sequence[int] = WIDTHS, dtype: Any = jnp.float32, batch_size: int = BATCH
) -> tuple[Any, Any, Any]:
    """The shapes of parameters, optimizer state and batch of a perceptron that one of ``RULES`` trains."""
    params, batch = jax.eval_shape(lambda: perceptron.make(tuple(widths), (batch_size,)))
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), params)
    return params, jax.eval_shape(RULES[rule]().init, params), batch


def compile_step(
    step: Callable[[Any, Any, Any], Any], shapes: tuple[Any, Any, Any], mesh: Mesh, specs: Any = None
) -> Any:
    """Compiles a train step for the devices of a mesh, over which the batch is split.

    Args:
      step: from parameters, state and batch to new parameters, new state and more. The first two are donated.
      shapes: the shapes of these three, as of :func:`shapes_of`.
      mesh: as of :func:`make_mesh`.
      specs: pytrees of ``PartitionSpec`` for the parameters and the state; None: all on every device.

    Returns:
      The compiled program, for :func:`hlo.read_program`. It runs only if the devices exist. JAX's persistent
      compilation cache is not used.
    """
    if specs is None:
        specs = jax.tree.map(lambda _: PartitionSpec(), shapes[:2])
    specs = (*specs, jax.tree.map(lambda _: PartitionSpec(AXIS), shapes[2]))
    placed = jax.tree.map(
        lambda leaf, spec: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec)),
        shapes,
        specs,
    )
    options = _GPU_OPTIONS if mesh.devices.flat[0].platform in ("gpu", "cuda") else None
    with _without_cache():
        return jax.jit(step, donate_argnums=(0, 1)).trace(*placed).lower().compile(compiler_options=options)


def program_of(rule: str, target: Target, num_devices: int = 1, **network: Any) -> hlo.Program:
    """What a data-parallel train step with AdamW and one of ``RULES`` does; ``network``: see shapes_of."""
    step = make_step(perceptron.loss, RULES[rule]())
    compiled = compile_step(step, shapes_of(rule, **network), make_mesh(target, num_devices))
    return hlo.read_program(compiled.as_text())


class Row(NamedTuple):
    """One rule on one target."""

    target: str
    rule: str
    program: hlo.Program
    compile_seconds: float
    step_seconds: float | None = None  # measured, where the device is present


def predicted_rows(target: Target) -> list[Row]:
    """All rules, compiled for one device."""
    program_of(BARE, target)  # loads the compiler, which is not to be timed
    rows = []
    for rule in RULES:
        started = time.perf_counter()
        program = program_of(rule, target)
        rows.append(Row(target.name, rule, program, time.perf_counter() - started))
    return rows


def measured_rows(device: jax.Device, repeats: int, widths: Sequence[int] = WIDTHS) -> list[Row]:
    """All rules, compiled for a device of this machine and timed on it."""
    mesh = Mesh(np.array([device]), (AXIS,), axis_types=(jax.sharding.AxisType.Auto,))
    programs, seconds, steps = {}, {}, {}
    for rule, make in RULES.items():
        params, batch = jax.device_put(perceptron.make(tuple(widths), (BATCH,)), device)
        started = time.perf_counter()
        step = make_step(perceptron.loss, make())
        compiled = compile_step(step, shapes_of(rule, widths), mesh)
        seconds[rule] = time.perf_counter() - started
        programs[rule] = hlo.read_program(compiled.as_text())
        steps[rule] = _repetition(compiled, params, jax.device_put(make().init(params), device), batch)
    medians = interleaved_medians(steps, repeats)
    return [
        Row(device.device_kind, rule, programs[rule], seconds[rule], medians[rule] / _STEPS) for rule in RULES
    ]


_STEPS = 100  # per repetition, which wait for each other on the device and not for the host


def _repetition(compiled: Any, params: Any, state: Any, batch: Any) -> Callable[[], jax.Array]:
    """A function that trains for some steps, and continues where its previous call has stopped."""
    carry = [params, state]

    def run() -> jax.Array:
        for _ in range(_STEPS):
            carry[0], carry[1], loss = compiled(carry[0], carry[1], batch)
        return loss

    return run


def run(console: Console, out: Path, repeats: int) -> dict[str, Any]:
    """Prints a table for each target, and writes ``accelerators.json`` into ``out``."""
    reasons = {name: missing_compiler(target) for name, target in TARGETS.items()}
    rows: list[Row] = []
    for name, target in TARGETS.items():
        if reasons[name] is not None:
            console.print(f"Skipped: {reasons[name]}")
            continue
        rows += predicted_rows(target)
        _print_rows(console, f"{name}, compiled", rows)
    device = jax.devices()[0]
    if device.platform == "cpu":
        console.print("JAX has no GPU or TPU here, so that no step was timed.")
    else:
        rows += measured_rows(device, repeats)
        _print_rows(console, f"{device.device_kind}, timed", rows)
    result = {
        "versions": {package: _version(package) for package in _PACKAGES},
        "widths": WIDTHS,
        "rows": [row._asdict() | {"program": row.program._asdict()} for row in rows],
    }
    write_atomically(out / "accelerators.json", lambda path: path.write_text(json.dumps(result, indent=2)))
    return result


def _print_rows(console: Console, title: str, rows: list[Row]) -> None:
    """Prints the rows of the last target; all but the first are relative to the bare optimizer."""
    rows = [row for row in rows if row.target == rows[-1].target]
    bare = rows[0]
    print_table(
        console,
        f"A train step of 0.1M parameters with AdamW on {title}: what each rule adds",
        ("rule", "kernels", "copies", "conditionals", "loops", "MB", "compile time", "step time"),
        [_cells(row, bare) for row in rows],
    )


def _cells(row: Row, bare: Row) -> tuple[str, ...]:
    names = ("kernels", "copies", "conditionals", "loops")
    if row is bare:
        counts = [str(getattr(row.program, name)) for name in names]
        step = "" if row.step_seconds is None else f"{1e6 * row.step_seconds:.0f} us"
        megabytes, compilation = f"{row.program.bytes / 1e6:.1f}", f"{row.compile_seconds:.1f} s"
    else:
        counts = [f"{getattr(row.program, name) - getattr(bare.program, name):+d}" for name in names]
        step = "" if row.step_seconds is None else f"{1e6 * (row.step_seconds - bare.step_seconds):+.0f} us"
        megabytes = f"{(row.program.bytes - bare.program.bytes) / 1e6:+.2f}"
        compilation = f"x{row.compile_seconds / bare.compile_seconds:.2f}"
    return (row.rule, *counts, megabytes, compilation, step)


@contextlib.contextmanager
def _without_cache() -> Iterator[None]:
    """Switches JAX's persistent compilation cache off, which cannot load programs for described devices."""
    folder = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()  # the cache stays bound to its first folder otherwise
    try:
        yield
    finally:
        jax.config.update("jax_compilation_cache_dir", folder)
        compilation_cache.reset_cache()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
