"""What a rule costs on a TPU and on a GPU, read from programs that are compiled without either.

The compilers run on any machine: XLA's TPU compiler is in the package ``libtpu`` (the extra ``tpu``), the GPU
compiler in JAX's CUDA plugin (the extra ``cuda``). :func:`compile_step` compiles a train step for a
:class:`Target`, and :func:`read_program` counts in the optimized program what a step costs there.
"""

import importlib.util
import math
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from experiments.bench import perceptron
from greedylr_jax import auto_lr, factor_polling, greedy_lr, hypergradient, lr_tuner, trend_lr, with_rollback
from greedylr_jax.arc import arc

# Read by libtpu when it is loaded. It otherwise asks the metadata server of a cloud machine for its topology,
# and refuses to be loaded by two processes, which could not share a TPU; compiling for described ones needs none.
_LIBTPU_SETTINGS = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
AXIS = "data"  # the axis of the mesh over which batches are split


class MissingCompilerError(RuntimeError):
    """The compiler of a target is not installed."""


class Target(NamedTuple):
    """A kind of device to compile for."""

    name: str
    platform: str  # "tpu", "cuda" or "cpu"
    topologies: dict[int, dict[str, str]] = {}  # noqa: RUF012  number of devices to arguments of the compiler


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


def _tpu(name: str) -> Target:
    shapes = {1: "2x2", 4: "2x2", 8: "2x4"}  # the smallest topology has four chips
    return Target(
        name, "tpu", {count: {"topology_name": f"{name}:{shape}"} for count, shape in shapes.items()}
    )


def _gpu(name: str, device: str, **numbers: float) -> Target:
    config = _GPU.format(device=device, **numbers)
    counts = (1, 4, 8)
    return Target(
        name, "cuda", {count: {"target_config": config, "topology": f"1x1x{count}"} for count in counts}
    )


TARGETS = {
    target.name: target
    for target in (
        _tpu("v5e"),
        _tpu("v6e"),
        _gpu(
            "h100",
            device="NVIDIA H100 80GB HBM3",
            cores=132,
            bandwidth=3_352_320_000_000,
            cache=52_428_800,
            clock=1.98,
            memory=84_942_979_072,
            capability=9,
        ),
        _gpu(
            "b200",
            device="NVIDIA B200",
            cores=148,
            bandwidth=7_672_320_000_000,
            cache=132_644_864,
            clock=1.965,
            memory=191_514_411_008,
            capability=10,
        ),
        Target("cpu", "cpu"),
    )
}
_MODULES = {"tpu": "libtpu", "cuda": "jax_plugins.xla_cuda12"}


class Program(NamedTuple):
    """What the optimized program of one train step does on one device.

    Counts are of operations that every step executes. Those in branches and loops are not among them, since
    rules use these for what few steps do.
    """

    kernels: int  # on a GPU, the kernels that are launched; on a TPU, fusions and operations on scalars
    copies: int  # without the transfers between the memories of a TPU, which run beside the computation
    conditionals: int
    loops: int  # without those whose number of iterations is known
    all_reduces: int  # in the whole program, branches included
    bytes: int  # read and written in the main memory, without branches and loops
    float64: int  # arrays of this type in the whole program
    host_operations: tuple[str, ...]  # callbacks, infeed, outfeed, send and receive; whole program
    temporary_bytes: int | None = None  # memory beyond arguments and results
    compile_seconds: float | None = None


def missing_compiler(target: Target) -> str | None:
    """The module that is not installed but needed to compile for a target; None if there is none."""
    module = _MODULES.get(target.platform)
    try:
        found = module is None or importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the parent package
        found = False
    return None if found else module


def make_mesh(target: Target, num_devices: int) -> Mesh:
    """A mesh of described devices, which need not exist, with the one axis ``AXIS``.

    Raises:
      MissingCompilerError: if the compiler is not installed.
    """
    if (module := missing_compiler(target)) is not None:
        extra = "tpu" if target.platform == "tpu" else "cuda"
        raise MissingCompilerError(
            f"the compiler for {target.name} is not installed: there is no module {module}. Install it with "
            f'pip install -e ".[{extra}]".'
        )
    if target.platform == "cpu":
        devices = jax.devices("cpu")
    else:
        for name, value in _LIBTPU_SETTINGS.items():
            os.environ.setdefault(name, value)
        arguments = dict(target.topologies[num_devices])
        name = arguments.pop("topology_name", target.name)
        devices = topologies.get_topology_desc(name, target.platform, **arguments).devices
    return Mesh(np.array(devices[:num_devices]), (AXIS,), axis_types=(jax.sharding.AxisType.Auto,))


