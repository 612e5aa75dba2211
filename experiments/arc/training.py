"""Training of ARC's network on the samples of ``arc generate``.

Paper: X. Dong et al., "To Raise or Not To Raise: The Autonomous Learning Rate Question", Section 3.4: the
average of the categorical cross-entropy and of the binary one of "raise" against the rest; Adam, batches of
128, 300 epochs; validation losses are hidden from the network in half of its samples. All candidates are
trained side by side, an epoch at a time, and kept on disk after each.
"""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import polars as pl
import safetensors.numpy
from rich.console import Console

from experiments.errors import UsageError
from experiments.progress import make_progress
from experiments.reporting import drawing
from experiments.reporting.tables import print_table
from experiments.training.engine import compiler_options, device_mesh, place, side_by_side
from experiments.training.store import damaged, other_settings, write_atomically
from greedylr_jax.arc import ACTIONS, batch_features, initial_weights
from greedylr_jax.arc._network import action_logits

BATCH_SIZE = 128
_MOST = 16  # samples whose gradient is taken at a time: what a backward pass keeps then fits a core's cache
_HELD_OUT = 10  # every tenth training is not learned from
_RAISE, _VALIDATION = ACTIONS.index("raise"), 1  # an action, and a column of the features


class Samples(NamedTuple):
    """What the network learns from, or is tested on."""

    features: np.ndarray  # shape=(n, 300, 3), dtype=float32
    labels: np.ndarray  # shape=(n,), dtype=int32; indices into ACTIONS


class Settings(NamedTuple):
    """How candidates are trained."""

    candidates: int = 10
    epochs: int = 300
    learning_rate: float = 1e-4


class Candidates(NamedTuple):
    """Candidates in training, each array with the candidate as its leading axis."""

    weights: dict[str, jax.Array]
    state: optax.OptState


def make_samples(rows: pl.DataFrame) -> tuple[Samples, Samples]:
    """Samples to learn from and held-out ones; all samples of a training are on the same side.

    Args:
      rows: of :func:`experiments.arc.generate.generate`.

    Raises:
      UsageError: if there are fewer than ten trainings.
    """
    features = np.stack(
        [
            batch_features(*histories)
            for histories in rows.select("train_loss", "validation_loss", "rates").iter_rows()
        ]
    )
    labels = rows["label"].to_numpy().astype(np.int32)
    trainings = rows.select(pl.struct("configuration", "optimizer", "seed").rank("dense")).to_series()
    if trainings.max() < _HELD_OUT:
        raise UsageError(f"samples must be of at least {_HELD_OUT} trainings, got {trainings.max()}")
    held_out = (trainings % _HELD_OUT == 0).to_numpy()
    return tuple(Samples(features[chosen], labels[chosen]) for chosen in (~held_out, held_out))


