"""A rule in tunix, whose trainer calls the optimizer without the loss: a training hook passes it on.

Two changes to a training with tunix: ``value_from_observe`` around the optimizer, and the hook. The trainer's
``gradient_accumulation_steps`` works as it is. Tunix reports the loss of a step when the next one has been
started, so the rule acts two steps late.

    python examples/tunix_hook.py
"""

import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tunix.sft import hooks, peft_trainer

import greedylr_jax
import greedylr_jax.flax


class ObserveLoss(hooks.TrainingHooks):
    """Passes the loss of each step to the rules in the trainer's optimizer."""

    def on_train_step_end(self, train_ctx, train_step, train_loss):
        greedylr_jax.flax.observe(train_ctx.optimizer, train_loss)

    def on_train_start(self, train_ctx): ...
    def on_train_end(self, train_ctx): ...
    def on_train_step_start(self, train_ctx): ...
    def on_eval_step_start(self, train_ctx): ...
    def on_eval_step_end(self, train_ctx, eval_loss): ...


def train(tx, training_hooks=None, steps=60, accumulation=None):
    """Fits a small network; returns the trainer and the last loss."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(256, 8)).astype(np.float32)
    batch = {"x": x, "y": np.sin(x[:, :2] + x[:, 2:4])}
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(nnx.Linear(8, 32, rngs=rngs), nnx.tanh, nnx.Linear(32, 2, rngs=rngs))

    def loss_fn(model, x, y):
        return jnp.mean((model(x) - y) ** 2)

    config = peft_trainer.TrainingConfig(
        eval_every_n_steps=10_000, max_steps=steps, gradient_accumulation_steps=accumulation
    )
    trainer = peft_trainer.PeftTrainer(model, tx, config).with_loss_fn(loss_fn)
    trainer = trainer.with_gen_model_input_fn(lambda batch: batch)
    if training_hooks is not None:
        trainer.with_training_hooks(training_hooks)
    trainer.train([batch] * (steps * (accumulation or 1)))
    return trainer, float(loss_fn(model, **batch))


def main():
    rule = greedylr_jax.greedy_lr(factor=0.8, patience=2, window=5, max_scale=100.0)
    tx = greedylr_jax.value_from_observe(optax.chain(optax.adamw(1e-4), rule))
    _, constant = train(optax.adamw(1e-4))
    trainer, greedy = train(tx, ObserveLoss())
    scale = float(greedylr_jax.get_scale(trainer.optimizer.opt_state))
    print(f"constant: loss {constant:.4f}")
    print(f"greedy_lr: loss {greedy:.4f}, learning rate {1e-4 * scale:.5f}")


if __name__ == "__main__":
    main()
