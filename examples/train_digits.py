"""Train a digits classifier with GreedyLR, Flax NNX, Orbax checkpoints and TensorBoard, and plot the run.

    pip install -e ".[examples]" && python examples/train_digits.py --out runs/digits

If the process is interrupted or killed, run the same command again: it resumes from the last checkpoint, and
its parameters and rates are bit-identical to those of an uninterrupted run. `tensorboard --logdir runs` shows
the curves.
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from rich.progress import track
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tensorboardX import SummaryWriter

import greedylr_jax
from greedylr_jax.checkpoint import check_restorable
from greedylr_jax.plotting import plot_history

LEARNING_RATE, BATCH_SIZE = 3e-4, 64
LOGGED = ("learning_rate", "best_value", "num_good", "num_bad")


class Classifier(nnx.Module):
    """Two hidden layers."""

    def __init__(self, rngs: nnx.Rngs):
        self.layers = nnx.List([nnx.Linear(64, 128, rngs=rngs), nnx.Linear(128, 64, rngs=rngs)])
        self.logits = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.layers:
            x = nnx.relu(layer(x))
        return self.logits(x)


def loss_fn(model: Classifier, x: jax.Array, y: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()


@nnx.jit
def train_step(model: Classifier, optimizer: nnx.Optimizer, x: jax.Array, y: jax.Array):
    loss, grads = nnx.value_and_grad(loss_fn)(model, x, y)
    optimizer.update(model, grads, value=loss)
    # Read the metrics inside the compiled step, so that only a few scalars are copied to the host.
    metrics = greedylr_jax.metrics(optimizer.opt_state)
    rate = greedylr_jax.get_learning_rate(optimizer.opt_state, LEARNING_RATE)
    return loss, metrics | {"learning_rate": rate}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/digits"), help="output folder")
    parser.add_argument("--steps", type=int, default=1000, help="number of training steps")
    parser.add_argument(
        "--checkpoint-every", type=int, default=100, help="number of steps between checkpoints"
    )
    arguments = parser.parse_args()
    steps, out = arguments.steps, arguments.out.absolute()

    digits = load_digits()
    images = (digits.data / 16).astype(np.float32)
    x, test_x, y, test_y = train_test_split(images, digits.target, test_size=0.2, random_state=0)

    model = Classifier(nnx.Rngs(0))
    tx = greedylr_jax.chain(optax.adamw(LEARNING_RATE), greedylr_jax.greedy_lr())
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    history = {name: np.zeros(steps) for name in ("loss", *LOGGED)}

    manager = ocp.CheckpointManager(
        out / "checkpoints",
        options=ocp.CheckpointManagerOptions(max_to_keep=2),
        item_handlers=ocp.StandardCheckpointHandler(),
    )
    first = 0
    if (saved := manager.latest_step()) is not None:
        target = snapshot(model, optimizer, history)
        check_restorable(manager.item_metadata(saved), target)
        restored = manager.restore(saved, args=ocp.args.StandardRestore(target))
        nnx.update(model, restored["params"])
        nnx.update(optimizer, restored["optimizer"])
        history, first = restored["history"], saved
        print(f"resuming from step {first}")

    with SummaryWriter(str(out / "tensorboard"), purge_step=first) as writer:
        for step in track(range(first, steps), total=steps, completed=first, description="training"):
            # The batch depends on the step only, so that a resumed run uses the same batches.
            batch = np.random.default_rng(step).choice(len(x), BATCH_SIZE, replace=False)
            loss, metrics = train_step(model, optimizer, x[batch], y[batch])
            history["loss"][step] = loss
            writer.add_scalar("loss", history["loss"][step], step)
            for name in LOGGED:
                history[name][step] = metrics[name]
                writer.add_scalar(name, history[name][step], step)
            if (step + 1) % arguments.checkpoint_every == 0:
                tree = snapshot(model, optimizer, history)
                manager.save(step + 1, args=ocp.args.StandardSave(tree))
    manager.wait_until_finished()

    accuracy = jnp.mean(jnp.argmax(model(test_x), axis=-1) == test_y)
    figure = plot_history(history["loss"], history, smooth=20, title="GreedyLR on digits")
    figure.savefig(out / "history.png", dpi=120)
    np.savez(out / "result.npz", **flat_arrays(snapshot(model, optimizer, history)))
    print(f"test accuracy {accuracy:.3f}, learning rate {history['learning_rate'][-1]:.2e}, files in {out}")


def snapshot(model: Classifier, optimizer: nnx.Optimizer, history: dict[str, np.ndarray]) -> dict:
    """The state needed to resume the run, as plain arrays."""
    params, state = nnx.as_pure(nnx.state(model, nnx.Param)), nnx.as_pure(nnx.state(optimizer))
    return {"params": params, "optimizer": state, "history": {k: v.copy() for k, v in history.items()}}


def flat_arrays(tree: dict) -> dict[str, np.ndarray]:
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(tree)}


if __name__ == "__main__":
    main()
