"""Trains ARC's network on the samples of ``arc generate``.

Paper: X. Dong et al., "To Raise or Not To Raise: The Autonomous Learning Rate Question", Section 3.4: the
loss is the average of the categorical cross-entropy and of the binary cross-entropy of "raise" against the
other actions; Adam, batches of 128, 300 epochs; validation losses are hidden from the network for half of the
samples. All candidates train in parallel, and a checkpoint is written after every epoch.
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

from experiments.arc.metrics import held_out_metrics
from experiments.errors import UsageError
from experiments.progress import make_progress
from experiments.reporting import drawing
from experiments.reporting.tables import print_table
from experiments.training.engine import compiler_options, device_mesh, place, side_by_side
from experiments.training.loop import take
from experiments.training.store import damaged, other_settings, write_atomically
from greedylr_jax.arc import ACTIONS, batch_features, initial_weights
from greedylr_jax.arc._network import PUBLISHED, SMALL, Architecture, action_logits

BATCH_SIZE = 128
_MAX_MICROBATCH = 16  # samples per gradient computation: its intermediate values fit a core's cache
_HELD_OUT = 10  # every tenth training run is held out
_RAISE = ACTIONS.index("raise")
# 9,315 parameters, of the weights in the package; 79,043 parameters, of the paper.
ARCHITECTURES = {"small": SMALL, "published": PUBLISHED}
_VALIDATION = 1  # column of the validation losses in the features


class Samples(NamedTuple):
    """Inputs and labels of the network."""

    features: np.ndarray  # shape=(n, 300, 3), dtype=float32
    labels: np.ndarray  # shape=(n,), dtype=int32; indices into ACTIONS


class CandidateSettings(NamedTuple):
    """How the candidates are trained."""

    candidates: int = 10
    epochs: int = 300
    learning_rate: float = 1e-4  # of Adam
    architecture: str = "small"  # a key of ARCHITECTURES


class Candidates(NamedTuple):
    """Weights and optimizer states of all candidates; the leading axis of each array is the candidate."""

    weights: dict[str, jax.Array]
    state: optax.OptState


def make_samples(rows: pl.DataFrame) -> tuple[Samples, Samples]:
    """Splits samples into training and held-out samples, by whole training runs.

    Args:
      rows: samples from :func:`experiments.arc.generate.generate`.

    Returns:
      Training samples, and held-out samples of every tenth training run.

    Raises:
      UsageError: if the samples are of fewer than ten training runs.
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
        raise UsageError(f"samples must be of at least {_HELD_OUT} training runs, got {trainings.max()}")
    held_out = (trainings % _HELD_OUT == 0).to_numpy()
    training, test = (Samples(features[rows], labels[rows]) for rows in (~held_out, held_out))
    return training, test


def hybrid_loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Average of the categorical cross-entropy and of the binary cross-entropy of "raise", over all samples.

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


def initial_candidates(count: int, learning_rate: float, architecture: Architecture = SMALL) -> Candidates:
    """Candidates with random weights and new optimizer states."""
    keys = jax.vmap(jax.random.key)(jnp.arange(count))
    weights = jax.vmap(lambda key: initial_weights(key, architecture))(keys)
    return Candidates(weights, jax.vmap(optax.adam(learning_rate).init)(weights))


def make_epoch(
    learned: Samples, held_out: Samples, learning_rate: float
) -> Callable[[Candidates, int], tuple[Candidates, np.ndarray]]:
    """Returns a function that trains all candidates for one epoch.

    Returns:
      A function from the candidates and the epoch's number to the candidates after it and their metrics,
      shape (candidates, 3): training loss, held-out loss and held-out accuracy.
    """
    mesh = device_mesh()
    data = place((learned, held_out), mesh)
    train_one = _make_candidate_epoch(len(learned.labels), learning_rate)

    def on_one_device(numbers: jax.Array, candidates: Candidates, data: Any, epoch: jax.Array) -> Any:
        return jax.lax.map(lambda candidate: train_one(*candidate, data, epoch), (numbers, candidates))

    mapped = jax.jit(
        side_by_side(on_one_device, mesh, split=(True, True, False, False)),
        compiler_options=compiler_options(),
    )

    def train_epoch(candidates: Candidates, epoch: int) -> tuple[Candidates, np.ndarray]:
        count = len(jax.tree.leaves(candidates)[0])
        missing = -count % mesh.size  # every device needs as many; pad with copies of the first candidates
        padded = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf[:missing]]), candidates)
        numbers = jnp.arange(count + missing) % count
        # With the sharding of the outputs, so that later epochs reuse the first epoch's program.
        numbers, padded = place((numbers, padded), mesh, split=True)
        trained, metrics = mapped(numbers, padded, data, jnp.int32(epoch))
        return jax.tree.map(lambda leaf: leaf[:count], trained), np.asarray(metrics)[:count]

    return train_epoch


