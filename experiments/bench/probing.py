"""The cost of probing, in forward passes of the same loss, and the agreement of cheap and exact probes.

FLOPs are counted by XLA (``compiled.cost_analysis()``), which counts the body of a loop once. The remaining
passes of a probe are added at the cost of one pass at p + t d, compiled separately.
"""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console

from experiments.bench import perceptron
from experiments.reporting.tables import print_table
from experiments.tasks import make_task
from experiments.tasks.base import Task
from experiments.timing import interleaved_medians
from experiments.training.loop import take
from experiments.training.store import write_atomically
from greedylr_jax import factor_polling, superbatch_loss
from greedylr_jax.probing import _probe

FACTORS = (8.0, 4.0, 2.0, 1.0, 0.5, 0.25, 0.125)
BATCHES, BATCH = 4, 256  # batches in the superbatch, examples per batch
WIDTHS = (64, 512, 512, 512, 10)
# Direction, learning rate, and the epsilon threshold that the paper recommends for such a rate.
DIRECTIONS = {
    "sgd": (optax.sgd(1.0), 0.1, 1e-3),
    "momentum": (optax.sgd(1.0, momentum=0.9), 0.02, 1e-4),
    "adam": (optax.adam(1.0), 1e-3, 1e-8),
}


class Cost(NamedTuple):
    """A row of the table."""

    name: str
    flops: float  # in forward passes over the same data
    seconds: float  # in forward passes over the same data
    limit: float | None  # maximum of flops that the tests allow, in forward passes
    note: str


def cost_rows(repeats: int = 15) -> list[Cost]:
    """FLOPs and time of each probe on a multilayer perceptron of 0.6 million parameters.

    Args:
      repeats: repetitions of the timing; 0: count FLOPs only, and return NaN for the times.
    """
    variants, compiled = _variants(), _programs()
    flops = {name: program.cost_analysis()["flops"] for name, program in compiled.items()}
    moved = {unit: flops[f"{unit} at p + t d"] for unit in (_SUPERBATCH, _BATCH)}
    flops = {name: flops[name] + each.uncounted * moved[each.unit] for name, each in variants.items()}
    seconds = dict.fromkeys(variants, float("nan"))
    if repeats:
        runs = {
            name: lambda program=program, variant=variants[name]: program(*variant.arguments)
            for name, program in compiled.items()
        }
        seconds = interleaved_medians(runs, repeats)
    limits = {
        "probe, 3 points": 3.2,
        "probe, taylor": 6.0,
        # Every pass is at p + t d, which costs a multiplication and an addition per parameter.
        "polling, 7 factors": (flops["batch, forward and back"] + len(FACTORS) * moved[_BATCH])
        / flops[_BATCH],
    }

    return [
        Cost(
            name,
            flops[name] / flops[variant.unit],
            seconds[name] / seconds[variant.unit],
            limits.get(name),
            variant.note,
        )
        for name, variant in variants.items()
    ]


def polling_memory() -> dict[str, float]:
    """Temporary memory of a compiled polling step and of a forward pass, in copies of the parameters."""
    size = _bytes(_variants()["polling, 7 factors"].arguments[0])

    def temporary(name: str) -> float:
        return _programs()[name].memory_analysis().temp_size_in_bytes / size

    return {name: temporary(name) for name in (_BATCH, "polling, 7 factors")}


class Agreement(NamedTuple):
    """Relative differences of two probes' rates from those of a five-point fit, during a training run."""

    direction: str
    three_points: np.ndarray  # shape=(points,)
    taylor: np.ndarray  # shape=(points,)


def agreement(steps: int = 300, every: int = 20) -> list[Agreement]:
    """Trains the digits network with each direction, and compares the rates that three probes propose."""
    return [agreement_of(name, steps, every) for name in DIRECTIONS]


def agreement_of(name: str, steps: int, every: int) -> Agreement:
    """Trains the digits network with one of :data:`DIRECTIONS`, and compares the rates every few steps."""
    task = make_task("digits")
    rate = jnp.float32(DIRECTIONS[name][1])
    inner_init, step = _probing_step(task, name)
    params = task.init(jax.random.key(0))
    state, proposed = inner_init(params), []
    for index in range(steps):
        params, state, rates = step(params, state, jax.random.key(index))
        if index % every == every - 1:
            proposed.append(rates)
    three, five, taylor = np.array(proposed).T
    # Relative to the current rate if the proposal is smaller or negative: the rule ignores such proposals.
    size = np.maximum(np.abs(five), float(rate))
    return Agreement(name, np.abs(three - five) / size, np.abs(taylor - five) / size)


