"""The cost of ARC's observations and decisions, compared with a training step of each network task."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console

from experiments.reporting.tables import print_table
from experiments.tasks import make_task
from experiments.timing import interleaved_medians
from experiments.training.engine import OPTIMIZERS
from experiments.training.loop import take, train_step
from experiments.training.store import write_atomically
from greedylr_jax.arc import arc

TASKS = ("digits-mlp", "mnist1d-mlp", "digits", "digits-vit", "digits-resnet", "language-lstm")
CYCLE = 100  # steps between two decisions
_STEPS = 2 * CYCLE  # training steps per repetition
_CYCLES = 20  # per repetition of ARC: enough for its buffers to stay in the caches, as in a small training


def run(console: Console, out: Path, repeats: int) -> dict[str, Any]:
    """Prints milliseconds per step of training, of ARC and of its decisions; writes ``arc.json``."""
    variants = _arc_steps() | {name: _training_steps(name) for name in TASKS}
    seconds = interleaved_medians(variants, repeats)
    training = {name: 1e3 * seconds[name] / _STEPS for name in TASKS}
    arc_step, observing = (1e3 * seconds[name] / (_CYCLES * CYCLE) for name in ("ARC", "observing"))
    decisions = arc_step - observing
    cells = [
        (
            name,
            *(f"{each:.4f}" for each in (training[name], arc_step, decisions)),
            f"{decisions / training[name]:.2%}",
        )
        for name in TASKS
    ]
    title = f"Milliseconds per step, with a decision every {CYCLE} steps, on {jax.devices()[0].device_kind}"
    headers = ("task", "training", "ARC", "of which decisions", "decisions / training")
    print_table(console, title, headers, cells)
    result = {
        "device": jax.devices()[0].device_kind,
        "arc": arc_step,
        "decisions": decisions,
        "tasks": training,
    }
    write_atomically(out / "arc.json", lambda path: path.write_text(json.dumps(result, indent=2)))
    return result


def _arc_steps() -> dict[str, Callable[[], Any]]:
    """Some cycles of ARC, and the same program from a state in which no cycle ends."""
    rule = arc(steps_per_cycle=CYCLE)
    losses = jnp.asarray(np.random.default_rng(0).uniform(1, 2, _CYCLES * CYCLE), jnp.float32)

    @jax.jit
    def observe(state: Any, losses: jax.Array) -> Any:
        def body(state: Any, loss: jax.Array) -> Any:
            return rule.update(None, state, value=loss, validation_value=loss)[1], None

        return jax.lax.scan(body, state, losses)[0]

    state = rule.init(None)
    early = state._replace(rule=state.rule._replace(step=jnp.int32(-2 * len(losses))))
    return {"ARC": lambda: observe(state, losses), "observing": lambda: observe(early, losses)}


def _training_steps(name: str) -> Callable[[], Any]:
    """Training steps of a task with AdamW, without a rule."""
    task, tx = make_task(name), optax.with_extra_args_support(OPTIMIZERS["adamw"](1e-3))
    data = jax.device_put(task.train)
    params = task.init(jax.random.key(0))
    rows = np.random.default_rng(0).integers(0, task.num_examples, (_STEPS, task.batch_size))

    @jax.jit
    def train(carry: Any, data: Any, rows: jax.Array) -> Any:
        def body(carry: Any, indices: jax.Array) -> Any:
            params, state, _ = train_step(task, tx, *carry, take(data, indices))
            return (params, state), None

        return jax.lax.scan(body, carry, rows)[0]

    start = params, tx.init(params)
    return lambda: train(start, data, rows)