def _make_candidate_epoch(num_samples: int, learning_rate: float) -> Callable[..., tuple[Candidates, Any]]:
    """Returns a function that trains one candidate for one epoch, and gives its metrics, shape (3,)."""
    tx = optax.adam(learning_rate)
    size = min(BATCH_SIZE, num_samples)
    steps = num_samples // size

    def train_one(
        number: jax.Array, candidate: Candidates, data: tuple[Samples, Samples], epoch: jax.Array
    ) -> tuple[Candidates, jax.Array]:
        learned, held_out = data
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(1), number), epoch)
        order = jax.random.permutation(key, num_samples)[: steps * size].reshape(steps, size)

        def step(index: jax.Array, carry: Any) -> Any:
            weights, state, total = carry
            is_hidden = jax.random.bernoulli(jax.random.fold_in(key, index), 0.5, (size,))
            loss, grads = _loss_and_gradients(weights, take(learned, order[index]), is_hidden)
            updates, state = tx.update(grads, state, weights)
            return optax.apply_updates(weights, updates), state, total + loss

        weights, state, total = jax.lax.fori_loop(0, steps, step, (*candidate, jnp.zeros(())))
        logits = action_logits(weights, held_out.features)
        accuracy = jnp.mean(jnp.argmax(logits, axis=-1) == held_out.labels)
        metrics = jnp.stack([total / steps, hybrid_loss(logits, held_out.labels), accuracy])
        return Candidates(weights, state), metrics

    return train_one


