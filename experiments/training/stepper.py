"""The step of a run: its optimizer and schedule behind one interface."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import greedylr_jax
from experiments.tasks.base import Params
from experiments.training.schedules import RateOptimizer, ScheduleInputs, adaptive_scale, parse


class Stepper(NamedTuple):
    """The optimizer and schedule of a run behind one interface.

    Attributes:
      init: parameters -> state.
      update: gradients, state, parameters, passive learning rate, observed loss, functions of the parameters
        for further losses of the batch and for the validation loss -> updates, state, learning rate.
      evaluation_params: state and parameters -> the parameters to evaluate.
      superbatch: number of batches that the further losses are a mean over.
    """

    init: Callable[[Params], Any]
    update: Callable[..., tuple[optax.Updates, Any, jax.Array]]
    evaluation_params: Callable[[Any, Params], Params]
    superbatch: int = 1


def make_stepper(
    schedule: str | None,
    optimizer: optax.GradientTransformationExtraArgs,
    inputs: ScheduleInputs,
    steps: int,
    *,
    validated: bool,
    accumulation: int = 1,
) -> Stepper:
    """The stepper of a program.

    Args:
      schedule: a :class:`~experiments.training.schedules.RateOptimizer` with the settings that are not
        traced; None: any passive schedule or adaptive scale, whichever ``inputs`` selects.
      optimizer: built with learning rate 1.
      inputs: of the run.
      steps: number of steps.
      validated: whether there are validation losses.
      accumulation: number of steps whose gradients ``optax.MultiSteps`` averages for one update.
    """
    if schedule is None:
        return _shared_stepper(_accumulated(optimizer, accumulation), inputs)
    entry, settings = parse(schedule)
    assert isinstance(entry, RateOptimizer)
    tx, superbatch = entry.make(optimizer, inputs.rates[0], steps // accumulation, {**settings, **inputs.own})
    tx = _accumulated(tx, accumulation)
    validated = validated and entry.reads_validation
    return _rate_optimizer_stepper(tx, entry, superbatch, validated=validated)


def _accumulated(
    tx: optax.GradientTransformation, accumulation: int
) -> optax.GradientTransformationExtraArgs:
    if accumulation > 1:
        tx = optax.MultiSteps(tx, accumulation).gradient_transformation()
    return optax.with_extra_args_support(tx)


def _shared_stepper(optimizer: optax.GradientTransformationExtraArgs, inputs: ScheduleInputs) -> Stepper:
    """Any passive schedule or adaptive scale, selected by an input of the program."""
    rule = adaptive_scale(inputs)

    def update(grads, state, params, rate, loss, value_fn, validation_fn):
        del value_fn, validation_fn
        optimizer_state, rule_state = state
        updates, optimizer_state = optimizer.update(grads, optimizer_state, params, value=loss)
        # A rule only multiplies its updates, so for an update of 1 it returns its scale. The updates
        # themselves would be copied by the switch between rules.
        scale, rule_state = rule.update(jnp.ones(()), rule_state, value=loss)
        updates = jax.tree.map(lambda leaf: rate * scale * leaf, updates)
        return updates, (optimizer_state, rule_state), rate * scale

    return Stepper(
        lambda params: (optimizer.init(params), rule.init(params)), update, lambda state, params: params
    )


def _rate_optimizer_stepper(
    tx: optax.GradientTransformationExtraArgs, entry: RateOptimizer, superbatch: int, *, validated: bool
) -> Stepper:
    """An optimizer with its own learning rate."""

    def update(grads, state, params, rate, loss, value_fn, validation_fn):
        extra = {"validation_value": validation_fn(params)} if validated else {}
        updates, state = tx.update(grads, state, params, value=loss, value_fn=value_fn, grad=grads, **extra)
        read = greedylr_jax.metrics(state) if entry.reports_rate else {}
        return updates, state, read.get("learning_rate", rate * read.get("scale", 1))

    def evaluation_params(state, params):
        state = state.inner_opt_state if isinstance(state, optax.MultiStepsState) else state
        if isinstance(state, optax.contrib.ScheduleFreeState):
            return optax.contrib.schedule_free_eval_params(state, params)
        return params

    return Stepper(tx.init, update, evaluation_params, superbatch)
