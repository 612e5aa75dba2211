"""What a rule adds to a training step: work, memory traffic, compiled operations, compile time and step time.

All sides are the same step with AdamW, bare or with one rule behind it, and take turns in one run. The least
step there is, 100 parameters under ``lax.scan``, shows any overhead; networks show what is left of it. A
language model of 124 million parameters joins them where JAX has more than a CPU. XLA counts the body of a
loop whether it is run or not: that of ``auto_lr`` runs only while it searches or goes back, and on the
networks its step time is that after the search.
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
from greedylr_jax import AutoState, auto_lr, greedy_lr, hypergradient, trend_lr
from greedylr_jax._search import FOUND

BARE = "bare"
RATE = 1e-3
SIDES: dict[str, Callable[[], optax.GradientTransformationExtraArgs]] = {
    BARE: lambda: optax.with_extra_args_support(optax.adamw(RATE)),
    "reduce_on_plateau": lambda: _behind(optax.contrib.reduce_on_plateau()),
    "greedy_lr, window None": lambda: _behind(greedy_lr(window=None)),
    "greedy_lr": lambda: _behind(greedy_lr()),
    "greedy_lr, paper": lambda: _behind(greedy_lr(algorithm="paper")),
    "trend_lr": lambda: _behind(trend_lr()),
    "hypergradient": lambda: hypergradient(optax.adamw(1.0), RATE, 0.02, mode="multiplicative"),
    "auto_lr": lambda: auto_lr(optax.adamw(1.0), RATE, ramp_steps=30, trial_steps=10),
}


class Network(NamedTuple):
    """A network to train."""

    make: Callable[[], tuple[Any, dict[str, jax.Array]]]  # its parameters, and a batch
    loss: Callable[[Any, dict[str, Any]], jax.Array]
    matrix: int  # elements of its least weight matrix
    steps: int  # of a turn


def _perceptron(widths: tuple[int, ...], steps: int) -> Network:
    matrix = min(rows * columns for rows, columns in itertools.pairwise(widths))
    return Network(lambda: perceptron.make(widths, (BATCH,)), perceptron.loss, matrix, steps)


def transformer(size: language_model.Size, steps: int) -> Network:
    """A language model as a network."""
    task = language_model.make_task(size)
    return Network(lambda: (task.init(jax.random.key(0)), task.train), task.loss, size.width**2, steps)


BATCH = 64
NETWORKS = {
    "0.1M": _perceptron((64, 256, 256, 10), steps=40),
    "2M": _perceptron((256, 1024, 1024, 512, 10), steps=6),
    "100M": _perceptron((1024, 6144, 6144, 6144, 2560, 10), steps=1),
}
SCANNED, SCAN_STEPS = 100, 50_000
_COPIES = 16  # of the parameters: parameters, gradients and states of a pair, and some


class Row(NamedTuple):
    """One side of one problem; differences and ratios are to the bare optimizer."""

    problem: str
    side: str
    flops: float | None  # added, a step
    bytes: float | None  # added, a step
    operations: int | None  # added, of the size of a weight matrix or more
    compile_ratio: float | None
    time_ratio: float


def _behind(rule: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    return optax.chain(optax.adamw(RATE), rule)


def network_rows(name: str, network: Network, repeats: int) -> list[Row]:
    """All sides on a network; step times of turns of a few steps, with the state donated as users do."""
    params, batch = network.make()
    compiled, compile_times = _compile(network, params, batch, repeats)

    def ratio(side: str) -> float:
        """In pairs, so that no more than two optimizer states are there at a time."""
        pair = {
            each: _turn(compiled[each], params, SIDES[each]().init(params), batch, network.steps)
            for each in (BARE, side)
        }
        seconds = interleaved_medians(pair, repeats)
        return seconds[side] / seconds[BARE]

    costs = {side: program.cost_analysis() for side, program in compiled.items()}
    counts = {side: large_operations(program.as_text(), network.matrix) for side, program in compiled.items()}
    return [
        Row(
            name,
            side,
            costs[side]["flops"] - costs[BARE]["flops"],
            costs[side]["bytes accessed"] - costs[BARE]["bytes accessed"],
            counts[side] - counts[BARE],
            compile_times[side] / compile_times[BARE],
            1.0 if side == BARE else ratio(side),
        )
        for side in SIDES
    ]


def scan_rows(repeats: int) -> list[Row]:
    """All sides on 100 parameters, thousands of steps in one ``lax.scan``."""
    target = jnp.linspace(-1, 1, SCANNED)

    def scanned(tx: optax.GradientTransformationExtraArgs) -> Callable[..., Any]:
        def run(params: jax.Array, state: Any) -> Any:
            def body(carry: Any, _: None) -> Any:
                params, state, _ = carry  # the bare optimizer's loss, too, is computed
                loss, grads = jax.value_and_grad(lambda p: jnp.sum((p - target) ** 2))(params)
                updates, state = tx.update(grads, state, params, value=loss)
                return (optax.apply_updates(params, updates), state, loss), None

            return jax.lax.scan(body, (params, state, jnp.zeros(())), length=SCAN_STEPS)[0]

        return jax.jit(run)

    params = jnp.zeros(SCANNED)

    def turn(tx: optax.GradientTransformationExtraArgs) -> Callable[[], Any]:
        run, state = scanned(tx), tx.init(params)
        return lambda: run(params, state)

    seconds = interleaved_medians({side: turn(make()) for side, make in SIDES.items()}, repeats)
    name = f"{SCANNED}, scan"
    return [Row(name, side, None, None, None, None, seconds[side] / seconds[BARE]) for side in SIDES]


def large_operations(text: str, size: int) -> int:
    """How many instructions of an optimized program's entry give an array of ``size`` elements or more."""
    entry = text[text.index("\nENTRY ") :]
    entry = entry[: entry.index("\n}")]
    count = 0
    for line in entry.splitlines()[2:]:
        shape, operation = re.match(r"\s*(?:ROOT )?%?\S+ = (\(.*?\)|\S+) ([\w-]+)\(", line).groups()
        if operation in ("parameter", "tuple", "get-tuple-element", "bitcast"):
            continue  # nothing is computed or copied
        elements = [
            math.prod(int(n) for n in dimensions.split(",") if n)
            for dimensions in re.findall(r"\w+\[([\d,]*)\]", shape)
        ]
        count += max(elements, default=0) >= size
    return count