def _loss_and_gradients(weights: Any, batch: Samples, is_hidden: jax.Array) -> tuple[jax.Array, Any]:
    """Loss and gradients of a batch, accumulated over microbatches of :data:`_MAX_MICROBATCH` at most.

    Args:
      weights: of the network.
      batch: samples.
      is_hidden: for each sample, whether the network is given zeros instead of its validation losses.
    """
    size = len(batch.labels)
    part = max(count for count in range(1, _MAX_MICROBATCH + 1) if size % count == 0)
    parts = jax.tree.map(lambda leaf: leaf.reshape(-1, part, *leaf.shape[1:]), (batch, is_hidden))

    def loss_fn(weights: Any, batch: Samples, is_hidden: jax.Array) -> jax.Array:
        validation = jnp.where(is_hidden[:, None], 0, batch.features[..., _VALIDATION])
        return hybrid_loss(
            action_logits(weights, batch.features.at[..., _VALIDATION].set(validation)), batch.labels
        )

    def add(index: jax.Array, total: Any) -> Any:
        one_part = jax.tree.map(lambda leaf: leaf[index], parts)
        return jax.tree.map(jnp.add, total, jax.value_and_grad(loss_fn)(weights, *one_part))

    zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, weights))
    sums = jax.lax.fori_loop(0, size // part, add, zero)
    return jax.tree.map(lambda leaf: leaf * part / size, sums)


def train(
    samples: Path, out: Path, settings: CandidateSettings, console: Console, *, fresh: bool = False
) -> None:
    """Trains candidates; writes their weights, histories, held-out confusion matrices and held-out metrics.

    Resumes after an interruption.

    Args:
      samples: the file that ``arc generate`` wrote.
      out: output folder.
      settings: number of candidates and epochs, learning rate, and architecture.
      console: for the progress bar and the table.
      fresh: discard unfinished work.

    Raises:
      UsageError: if the samples cannot be read, or the folder cannot be written or holds an unfinished
        training with other settings.
    """
    learned, held_out = make_samples(read_samples(samples))
    described = settings._asdict() | {"samples": len(learned.labels), "held_out": len(held_out.labels)}
    del described["epochs"]  # a finished training may be continued for more epochs
    candidates = initial_candidates(
        settings.candidates, settings.learning_rate, ARCHITECTURES[settings.architecture]
    )
    checkpoint = Checkpoint(out / "unfinished.safetensors", described, candidates, fresh=fresh)
    candidates, history = checkpoint.read()
    train_epoch = make_epoch(learned, held_out, settings.learning_rate)
    with make_progress(console, "epochs") as progress:
        bar = progress.add_task("", total=settings.epochs, completed=len(history))
        for epoch in range(len(history), settings.epochs):
            candidates, metrics = train_epoch(candidates, epoch)
            history = np.concatenate([history, metrics[None]])
            checkpoint.write(candidates, history)
            loss, accuracy = metrics[:, 1].mean(), metrics[:, 2].mean()
            progress.update(bar, advance=1, description=f"held-out loss {loss:.3f}, accuracy {accuracy:.3f}")
    described["epochs"] = len(history)
    _finish(out, candidates, history, held_out, described, console)
    checkpoint.path.unlink(missing_ok=True)


def read_samples(path: Path) -> pl.DataFrame:
    """Reads samples from a file, or raises ``UsageError``."""
    try:
        return pl.read_parquet(path)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise UsageError(
            f"cannot read samples from {path}; generate them with arc generate ({error})"
        ) from error


class Checkpoint:
    """An unfinished training on disk, in one file that is replaced atomically."""

    def __init__(self, path: Path, described: dict[str, Any], candidates: Candidates, *, fresh: bool):
        """Opens a checkpoint.

        Args:
          path: its file.
          described: the settings that the training depends on.
          candidates: the initial candidates.
          fresh: delete an existing checkpoint.
        """
        self.path = path
        self._described = {"settings": json.dumps(described, sort_keys=True)}
        self._start, self._structure = candidates, jax.tree.structure(candidates)
        if fresh:
            path.unlink(missing_ok=True)

    def read(self) -> tuple[Candidates, np.ndarray]:
        """Returns the candidates and their history, shape (epochs so far, candidates, 3)."""
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
        """Saves candidates and history."""
        leaves = jax.device_get(jax.tree.leaves(candidates))
        arrays = {f"{i:02d}": np.ascontiguousarray(leaf) for i, leaf in enumerate(leaves)}
        arrays["history"] = history
        content = safetensors.numpy.save(arrays, self._described)
        write_atomically(self.path, lambda path: path.write_bytes(content))


def confusion(weights: dict[str, jax.Array], samples: Samples) -> np.ndarray:
    """Confusion matrix: number of samples by label (rows) and predicted action (columns), shape (3, 3)."""
    actions = np.asarray(jnp.argmax(action_logits(weights, samples.features), axis=-1))
    counts = np.zeros((len(ACTIONS), len(ACTIONS)), int)
    np.add.at(counts, (samples.labels, actions), 1)
    return counts


def candidate_path(folder: Path, number: int) -> Path:
    """File of a candidate's weights."""
    return folder / f"candidate-{number:02d}.safetensors"


def _finish(
    out: Path,
    candidates: Candidates,
    history: np.ndarray,
    held_out: Samples,
    described: dict[str, Any],
    console: Console,
) -> None:
    """Writes weights, confusion matrices, histories and figure, and prints a table."""
    rows, cells, measured = [], [], []
    for number in range(history.shape[1]):
        weights = jax.device_get(jax.tree.map(lambda leaf, n=number: leaf[n], candidates.weights))
        weights = {name: np.ascontiguousarray(array) for name, array in weights.items()}
        metadata = {key: str(value) for key, value in described.items()} | {"candidate": str(number)}
        content = safetensors.numpy.save(weights, metadata)
        write_atomically(candidate_path(out, number), lambda path, c=content: path.write_bytes(c))
        counts = confusion(weights, held_out)
        probabilities = np.asarray(jax.nn.softmax(action_logits(weights, held_out.features)))
        measured.append({"candidate": number} | held_out_metrics(probabilities, held_out.labels))
        for label, action in itertools.product(range(len(ACTIONS)), repeat=2):
            row = {"candidate": number, "label": ACTIONS[label], "action": ACTIONS[action]}
            rows.append(row | {"samples": int(counts[label, action])})
        cells.append([str(number), *(f"{metric:.3f}" for metric in history[-1, number])])
    write_atomically(out / "confusion.csv", pl.DataFrame(rows).write_csv)
    write_atomically(out / METRICS_FILE, pl.DataFrame(measured).write_csv)
    write_atomically(out / "histories.parquet", _histories(history).write_parquet)
    drawing.save(_draw(history), out / "training.png")
    print_table(console, f"Candidates after {len(history)} epochs", ("candidate", *_METRICS), cells)
    console.print(f"Weights, confusion.csv, {METRICS_FILE}, histories.parquet and training.png are in {out}.")


METRICS_FILE = "metrics.csv"  # the held-out metrics of Appendix A.1, one row per candidate
_METRICS = ("training loss", "held-out loss", "held-out accuracy")


def _histories(history: np.ndarray) -> pl.DataFrame:
    """One row per epoch and candidate, with a column for each metric."""
    epochs, numbers = np.meshgrid(*map(np.arange, history.shape[:2]), indexing="ij")
    columns = {"epoch": epochs.ravel() + 1, "candidate": numbers.ravel()}
    for index, name in enumerate(("training_loss", "held_out_loss", "held_out_accuracy")):
        columns[name] = history[..., index].ravel()
    return pl.DataFrame(columns)


def _draw(history: np.ndarray) -> plt.Figure:
    """Draws losses and accuracy over the epochs, one line per candidate."""
    figure, panels = drawing.panels(3, 3)
    for column, (axes, title) in enumerate(zip(panels, _METRICS, strict=True)):
        axes.plot(np.arange(1, len(history) + 1), history[..., column], lw=1, alpha=0.8)
        axes.set_title(title)
        axes.set_xlabel("epoch")
    figure.suptitle("Training of ARC's network, one line per candidate")
    return figure
