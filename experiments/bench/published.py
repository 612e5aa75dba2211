"""GreedyLR's decisions per second compared with the published PyTorch class, and its host transfers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from experiments.reporting.tables import print_table
from experiments.timing import interleaved_medians
from experiments.training.store import write_atomically
from greedylr_jax import greedy_lr_schedule

NUM_RULES = 10_000  # under vmap
# Number of losses per repetition: for one rule, for each rule under vmap, for the published class.
ONE, MANY, PUBLISHED = 500_000, 400, 50_000
BOUNDS = {"min_learning_rate": 1e-4, "max_learning_rate": 1.0}
PUBLISHED_CLASS = "published class (PyTorch)"
PUBLISHED_DEFAULTS = {"eps": 1e-8, "reset_at_min": 500}


def losses(count: int) -> np.ndarray:
    """A decaying loss curve with noise, shape (count,)."""
    generator = np.random.default_rng(0)
    return (2 * np.exp(-np.arange(count) / count) + 0.1 * generator.standard_normal(count)).astype(np.float32)


def _scanned(window: int | None, count: int, **settings: float) -> Callable[[], Any]:
    """A function that runs one rule in a scan, and returns its final state and all rates."""
    schedule = greedy_lr_schedule(0.1, window=window, **BOUNDS, **settings)
    values = jnp.asarray(losses(count))

    @jax.jit
    def run(state: Any, values: jax.Array) -> Any:
        def body(state: Any, value: jax.Array) -> Any:
            state = schedule.update(state, value=value)
            return state, schedule(state)

        return jax.lax.scan(body, state, values)

    state = schedule.init()
    return lambda: run(state, values)


def _mapped(window: int | None, count: int) -> Callable[[], Any]:
    """A function that runs many rules under ``vmap`` on differently scaled losses; returns final rates."""
    schedule = greedy_lr_schedule(0.1, window=window, **BOUNDS)
    values, factors = jnp.asarray(losses(count)), jnp.linspace(0.5, 2.0, NUM_RULES)

    @jax.jit
    def run(values: jax.Array, factors: jax.Array) -> Any:
        def one(factor: jax.Array) -> Any:
            body = lambda state, value: (schedule.update(state, value=factor * value), None)  # noqa: E731
            return schedule(jax.lax.scan(body, schedule.init(), values)[0])

        return jax.vmap(one)(factors)

    return lambda: run(values, factors)


def _published(count: int) -> Callable[[], list[float]] | None:
    """A function that runs the class in Transformers, and returns all rates; None if it is not installed."""
    try:
        import torch  # noqa: PLC0415  (optional)
        from transformers.optimization import GreedyLR  # noqa: PLC0415
    except ImportError:
        return None
    values = [float(value) for value in losses(count)]

    def rates() -> list[float]:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
        bounds = {"min_lr": BOUNDS["min_learning_rate"], "max_lr": BOUNDS["max_learning_rate"]}
        scheduler = GreedyLR(optimizer, **bounds, smooth=True, window_size=50)
        history = []
        for value in values:
            scheduler.step(value)
            history.append(optimizer.param_groups[0]["lr"])
        return history

    return rates


def check_no_host_transfer() -> None:
    """Runs a step with the rule; raises if it transfers anything to or from the host."""
    schedule = greedy_lr_schedule(0.1, **BOUNDS)
    step = jax.jit(lambda state, value: schedule.update(state, value=value))
    state, value = schedule.init(), jnp.float32(1)
    step(state, value)
    with jax.transfer_guard("disallow"):
        jax.block_until_ready(step(state, value))


def run(console: Console, out: Path, repeats: int) -> dict[str, Any]:
    """Prints decisions per second, and writes ``published.json`` into ``out``."""
    variants = {
        "one rule in a scan, window 50": (_scanned(50, ONE), ONE),
        "the same, with the published class's resets": (_scanned(50, ONE, **PUBLISHED_DEFAULTS), ONE),
        "one rule in a scan, no window": (_scanned(None, ONE), ONE),
        f"{NUM_RULES:,} rules under vmap, window 50": (_mapped(50, MANY), NUM_RULES * MANY),
        f"{NUM_RULES:,} rules under vmap, no window": (_mapped(None, MANY), NUM_RULES * MANY),
    }
    published = _published(PUBLISHED)
    if published is None:
        console.print('Skipped the published class; install it with: pip install -e ".[published]"')
    else:
        variants[PUBLISHED_CLASS] = (published, PUBLISHED)
    seconds = interleaved_medians({name: function for name, (function, _) in variants.items()}, repeats)
    speeds = {name: count / seconds[name] for name, (_, count) in variants.items()}
    result: dict[str, Any] = {"device": jax.devices()[0].device_kind, "decisions_per_second": speeds}
    baseline = speeds.get(PUBLISHED_CLASS)
    if published is not None:
        rates = np.asarray(_scanned(50, PUBLISHED, **PUBLISHED_DEFAULTS)()[1], float)
        same = float(np.mean(np.isclose(rates, published(), rtol=1e-4)))
        console.print(f"Both give the same rate (to 1e-4) at {same:.2%} of {PUBLISHED:,} steps.")
        result["same_rates"] = same
    print_table(
        console,
        f"GreedyLR's decisions per second ({jax.devices()[0].device_kind})",
        ("variant", "millions per second", "times the published class"),
        [
            (name, f"{speed / 1e6:.2f}", "" if baseline is None else f"{speed / baseline:.1f}")
            for name, speed in speeds.items()
        ],
    )
    check_no_host_transfer()
    result["host_synchronisations_per_step"] = 0
    console.print("A step with the rule passes under jax.transfer_guard('disallow'): no host transfer.")
    write_atomically(out / "published.json", lambda path: path.write_text(json.dumps(result, indent=2)))
    return result