def make_step(
    loss_fn: Callable[[Any, Any], jax.Array], tx: optax.GradientTransformationExtraArgs
) -> Callable[[Any, Any, Any], tuple[Any, Any, jax.Array]]:
    """A train step that passes the optimizer all that any rule needs."""

    def step(params: Any, state: Any, batch: Any) -> tuple[Any, Any, jax.Array]:
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        value_fn = lambda point: loss_fn(point, batch)
        updates, state = tx.update(grads, state, params, value=loss, value_fn=value_fn)
        return optax.apply_updates(params, updates), state, loss

    return step


def compile_step(
    step: Callable[[Any, Any, Any], Any],
    params: Any,
    state: Any,
    batch: Any,
    mesh: Mesh,
    *,
    specs: Any = PartitionSpec(),
) -> tuple[Any, float]:
    """Compiles a train step for the devices of a mesh, with the batch split over them.

    Args:
      step: from parameters, state and batch to new parameters, new state and more. The first two are donated.
      params: parameters, or their shapes.
      state: optimizer state, or its shapes.
      batch: a pytree of arrays or shapes, whose leading axis is split.
      mesh: see :func:`make_mesh`.
      specs: how the parameters and the state are split over the mesh: a ``PartitionSpec``, or a pair of
        pytrees of them.

    Returns:
      The compiled program, for :func:`read_program`, and the seconds that tracing and compiling took.
    """
    specs = (specs, specs) if isinstance(specs, PartitionSpec) else specs
    arguments = (
        _placed(params, mesh, specs[0]),
        _placed(state, mesh, specs[1]),
        _placed(batch, mesh, PartitionSpec(AXIS)),
    )
    is_gpu = mesh.devices.flat[0].platform in ("gpu", "cuda")
    # Autotuning would run kernels on a GPU. The tests switch optimizations off for the CPU.
    options = {"xla_gpu_autotune_level": 0, "xla_backend_optimization_level": 3} if is_gpu else None
    jitted = jax.jit(step, donate_argnums=(0, 1))
    started = time.perf_counter()
    compiled = jitted.trace(*arguments).lower().compile(compiler_options=options)
    return compiled, time.perf_counter() - started


def without_cache(compile_program: Callable[[], Any]) -> Any:
    """Calls a function with JAX's persistent compilation cache switched off."""
    folder = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()  # the cache stays bound to its first folder otherwise
    try:
        return compile_program()
    finally:
        jax.config.update("jax_compilation_cache_dir", folder)
        compilation_cache.reset_cache()


def read_program(compiled: Any) -> Program:
    """Counts what a compiled program does."""
    memory = compiled.memory_analysis()
    counted = count_operations(compiled.as_text())
    return counted._replace(temporary_bytes=None if memory is None else memory.temp_size_in_bytes)


class Instruction(NamedTuple):
    """One line of a program."""

    name: str
    shape: str
    operation: str
    operands: tuple[str, ...]
    line: str


