"""GreedyLR's decisions a second, here and in the published PyTorch class, and what leaves the device."""

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

RULES = 10_000  # under vmap
ONE, MANY, PUBLISHED = 500_000, 400, 50_000  # losses of a turn
BOUNDS = {"min_learning_rate": 1e-4, "max_learning_rate": 1.0}
_THEIRS = "published class (PyTorch)"
PUBLISHED_DEFAULTS = {"eps": 1e-8, "reset_at_min": 500}


def losses(count: int) -> np.ndarray:
    """A curve that falls, with noise."""
    generator = np.random.default_rng(0)
    return (2 * np.exp(-np.arange(count) / count) + 0.1 * generator.standard_normal(count)).astype(np.float32)


def _scanned(window: int | None, count: int, **settings: float) -> Callable[[], Any]:
    """One rule, and all its rates."""
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
    """Ten thousand rules that see losses of different heights."""
    schedule = greedy_lr_schedule(0.1, window=window, **BOUNDS)
    values, heights = jnp.asarray(losses(count)), jnp.linspace(0.5, 2.0, RULES)

    @jax.jit
    def run(values: jax.Array, heights: jax.Array) -> Any:
        def one(height: jax.Array) -> Any:
            body = lambda state, value: (schedule.update(state, value=height * value), None)  # noqa: E731
            return schedule(jax.lax.scan(body, schedule.init(), values)[0])

        return jax.vmap(one)(heights)

    return lambda: run(values, heights)


def _published(count: int) -> Callable[[], list[float]] | None:
    """One rule of the class of Transformers, and all its rates; None where it is not installed."""
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
        seen = []
        for value in values:
            scheduler.step(value)
            seen.append(optimizer.param_groups[0]["lr"])
        return seen

    return rates


def check_that_it_stays_on_device() -> None:
    """A step with the rule, where every transfer to or from the host is an error."""
    schedule = greedy_lr_schedule(0.1, **BOUNDS)
    step = jax.jit(lambda state, value: schedule.update(state, value=value))
    state, value = schedule.init(), jnp.float32(1)
    step(state, value)
    with jax.transfer_guard("disallow"):
        jax.block_until_ready(step(state, value))


def run(console: Console, out: Path, repeats: int) -> dict[str, Any]:
    """Measures all, prints the table, and writes ``peers.json`` into ``out``."""
    sides = {
        "one rule in a scan, window 50": (_scanned(50, ONE), ONE),
        "the same, with the published class's resets": (_scanned(50, ONE, **PUBLISHED_DEFAULTS), ONE),
        "one rule in a scan, no window": (_scanned(None, ONE), ONE),
        f"{RULES:,} rules under vmap, window 50": (_mapped(50, MANY), RULES * MANY),
        f"{RULES:,} rules under vmap, no window": (_mapped(None, MANY), RULES * MANY),
    }
    published = _published(PUBLISHED)
    if published is None:
        console.print(
            "Left out: the published class. pip install torch transformers, to have it in the table."
        )
    else:
        sides[_THEIRS] = (published, PUBLISHED)
    seconds = interleaved_medians({name: side for name, (side, _) in sides.items()}, repeats)
    speeds = {name: count / seconds[name] for name, (_, count) in sides.items()}
    result: dict[str, Any] = {"device": jax.devices()[0].device_kind, "decisions_per_second": speeds}
    unit = speeds.get(_THEIRS)
    if published is not None:
        ours = np.asarray(_scanned(50, PUBLISHED, **PUBLISHED_DEFAULTS)()[1], float)
        same = float(np.mean(np.isclose(ours, published(), rtol=1e-4)))
        console.print(f"The two give the same rate (to 1e-4) at {same:.2%} of {PUBLISHED:,} steps.")
        result["same_rates"] = same
    print_table(
        console,
        f"GreedyLR's decisions a second ({jax.devices()[0].device_kind})",
        ("side", "millions a second", "times the published class"),
        [
            (name, f"{speed / 1e6:.2f}", "" if unit is None else f"{speed / unit:.1f}")
            for name, speed in speeds.items()
        ],
    )
    check_that_it_stays_on_device()
    result["host_synchronisations_per_step"] = 0
    console.print("A step with the rule passes under jax.transfer_guard('disallow'): it never waits.")
    write_atomically(out / "peers.json", lambda path: path.write_text(json.dumps(result, indent=2)))
    return result