def _probing_step(task: Task, name: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The direction's ``init``, and a training step that returns rates from 3 points, 5 points and Taylor."""
    inner, rate, threshold = DIRECTIONS[name]
    rate = jnp.float32(rate)

    def batches(key, count):
        indices = jax.random.randint(key, (count, task.batch_size), 0, task.num_examples)
        return take(task.train, indices)

    @jax.jit
    def step(params, state, key):
        keys = jax.random.split(key)
        batch = jax.tree.map(lambda leaf: leaf[0], batches(keys[0], 1))
        loss, grads = jax.value_and_grad(task.loss)(params, batch)
        direction, state = inner.update(grads, state, params)
        value_fn = superbatch_loss(task.loss, batches(keys[1], 10))
        probed = (value_fn, params, direction, rate, jnp.cbrt(threshold * loss))
        rates = [_probe.rate_by_fit(*probed, 0.5 * rate, count) for count in (3, 5)]
        rates.append(_probe.rate_by_taylor(*probed))
        params = optax.apply_updates(params, jax.tree.map(lambda leaf: -rate * leaf, direction))
        return params, state, jnp.stack(rates)

    return inner.init, step


_SUPERBATCH, _BATCH = "superbatch, forward", "batch, forward"  # the two units


class _Variant(NamedTuple):
    unit: str  # the variant that counts as one forward pass
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    uncounted: int = 0  # passes that XLA does not count
    note: str = ""


@functools.cache
def _programs() -> dict[str, Any]:
    """The compiled variants."""
    return {
        name: jax.jit(variant.function).lower(*variant.arguments).compile()
        for name, variant in _variants().items()
    }


@functools.cache
def _variants() -> dict[str, _Variant]:
    params, batches = perceptron.make(WIDTHS, (BATCHES, BATCH))
    batch = jax.tree.map(lambda leaf: leaf[0], batches)
    polling = optax.chain(optax.sgd(0.1), factor_polling(FACTORS))

    def forward(params, batches):
        return superbatch_loss(perceptron.loss, batches)(params)

    def points(count):
        def fit(params, batches, direction, rate):
            step = (lambda p: forward(p, batches), params, direction, rate, jnp.inf)
            return _probe.rate_by_fit(*step, 0.5 * rate, count)

        return fit

    def taylor(params, batches, direction, rate):
        return _probe.rate_by_taylor(lambda p: forward(p, batches), params, direction, rate, jnp.inf)

    def poll(params, batch, state):
        value, grads = jax.value_and_grad(perceptron.loss)(params, batch)
        return polling.update(grads, state, params, value=value, value_fn=lambda p: perceptron.loss(p, batch))

    def at_moved(loss):
        return lambda params, data, direction, rate: loss(_probe.move(params, direction, -rate), data)

    direction = jax.grad(perceptron.loss)(params, batch)
    along = (params, batches, direction, jnp.float32(0.1))
    passes = len(FACTORS) - 1
    return {
        _SUPERBATCH: _Variant(_SUPERBATCH, forward, (params, batches), note="unit"),
        f"{_SUPERBATCH} at p + t d": _Variant(_SUPERBATCH, at_moved(forward), along),
        "probe, 3 points": _Variant(_SUPERBATCH, points(3), along, 2, "LRTuner's default"),
        "probe, 5 points": _Variant(_SUPERBATCH, points(5), along, 4, "as in the paper"),
        "probe, taylor": _Variant(_SUPERBATCH, taylor, along, 0, "exact"),
        _BATCH: _Variant(_BATCH, perceptron.loss, (params, batch), note="unit"),
        f"{_BATCH} at p + t d": _Variant(
            _BATCH, at_moved(perceptron.loss), (params, batch, direction, jnp.float32(0.1))
        ),
        "batch, forward and back": _Variant(_BATCH, jax.value_and_grad(perceptron.loss), (params, batch)),
        "polling, 7 factors": _Variant(
            _BATCH, poll, (params, batch, polling.init(params)), passes, "gradient and 7 passes at p + t d"
        ),
    }


def _bytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def run(console: Console, out: Path, repeats: int) -> dict[str, Any]:
    """Prints the tables, and writes ``probing.json`` into ``out``."""
    costs, memory, agreements = cost_rows(repeats), polling_memory(), agreement()
    limits = ["" if row.limit is None else f"{row.limit:.2f}" for row in costs]
    print_table(
        console,
        "Cost of probing, in forward passes over the same data",
        ("variant", "", "FLOPs (XLA)", "time", "limit"),
        [
            (row.name, row.note, f"{row.flops:.2f}", f"{row.seconds:.2f}", limit)
            for row, limit in zip(costs, limits, strict=True)
        ],
        left=2,
    )
    used, forward = memory["polling, 7 factors"], memory[_BATCH]
    console.print(
        f"Temporary memory of a polling step: {used:.2f} copies of the parameters; limit {3 + forward:.2f}, "
        f"3 copies and one forward pass ({forward:.2f}). The paper keeps {len(FACTORS)} copies.\n"
    )
    compared = []
    for each in agreements:
        cells = [f(values) for values in (each.three_points, each.taylor) for f in (np.median, np.max)]
        compared.append((each.direction, *(f"{cell:.2%}" for cell in cells)))
    print_table(
        console,
        "Proposed rates, relative difference from a 5-point fit (digits)",
        ("direction", "3 points: median", "maximum", "taylor: median", "maximum"),
        compared,
    )
    result = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "costs": [cost._asdict() for cost in costs],
        "memory": memory,
        "agreement": {
            each.direction: {"three_points": each.three_points.tolist(), "taylor": each.taylor.tolist()}
            for each in agreements
        },
    }
    write_atomically(out / "probing.json", lambda path: path.write_text(json.dumps(result, indent=2)))
    return result