_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([a-z][\w-]*)\((.*)$")
_ARRAY = re.compile(r"\b(pred|token|[a-z]+\d+\w*)\[([\d,]*)\](\{[^}]*\})?")
_NO_WORK = frozenset(
    "parameter constant tuple get-tuple-element bitcast after-all add-dependency partition-id replica-id "
    "opt-barrier iota".split()
)
_COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective")
_HOST = ("infeed", "outfeed", "send", "recv")


def count_operations(text: str) -> Program:
    """Counts operations in the text of an optimized HLO program."""
    computations, entry = _parse(text)
    counts: Counter[str] = Counter()
    total_bytes = 0
    shapes = {each.name: each.shape for body in computations.values() for each in body}
    for each in _always_executed(computations, entry):
        counts[_kind(each)] += 1
        if _kind(each) == "transfer":
            total_bytes += _bytes(each.shape, everywhere=True)
        elif _kind(each) in ("kernel", "copy", "collective"):
            total_bytes += _bytes(each.shape) + sum(_bytes(shapes.get(name, "")) for name in each.operands)
    everything = [each for body in computations.values() for each in body]
    return Program(
        kernels=counts["kernel"],
        copies=counts["copy"],
        conditionals=counts["conditional"],
        loops=counts["loop"],
        all_reduces=sum(each.operation in ("all-reduce", "all-reduce-start") for each in everything),
        bytes=total_bytes,
        float64=sum("f64[" in each.shape for each in everything),
        host_operations=tuple(name for each in everything for name in _host_operation(each)),
    )


def _parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """The computations of a program by name, and the name of the entry."""
    computations: dict[str, list[Instruction]] = {}
    entry, body = "", []
    for line in text.splitlines():
        if start := _COMPUTATION.match(line):
            body = computations.setdefault(start[2], [])
            entry = start[2] if start[1] else entry
        elif found := _INSTRUCTION.match(line):
            name, shape, operation, rest = found.groups()
            operands = re.findall(r"%([\w.-]+)", rest.split("), ")[0])
            body.append(Instruction(name, shape, operation, tuple(operands), line))
    return computations, entry


def _always_executed(computations: dict[str, list[Instruction]], name: str) -> Iterator[Instruction]:
    """The instructions of a computation and of those that it calls; branches and loops are not entered."""
    for each in computations[name]:
        called = re.search(r"\bto_apply=%?([\w.-]+)", each.line) if each.operation == "call" else None
        if called:
            yield from _always_executed(computations, called[1])
        else:
            yield each


def _kind(each: Instruction) -> str:
    operation = each.operation
    if operation in ("copy-done", "slice-done"):  # on a TPU, between two memories, beside the computation
        return "transfer"
    if operation in _NO_WORK or operation.endswith("-done") or operation in ("copy-start", "slice-start"):
        return "none"
    if operation == "while":
        return "known loop" if "known_trip_count" in each.line else "loop"
    if operation == "conditional" or operation == "call":
        return operation
    if operation == "copy":
        return "copy"
    if operation.startswith(_COLLECTIVES):
        return "collective"
    is_bitcast = operation == "custom-call" and 'custom_call_target="ConcatBitcast"' in each.line
    return "none" if is_bitcast else "kernel"


def _host_operation(each: Instruction) -> Iterator[str]:
    if each.operation.removesuffix("-done").removesuffix("-start") in _HOST:
        yield each.operation
    elif each.operation == "custom-call" and (
        target := re.search(r'custom_call_target="([^"]*)"', each.line)
    ):
        if "callback" in target[1].lower() or "host" in target[1].lower():
            yield target[1]


_BITS = {"pred": 8, "token": 0, "f8e4m3fn": 8, "f8e5m2": 8}


def _bytes(shape: str, everywhere: bool = False) -> int:
    """The bytes of the arrays in a shape that lie in the main memory, or in any; ``S(n)`` is another one."""
    total = 0
    for dtype, dimensions, layout in _ARRAY.findall(shape):
        if not everywhere and re.search(r"S\([1-9]", layout):
            continue
        bits = _BITS.get(dtype) or int(re.findall(r"\d+", dtype)[0] if dtype not in _BITS else 0)
        total += bits * math.prod(int(n) for n in dimensions.split(",") if n) // 8
    return total


def _placed(tree: Any, mesh: Mesh, specs: Any) -> Any:
    """The shapes of a tree's arrays, with shardings."""

    def place(leaf: Any, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
        dtype = jnp.result_type(leaf)
        return jax.ShapeDtypeStruct(jnp.shape(leaf), dtype, sharding=NamedSharding(mesh, spec))

    if isinstance(specs, PartitionSpec):
        return jax.tree.map(lambda leaf: place(leaf, specs), tree)
    return jax.tree.map(place, tree, specs)


RATE = 1e-3
BARE = "bare"


def _followed_by(rule: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    return optax.chain(optax.adamw(RATE), rule)


# Each is AdamW, with one rule; ``axis_name`` is for programs under shard_map.
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


def program_of(
    rule: str,
    target: Target,
    num_devices: int = 1,
    *,
    widths: tuple[int, ...] = (256, 1024, 1024, 512, 10),
    dtype: Any = jnp.float32,
    batch_size: int = 64,
) -> Program:
    """Compiles a train step of a perceptron with AdamW and one of ``RULES``, data-parallel."""
    tx = RULES[rule]()
    params, batch = jax.eval_shape(lambda: perceptron.make(widths, (batch_size,)))
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), params)
    step = make_step(perceptron.loss, tx)
    state = jax.eval_shape(tx.init, params)
    compiled, seconds = compile_step(step, params, state, batch, make_mesh(target, num_devices))
    return read_program(compiled)._replace(compile_seconds=seconds)
