"""The overhead of a rule in a training step: FLOPs, memory traffic, operations, compile time and step time.

All variants are the same training step with AdamW, bare or followed by one rule, timed in random order. A
step of 100 parameters under ``lax.scan`` shows any overhead; networks show how much of it remains at a
realistic size. With an accelerator, a language model of 124 million parameters is added.
"""

import itertools
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.experimental.compilation_cache import compilation_cache
from rich.console import Console

from experiments.bench import language_model, perceptron
from experiments.reporting.tables import print_table
from experiments.timing import interleaved_medians
from experiments.training.store import write_atomically
from greedylr_jax import auto_lr, greedy_lr, hypergradient, trend_lr

BARE = "bare"
RATE = 1e-3
VARIANTS: dict[str, Callable[[], optax.GradientTransformationExtraArgs]] = {
    BARE: lambda: optax.with_extra_args_support(optax.adamw(RATE)),
    "reduce_on_plateau": lambda: _followed_by(optax.contrib.reduce_on_plateau()),
    "greedy_lr, window None": lambda: _followed_by(greedy_lr(window=None)),
    "greedy_lr": lambda: _followed_by(greedy_lr()),
    "greedy_lr, paper": lambda: _followed_by(greedy_lr(algorithm="paper")),
    "trend_lr": lambda: _followed_by(trend_lr()),
    "hypergradient": lambda: hypergradient(optax.adamw(1.0), RATE, 0.02, mode="multiplicative"),
    "auto_lr": lambda: auto_lr(optax.adamw(1.0), total_steps=100_000),
}


class Network(NamedTuple):
    """A network to train."""

    make: Callable[[], tuple[Any, dict[str, jax.Array]]]  # returns parameters and a batch
    loss: Callable[[Any, dict[str, Any]], jax.Array]
    matrix: int  # number of elements of the smallest weight matrix
    steps: int  # per repetition


def _perceptron(widths: tuple[int, ...], steps: int) -> Network:
    matrix = min(rows * columns for rows, columns in itertools.pairwise(widths))
    return Network(lambda: perceptron.make(widths, (BATCH,)), perceptron.loss, matrix, steps)


def transformer(size: language_model.Size, steps: int) -> Network:
    """A language model of the given size."""
    task = language_model.make_task(size)
    return Network(lambda: (task.init(jax.random.key(0)), task.train), task.loss, size.width**2, steps)


BATCH = 64
NETWORKS = {
    "0.1M": _perceptron((64, 256, 256, 10), steps=40),
    "2M": _perceptron((256, 1024, 1024, 512, 10), steps=6),
    "100M": _perceptron((1024, 6144, 6144, 6144, 2560, 10), steps=1),
}
SCANNED, SCAN_STEPS = 100, 50_000
# Memory for timing a pair of variants, in copies of the parameters: parameters, gradients and optimizer
# states, with a margin.
_COPIES = 16


class Row(NamedTuple):
    """One variant on one problem; differences and ratios are relative to the bare optimizer."""

    problem: str
    variant: str
    flops: float | None  # added per step
    bytes: float | None  # added per step
    operations: int | None  # added; only operations whose output is as large as a weight matrix
    compile_ratio: float | None
    time_ratio: float


