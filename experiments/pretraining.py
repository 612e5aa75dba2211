"""``python -m experiments pretrain``: trains the networks of :mod:`experiments.tasks.pretraining` and stores
them in the user's cache folder.

A finished network is one safetensors file. Its name holds the kind, the preset and a hash of all that its
weights depend on: the data set, the size of the network, the settings of the training, and the version of
this code. An unfinished training is a file beside it, replaced atomically every 50 steps, from which the same
command resumes; the weights equal those of an uninterrupted training.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import safetensors
import safetensors.numpy
from rich.console import Console

from experiments.data.digits import Digits
from experiments.data.stdlib import StdlibText
from experiments.errors import UsageError
from experiments.progress import make_progress
from experiments.tasks import FINE_TUNING_TASKS
from experiments.tasks.base import Task
from experiments.tasks.named import Arrays
from experiments.tasks.pretraining import KINDS, SIZES, load_corpus, make_task
from experiments.training.engine import compiler_options
from experiments.training.loop import batch_indices, take, train_step
from experiments.training.store import damaged, write_atomically

CHUNK = 50  # steps in a compiled call; the number of steps is a multiple, or below it
_VERSION = 1  # of this code; a change of the networks or of the training must increase it


# The networks that a kind of fine-tuning task starts from.
START: dict[str, tuple[str, ...]] = {
    "tagging": ("encoder",),
    "question-answering": ("encoder",),
    "summarization": ("encoder", "decoder"),
    "translation-fr": ("encoder", "decoder"),
    "docstrings": ("decoder",),
    "digits": ("image",),
}


class Pretrained(NamedTuple):
    """A pretrained network.

    Attributes:
      arrays: its parameters by name.
      words: of its vocabulary; none for images.
      losses: the mean training loss of each :data:`CHUNK` steps.
      metric: held-out accuracy, from 0 to 1.
    """

    arrays: Arrays
    words: list[str]
    losses: list[float]
    metric: float


def describe(kind: str, preset: str) -> dict[str, Any]:
    """All that the weights depend on, as JSON values."""
    size = SIZES[preset]._asdict()
    data = Digits if kind == "image" else StdlibText
    config = data.BUILDER_CONFIGS[0].name if data.BUILDER_CONFIGS else ""
    other = (
        ("words", "length", "width", "layers", "steps") if kind == "image" else ("channels", "image_steps")
    )
    return {
        "kind": kind,
        "preset": preset,
        "data": f"{data.name}/{config}/{data.VERSION}",
        "size": {name: value for name, value in size.items() if name not in other},
        "version": _VERSION,
    }


def weights_path(kind: str, preset: str) -> Path:
    """The file of a pretrained network, below ``XDG_CACHE_HOME`` or ``~/.cache``."""
    digest = hashlib.sha256(json.dumps(describe(kind, preset), sort_keys=True).encode()).hexdigest()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "greedylr_jax" / "pretrained" / f"{kind}-{preset}-{digest[:12]}.safetensors"


def load(kind: str, preset: str) -> Pretrained:
    """Reads a pretrained network.

    Raises:
      UsageError: if it has not been trained yet, or the file cannot be read.
    """
    path = weights_path(kind, preset)
    if not path.exists():
        raise UsageError(
            f"there is no pretrained network {path}; run: python -m experiments pretrain --preset {preset}"
        )
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata = file.metadata()
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
    except (OSError, safetensors.SafetensorError) as error:
        raise UsageError(f"cannot read {path}: {error}; delete it and run pretrain again") from error
    fields = (json.loads(metadata[name]) for name in Pretrained._fields[1:])
    return Pretrained(arrays, *fields)


def pretrain(
    preset: str,
    console: Console,
    *,
    fresh: bool = False,
    kinds: Sequence[str] | None = None,
    data_dir: Path | None = None,
) -> None:
    """Trains the networks of a preset that are not in the cache yet, and resumes an unfinished training.

    Args:
      preset: key of :data:`experiments.tasks.pretraining.SIZES`.
      console: for the progress.
      fresh: train the networks anew.
      kinds: of the networks; None: all.
      data_dir: of prepared data sets; None: TFDS's default.
    """
    for kind in KINDS if kinds is None else kinds:
        path = weights_path(kind, preset)
        for stored in (path, _unfinished(path)) if fresh else ():
            stored.unlink(missing_ok=True)
        if not path.exists():
            _train(kind, preset, console, data_dir)
        found = load(kind, preset)
        count = sum(array.size for array in found.arrays.values())
        console.print(
            f"{kind}: {count:,} parameters, training loss {found.losses[-1]:.3f}, held-out accuracy "
            f"{100 * found.metric:.1f}%, {path}"
        )


def pretrain_for(tasks: Iterable[str], console: Console) -> None:
    """Trains the networks that fine-tuning tasks among ``tasks`` start from, as :func:`pretrain`."""
    needed = dict.fromkeys(
        (preset, own)
        for kind, _, preset in (
            FINE_TUNING_TASKS[task].arguments[1:] for task in tasks if task in FINE_TUNING_TASKS
        )
        for own in START[kind]
    )
    for preset in dict.fromkeys(preset for preset, _ in needed):
        pretrain(preset, console, kinds=[kind for kind in KINDS if (preset, kind) in needed])


def _unfinished(path: Path) -> Path:
    return path.with_suffix(".unfinished.safetensors")


def optimizer(steps: int, learning_rate: float) -> optax.GradientTransformationExtraArgs:
    """AdamW with a warm-up over 5% of the steps, a cosine decay to 0, and gradients clipped to norm 1."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, max(1, steps // 20), steps)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.01))
    return optax.with_extra_args_support(tx)