def _step(network: Network, tx: optax.GradientTransformationExtraArgs) -> Any:
    """A training step, a new function at each call."""

    def step(params: Any, state: Any, batch: Any) -> Any:
        loss, grads = jax.value_and_grad(network.loss)(params, batch)
        updates, state = tx.update(grads, state, params, value=loss)
        return optax.apply_updates(params, updates), state, loss

    return jax.jit(step, donate_argnums=(0, 1))


def _compile(
    network: Network, params: Any, batch: Any, repeats: int
) -> tuple[dict[str, Any], dict[str, float]]:
    """The compiled steps, and the medians of the seconds that tracing and compiling took, in turns."""
    compiled = {}

    def turn(side: str) -> Callable[[], None]:
        tx = SIDES[side]()
        state = jax.eval_shape(tx.init, params)

        def run() -> None:
            compiled[side] = _step(network, tx).lower(params, state, batch).compile()

        return run

    folder = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()  # which otherwise keeps the folder that it was first used with
    try:
        seconds = interleaved_medians({side: turn(side) for side in SIDES}, repeats, warm_up=False)
    finally:
        jax.config.update("jax_compilation_cache_dir", folder)
        compilation_cache.reset_cache()
    return compiled, seconds


def _turn(compiled: Any, params: Any, state: Any, batch: Any, steps: int) -> Callable[[], Any]:
    """A few steps, which go on where the last turn ended."""
    if isinstance(state, AutoState):  # what it costs for good, and not while it searches
        search = state.search._replace(stage=jnp.int32(FOUND), found=jnp.float32(RATE))
        state = state._replace(search=search)
    held = [jax.tree.map(jnp.array, params), jax.tree.map(jnp.array, state)]

    def run() -> Any:
        for _ in range(steps):
            held[0], held[1], loss = compiled(held[0], held[1], batch)
        return loss

    return run


def _fits(network: Network) -> bool:
    """Whether the memory that arrays are in holds a network and the states of two optimizers."""
    params, _ = jax.eval_shape(network.make)
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
    return _available_memory() > _COPIES * size


def _available_memory() -> int:
    """Bytes, of the device or else of the machine; 0 where that cannot be known."""
    statistics = jax.devices()[0].memory_stats()  # None on a CPU
    if statistics:
        return statistics["bytes_limit"] - statistics["bytes_in_use"]
    try:
        return int(re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())[1]) * 1024
    except (OSError, TypeError):
        return 0


def run(console: Console, out: Path, repeats: int) -> dict[str, Any]:
    """Measures all, prints a table for each problem, and writes ``overhead.json`` into ``out``."""
    rows = scan_rows(repeats)
    networks = dict(NETWORKS)
    if jax.default_backend() != "cpu":
        networks["124M, transformer"] = transformer(language_model.Size(), steps=4)
    for name, network in networks.items():
        if _fits(network):
            rows += network_rows(name, network, repeats)
        else:
            console.print(f"Left out: the network of {name} parameters, for want of memory.")
    for problem in dict.fromkeys(row.problem for row in rows):
        print_table(
            console,
            f"{problem} parameters, AdamW: what a rule adds ({jax.devices()[0].device_kind})",
            ("side", "FLOPs", "bytes", "large operations", "compile time", "step time"),
            [
                (
                    row.side,
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