def _followed_by(rule: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    return optax.chain(optax.adamw(RATE), rule)


def network_rows(name: str, network: Network, repeats: int) -> list[Row]:
    """All variants on a network; training steps donate parameters and state."""
    params, batch = network.make()
    compiled, compile_times = _compile(network, params, batch, repeats)

    def time_ratio(variant: str) -> float:
        """Times the variant against the bare optimizer; only two optimizer states are in memory at once."""
        pair = {
            each: _repetition(compiled[each], params, VARIANTS[each]().init(params), batch, network.steps)
            for each in (BARE, variant)
        }
        seconds = interleaved_medians(pair, repeats)
        return seconds[variant] / seconds[BARE]

    costs = {variant: program.cost_analysis() for variant, program in compiled.items()}
    counts = {
        variant: large_operations(program.as_text(), network.matrix) for variant, program in compiled.items()
    }
    return [
        Row(
            name,
            variant,
            costs[variant]["flops"] - costs[BARE]["flops"],
            costs[variant]["bytes accessed"] - costs[BARE]["bytes accessed"],
            counts[variant] - counts[BARE],
            compile_times[variant] / compile_times[BARE],
            1.0 if variant == BARE else time_ratio(variant),
        )
        for variant in VARIANTS
    ]


def scan_rows(repeats: int) -> list[Row]:
    """All variants on 100 parameters, with thousands of steps in one ``lax.scan``."""
    seconds = interleaved_medians({name: _scanned(make()) for name, make in VARIANTS.items()}, repeats)
    problem = f"{SCANNED}, scan"
    return [Row(problem, name, None, None, None, None, seconds[name] / seconds[BARE]) for name in VARIANTS]


def _scanned(tx: optax.GradientTransformationExtraArgs) -> Callable[[], Any]:
    """A function that minimizes a quadratic in one scan; returns parameters, state and last loss."""
    target = jnp.linspace(-1, 1, SCANNED)

    @jax.jit
    def run(params: jax.Array, state: Any) -> Any:
        def body(carry: Any, _: None) -> Any:
            params, state, _ = carry  # carries the loss, so that XLA computes it for the bare optimizer, too
            loss, grads = jax.value_and_grad(lambda p: jnp.sum((p - target) ** 2))(params)
            updates, state = tx.update(grads, state, params, value=loss)
            return (optax.apply_updates(params, updates), state, loss), None

        return jax.lax.scan(body, (params, state, jnp.zeros(())), length=SCAN_STEPS)[0]

    params = jnp.zeros(SCANNED)
    state = tx.init(params)
    return lambda: run(params, state)


def large_operations(text: str, size: int) -> int:
    """Counts the instructions of a program's entry computation that output ``size`` or more elements.

    Args:
      text: an optimized HLO program.
      size: number of elements.
    """
    entry = text[text.index("\nENTRY ") :]
    entry = entry[: entry.index("\n}")]
    count = 0
    for line in entry.splitlines()[2:]:
        shape, operation = re.match(r"\s*(?:ROOT )?%?\S+ = (\(.*?\)|\S+) ([\w-]+)\(", line).groups()
        if operation in ("parameter", "tuple", "get-tuple-element", "bitcast"):
            continue  # no computation and no copy
        elements = [
            math.prod(int(n) for n in dimensions.split(",") if n)
            for dimensions in re.findall(r"\w+\[([\d,]*)\]", shape)
        ]
        count += max(elements, default=0) >= size
    return count


def _step(network: Network, tx: optax.GradientTransformationExtraArgs) -> Any:
    """A jitted training step; a new function at each call, so that it is compiled again."""

    def step(params: Any, state: Any, batch: Any) -> Any:
        loss, grads = jax.value_and_grad(network.loss)(params, batch)
        updates, state = tx.update(grads, state, params, value=loss)
        return optax.apply_updates(params, updates), state, loss

    return jax.jit(step, donate_argnums=(0, 1))


def _compile(
    network: Network, params: Any, batch: Any, repeats: int
) -> tuple[dict[str, Any], dict[str, float]]:
    """The compiled steps, and the median seconds that tracing and compiling each of them takes."""
    compiled = {}

    def compilation(variant: str) -> Callable[[], None]:
        tx = VARIANTS[variant]()
        state = jax.eval_shape(tx.init, params)

        def run() -> None:
            compiled[variant] = _step(network, tx).lower(params, state, batch).compile()

        return run

    folder = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()  # the cache stays bound to its first folder otherwise
    try:
        seconds = interleaved_medians(
            {variant: compilation(variant) for variant in VARIANTS}, repeats, warm_up=False
        )
    finally:
        jax.config.update("jax_compilation_cache_dir", folder)
        compilation_cache.reset_cache()
    return compiled, seconds


def _repetition(compiled: Any, params: Any, state: Any, batch: Any, steps: int) -> Callable[[], Any]:
    """A function that trains a few steps, and continues from its previous call."""
    carry = [jax.tree.map(jnp.array, params), jax.tree.map(jnp.array, state)]

    def run() -> Any:
        for _ in range(steps):
            carry[0], carry[1], loss = compiled(carry[0], carry[1], batch)
        return loss

    return run


def _fits(network: Network) -> bool:
    """Whether there is enough memory for a network and the states of two optimizers."""
    params, _ = jax.eval_shape(network.make)
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
    return _available_memory() > _COPIES * size


def _available_memory() -> int:
    """Available bytes of the device, or of the machine for a CPU; 0 if unknown."""
    statistics = jax.devices()[0].memory_stats()  # None on a CPU
    if statistics:
        return statistics["bytes_limit"] - statistics["bytes_in_use"]
    try:
        return int(re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())[1]) * 1024
    except (OSError, TypeError):
        return 0


def run(console: Console, out: Path, repeats: int) -> dict[str, Any]:
    """Prints a table for each problem, and writes ``overhead.json`` into ``out``."""
    rows = scan_rows(repeats)
    networks = dict(NETWORKS)
    if jax.default_backend() != "cpu":
        networks["124M, transformer"] = transformer(language_model.Size(), steps=4)
    for name, network in networks.items():
        if _fits(network):
            rows += network_rows(name, network, repeats)
        else:
            console.print(f"Skipped the network of {name} parameters: not enough memory.")
    for problem in dict.fromkeys(row.problem for row in rows):
        print_table(
            console,
            f"{problem} parameters, AdamW: overhead of each rule ({jax.devices()[0].device_kind})",
            ("variant", "FLOPs", "bytes", "large operations", "compile time", "step time"),
            [
                (
                    row.variant,
                    _added(row.flops),
                    _added(row.bytes),
                    _added(row.operations),
                    "" if row.compile_ratio is None else f"x{row.compile_ratio:.2f}",
                    f"x{row.time_ratio:.3f}",
                )
                for row in rows
                if row.problem == problem
            ],
        )
    result = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "rows": [row._asdict() for row in rows],
    }
    write_atomically(out / "overhead.json", lambda path: path.write_text(json.dumps(result, indent=2)))
    return result


def _added(number: float | None) -> str:
    return "" if number is None else f"{number:+,.0f}"