def _train(kind: str, preset: str, console: Console, data_dir: Path | None) -> None:
    size, path = SIZES[preset], weights_path(kind, preset)
    with make_progress(console, "steps") as progress:
        steps = size.image_steps if kind == "image" else size.steps
        bar = progress.add_task(f"{kind}: data", total=steps)
        task = make_task(kind, preset, data_dir=data_dir)
        tx = optimizer(steps, size.learning_rate)
        initial = jax.jit(lambda key: _initial(task, tx, key))(jax.random.key(0))
        state, losses = _resume(_unfinished(path), initial)
        batches = batch_indices(task, steps, jax.random.key(1))
        chunk = min(CHUNK, steps)
        done = chunk * len(losses)
        progress.update(bar, description=f"{kind}: compiling", completed=done)
        run = _compile(task, tx, state, batches[:chunk])
        for start in range(done, steps, chunk):
            state, loss = run(*state, batches[start : start + chunk], np.int32(start))
            losses.append(float(loss))
            _save(_unfinished(path), state, losses)
            progress.update(bar, advance=chunk, description=f"{kind}: loss {losses[-1]:.3f}")
    metric = float(jax.jit(task.metric)(state[0], jax.tree.map(jnp.asarray, task.test)))
    words = [] if kind == "image" else load_corpus(size, data_dir).vocabulary.words
    fields = {"words": words, "losses": losses, "metric": metric, "described": describe(kind, preset)}
    metadata = {name: json.dumps(value) for name, value in fields.items()}
    _write(path, jax.device_get(state[0]), metadata)
    _unfinished(path).unlink()


def _initial(task: Task, tx: optax.GradientTransformationExtraArgs, key: jax.Array) -> tuple[Arrays, Any]:
    params = task.init(key)
    return params, tx.init(params)


def _compile(
    task: Task, tx: optax.GradientTransformationExtraArgs, state: Any, batches: jax.Array
) -> Callable[..., Any]:
    """The program of a chunk of steps: parameters, state, batches and first step to the same and the loss."""
    train = jax.tree.map(jnp.asarray, task.train)

    def run(params: Arrays, tx_state: Any, batches: jax.Array, start: jax.Array, train: Any) -> Any:
        source = task.collector.init(jax.random.fold_in(jax.random.key(2), start), params)

        def body(carry: Any, indices: jax.Array) -> Any:
            params, tx_state, source = carry
            source, batch = task.collector.collect(source, params, take(train, indices))
            params, tx_state, loss = train_step(task, tx, params, tx_state, batch)
            return (params, tx_state, source), loss

        (params, tx_state, _), losses = jax.lax.scan(body, (params, tx_state, source), batches)
        return (params, tx_state), losses.mean()

    lowered = jax.jit(run).lower(*state, batches, np.int32(0), train)
    compiled = lowered.compile(compiler_options=compiler_options())
    return lambda params, tx_state, batches, start: compiled(params, tx_state, batches, start, train)


def _save(path: Path, state: Any, losses: list[float]) -> None:
    leaves = {f"{number:04d}": leaf for number, leaf in enumerate(jax.tree.leaves(jax.device_get(state)))}
    _write(path, leaves, {"losses": json.dumps(losses)})


def _write(path: Path, arrays: Arrays, metadata: dict[str, str]) -> None:
    contiguous = {name: np.ascontiguousarray(array).reshape(array.shape) for name, array in arrays.items()}
    content = safetensors.numpy.save(contiguous, metadata)
    write_atomically(path, lambda temporary: temporary.write_bytes(content))


def _resume(path: Path, initial: Any) -> tuple[Any, list[float]]:
    """The state of an unfinished training and its losses; the initial state and none if there is no file."""
    if not path.exists():
        return initial, []
    leaves, structure = jax.tree.flatten(initial)
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            stored = [file.get_tensor(f"{number:04d}") for number in range(len(leaves))]
            return structure.unflatten(map(jnp.asarray, stored)), json.loads(file.metadata()["losses"])
    except (OSError, safetensors.SafetensorError) as error:
        raise damaged(path, error) from error