def hybrid_loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The mean over samples of the average of the categorical loss and the binary one of "raise".

    Args:
      logits: shape (n, 3).
      labels: shape (n,).

    Examples:
      >>> print(hybrid_loss(jnp.zeros((1, 3)), jnp.array([0])).round(4))  # -log(1/3) twice
      1.0986
      >>> print(hybrid_loss(jnp.zeros((1, 3)), jnp.array([2])).round(4))  # (log 3 - log(2/3)) / 2
      0.752

    Source: Section 3.4.
    """
    logarithms = jax.nn.log_softmax(logits)
    categorical = -jnp.take_along_axis(logarithms, labels[:, None], axis=-1)[:, 0]
    others = jax.nn.logsumexp(jnp.delete(logarithms, _RAISE, axis=-1, assume_unique_indices=True), axis=-1)
    binary = -jnp.where(labels == _RAISE, logarithms[:, _RAISE], others)
    return jnp.mean(0.5 * (categorical + binary))


def start(count: int, learning_rate: float) -> Candidates:
    """Candidates before their first epoch."""
    weights = jax.vmap(initial_weights)(jax.vmap(jax.random.key)(jnp.arange(count)))
    return Candidates(weights, jax.vmap(optax.adam(learning_rate).init)(weights))


def make_epoch(
    learned: Samples, held_out: Samples, learning_rate: float
) -> Callable[[Candidates, int], tuple[Candidates, np.ndarray]]:
    """A function that trains all candidates for an epoch.

    Returns:
      From candidates and the number of the epoch to the candidates after it, and their figures, shape
      (candidates, 3): training loss, held-out loss and held-out accuracy.
    """
    mesh, tx = device_mesh(), optax.adam(learning_rate)
    data = place((learned, held_out), mesh)
    size = min(BATCH_SIZE, len(learned.labels))
    steps = len(learned.labels) // size
    part = max(count for count in range(1, _MOST + 1) if size % count == 0)

    def one(candidate: tuple[jax.Array, Candidates], data: Any, epoch: jax.Array) -> tuple[Candidates, Any]:
        which, (weights, state) = candidate
        learned, held_out = data
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(1), which), epoch)
        order = jax.random.permutation(key, len(learned.labels))[: steps * size].reshape(steps, size)

        def loss_fn(weights: Any, batch: Samples, is_hidden: jax.Array) -> jax.Array:
            seen = jnp.where(is_hidden[:, None], 0, batch.features[..., _VALIDATION])
            return hybrid_loss(
                action_logits(weights, batch.features.at[..., _VALIDATION].set(seen)), batch.labels
            )

        def step(index: jax.Array, carry: Any) -> Any:
            weights, state, total = carry
            batch = jax.tree.map(lambda leaf: leaf[order[index]], learned)
            is_hidden = jax.random.bernoulli(jax.random.fold_in(key, index), 0.5, (size,))
            parts = jax.tree.map(lambda leaf: leaf.reshape(-1, part, *leaf.shape[1:]), (batch, is_hidden))

            def add(index: jax.Array, total: Any) -> Any:
                one_part = jax.tree.map(lambda leaf: leaf[index], parts)
                return jax.tree.map(jnp.add, total, jax.value_and_grad(loss_fn)(weights, *one_part))

            zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, weights))
            sums = jax.lax.fori_loop(0, size // part, add, zero)
            loss, grads = jax.tree.map(lambda each: each * part / size, sums)
            updates, state = tx.update(grads, state, weights)
            return optax.apply_updates(weights, updates), state, total + loss

        weights, state, total = jax.lax.fori_loop(0, steps, step, (weights, state, jnp.zeros(())))
        logits = action_logits(weights, held_out.features)
        accuracy = jnp.mean(jnp.argmax(logits, axis=-1) == held_out.labels)
        figures = jnp.stack([total / steps, hybrid_loss(logits, held_out.labels), accuracy])
        return Candidates(weights, state), figures

    def on_one_device(numbers: jax.Array, candidates: Candidates, data: Any, epoch: jax.Array) -> Any:
        return jax.lax.map(lambda candidate: one(candidate, data, epoch), (numbers, candidates))

    mapped = jax.jit(
        side_by_side(on_one_device, mesh, split=(True, True, False, False)),
        compiler_options=compiler_options(),
    )

    def epoch_of_all(candidates: Candidates, epoch: int) -> tuple[Candidates, np.ndarray]:
        count = len(jax.tree.leaves(candidates)[0])
        missing = -count % mesh.size  # each device takes as many; some of the first go along twice
        padded = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf[:missing]]), candidates)
        numbers = jnp.arange(count + missing) % count
        # Placed as they come out, so that the first epoch's program serves the others too.
        numbers, padded = place((numbers, padded), mesh, split=True)
        trained, figures = mapped(numbers, padded, data, jnp.int32(epoch))
        return jax.tree.map(lambda leaf: leaf[:count], trained), np.asarray(figures)[:count]

    return epoch_of_all


def train(samples: Path, out: Path, settings: Settings, console: Console, *, fresh: bool = False) -> None:
    """Trains candidates, and leaves ``candidate-NN.safetensors``, their histories and held-out confusions.

    Goes on where it stopped.

    Args:
      samples: the file that ``arc generate`` left.
      out: folder.
      settings: how many, and for how long.
      console: for the progress bar and the table.
      fresh: drop what an interrupted call left.

    Raises:
      UsageError: if the samples cannot be read, or the folder cannot be written or holds an unfinished
        training with other settings.
    """
    learned, held_out = make_samples(read_samples(samples))
    described = settings._asdict() | {"samples": len(learned.labels), "held_out": len(held_out.labels)}
    del described["epochs"]  # more of them continue a training
    candidates = start(settings.candidates, settings.learning_rate)
    checkpoint = Checkpoint(out / "unfinished.safetensors", described, candidates, fresh=fresh)
    candidates, history = checkpoint.read()
    run_epoch = make_epoch(learned, held_out, settings.learning_rate)
    with make_progress(console, "epochs") as progress:
        bar = progress.add_task("", total=settings.epochs, completed=len(history))
        for epoch in range(len(history), settings.epochs):
            candidates, figures = run_epoch(candidates, epoch)
            history = np.concatenate([history, figures[None]])
            checkpoint.write(candidates, history)
            loss, accuracy = figures[:, 1].mean(), figures[:, 2].mean()
            progress.update(bar, advance=1, description=f"held-out loss {loss:.3f}, accuracy {accuracy:.3f}")
    described["epochs"] = len(history)
    _finish(out, candidates, history, held_out, described, console)
    checkpoint.path.unlink(missing_ok=True)


def read_samples(path: Path) -> pl.DataFrame:
    """The samples of a file, or ``UsageError``."""
    try:
        return pl.read_parquet(path)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise UsageError(f"cannot read samples {path}: make them with arc generate ({error})") from error


class Checkpoint:
    """An unfinished training on disk, in one file that appears by an atomic rename."""

    def __init__(self, path: Path, described: dict[str, Any], candidates: Candidates, *, fresh: bool):
        """``candidates`` are those to begin with; ``described`` is all that they become depends on."""
        self.path = path
        self._described = {"settings": json.dumps(described, sort_keys=True)}
        self._start, self._structure = candidates, jax.tree.structure(candidates)
        if fresh:
            path.unlink(missing_ok=True)

    def read(self) -> tuple[Candidates, np.ndarray]:
        """Candidates and history, shape (epochs so far, candidates, 3)."""
        if not self.path.exists():
            return self._start, np.zeros((0, len(jax.tree.leaves(self._start)[0]), 3), np.float32)
        try:
            with safetensors.safe_open(self.path, framework="numpy") as file:
                if file.metadata() != self._described:
                    raise other_settings(self.path.parent, "training")
                leaves = [jnp.asarray(file.get_tensor(f"{i:02d}")) for i in range(self._structure.num_leaves)]
                return self._structure.unflatten(leaves), file.get_tensor("history")
        except (OSError, safetensors.SafetensorError) as error:
            raise damaged(self.path, error) from error

    def write(self, candidates: Candidates, history: np.ndarray) -> None:
        """Keeps candidates and history."""
        leaves = jax.device_get(jax.tree.leaves(candidates))
        arrays = {f"{i:02d}": np.ascontiguousarray(leaf) for i, leaf in enumerate(leaves)}
        arrays["history"] = history
        content = safetensors.numpy.save(arrays, self._described)
        write_atomically(self.path, lambda path: path.write_bytes(content))


def confusion(weights: dict[str, jax.Array], samples: Samples) -> np.ndarray:
    """How many samples of each label (rows) get each action (columns), shape (3, 3)."""
    actions = np.asarray(jnp.argmax(action_logits(weights, samples.features), axis=-1))
    counts = np.zeros((len(ACTIONS), len(ACTIONS)), int)
    np.add.at(counts, (samples.labels, actions), 1)
    return counts


def candidate_path(folder: Path, number: int) -> Path:
    """Where the weights of a candidate lie."""
    return folder / f"candidate-{number:02d}.safetensors"


def _finish(
    out: Path,
    candidates: Candidates,
    history: np.ndarray,
    held_out: Samples,
    described: dict[str, Any],
    console: Console,
) -> None:
    rows, cells = [], []
    for number in range(history.shape[1]):
        weights = jax.device_get(jax.tree.map(lambda leaf, n=number: leaf[n], candidates.weights))
        weights = {name: np.ascontiguousarray(array) for name, array in weights.items()}
        metadata = {key: str(value) for key, value in described.items()} | {"candidate": str(number)}
        content = safetensors.numpy.save(weights, metadata)
        write_atomically(candidate_path(out, number), lambda path, c=content: path.write_bytes(c))
        counts = confusion(weights, held_out)
        for label, action in itertools.product(range(len(ACTIONS)), repeat=2):
            row = {"candidate": number, "label": ACTIONS[label], "action": ACTIONS[action]}
            rows.append(row | {"samples": int(counts[label, action])})
        loss, held_out_loss, accuracy = history[-1, number]
        cells.append([str(number), *(f"{figure:.3f}" for figure in (loss, held_out_loss, accuracy))])
    table = pl.DataFrame(rows)
    write_atomically(out / "confusion.csv", table.write_csv)
    epochs, numbers = np.meshgrid(*map(np.arange, history.shape[:2]), indexing="ij")
    figures = dict(
        zip(("training_loss", "held_out_loss", "held_out_accuracy"), np.moveaxis(history, 2, 0), strict=True)
    )
    histories = pl.DataFrame(
        {"epoch": epochs.ravel() + 1, "candidate": numbers.ravel()}
        | {name: values.ravel() for name, values in figures.items()}
    )
    write_atomically(out / "histories.parquet", histories.write_parquet)
    drawing.save(_draw(history), out / "training.png")
    headers = ("candidate", "training loss", "held-out loss", "held-out accuracy")
    print_table(console, f"Candidates after {len(history)} epochs", headers, cells)
    console.print(f"Weights, confusion.csv, histories.parquet and training.png are in {out}.")


def _draw(history: np.ndarray) -> plt.Figure:
    """Losses and accuracy over the epochs, a line for each candidate."""
    figure, panels = drawing.panels(3, 3)
    for column, (axes, title) in enumerate(
        zip(panels, ("training loss", "held-out loss", "held-out accuracy"), strict=True)
    ):
        axes.plot(np.arange(1, len(history) + 1), history[..., column], lw=1, alpha=0.8)
        axes.set_title(title)
        axes.set_xlabel("epoch")
    figure.suptitle("ARC's network in training, a line a candidate")
    return figure
