"""The schedules that experiments train with: one entry of :data:`SCHEDULES` for each, passive or adaptive.

There are three kinds of entries. A :class:`PassiveSchedule` is an array of learning rates, an input of the
compiled program. An :class:`AdaptiveScale` multiplies the updates by a scale of its own; which one acts and
with which settings are inputs, too, so one program serves all entries of both kinds. A :class:`RateOptimizer`
keeps a learning rate of its own and has a program of its own, which serves all initial rates.

To add a schedule, add an entry: engine, studies and figures read everything from it.
"""

import ast
import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import greedylr_jax
import greedylr_jax.arc
from experiments.errors import UsageError
from experiments.reporting import palette
from experiments.reporting.palette import Look
from greedylr_jax.arc import ACTIONS
from greedylr_jax.arc._controller import MULTIPLIERS
from greedylr_jax.schedules import knee_schedule

EVALUATIONS = 50  # of the training loss per run, each the mean loss of as many steps


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """What every schedule has.

    Attributes:
      name: in run specifications, rows and the command line.
      source: where it is described.
      look: colour and line style in figures; no two schedules have the same.
      label: in figures and tables; by default the name.
    """

    name: str
    source: str
    look: Look
    label: str = ""

    def __post_init__(self):
        if not self.label:
            object.__setattr__(self, "label", self.name)

    @property
    def settings(self) -> Mapping[str, Any]:
        """The settings that may follow the name in brackets, with their defaults."""
        return {}

    def check(self, settings: Mapping[str, Any]) -> None:
        """Raises ``ValueError`` or ``UsageError`` if a setting is out of range."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PassiveSchedule(Schedule):
    """A schedule that is fixed before training.

    Attributes:
      fractions: number of steps and keyword-only settings -> the learning rate of each step over the initial
        learning rate.
    """

    fractions: Callable[..., optax.Schedule]

    @property
    def settings(self) -> Mapping[str, Any]:
        """The keyword-only parameters of ``fractions`` with their defaults."""
        return _keyword_only(self.fractions)

    def check(self, settings: Mapping[str, Any]) -> None:
        """Makes the schedule once."""
        self.fractions(100, **settings)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaptiveScale(Schedule):
    """A rule that multiplies the learning rate by a scale.

    Attributes:
      transform: steps per evaluation of the training loss (a 50th of the run's steps) and settings -> the
        rule as a transformation of the updates.
      traced: the settings with their defaults, inputs of the compiled program.
    """

    transform: Callable[[int, Mapping[str, Any]], optax.GradientTransformation]
    traced: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def settings(self) -> Mapping[str, Any]:
        """The traced settings with their defaults."""
        return self.traced

    def check(self, settings: Mapping[str, Any]) -> None:
        """Makes the rule once."""
        self.transform(1, {**self.traced, **settings})


@dataclasses.dataclass(frozen=True, kw_only=True)
class RateOptimizer(Schedule):
    """An optimizer with its own learning rate.

    Attributes:
      optimizer: the run's optimizer built with learning rate 1, the initial learning rate, the number of
        steps and keyword-only settings -> the optimizer to train with.
      traced: names of the settings that are inputs of the compiled program, numbers; all values of the others
        have a program of their own.
      superbatch: number of batches that ``value_fn`` averages over, a further setting; 1 is the batch of the
        step, and then it is not a setting.
      reads_validation: whether it uses validation losses, in runs that have them.
      reports_rate: whether the learning rate of a step is read from the optimizer's state by
        :func:`greedylr_jax.metrics`; otherwise the initial one is recorded.
    """

    optimizer: Callable[..., optax.GradientTransformation]
    traced: Sequence[str] = ()
    superbatch: int = 1
    reads_validation: bool = False
    reports_rate: bool = True

    @property
    def settings(self) -> Mapping[str, Any]:
        """The keyword-only parameters of ``optimizer`` with their defaults, and the superbatch."""
        own = _keyword_only(self.optimizer)
        return own | ({"superbatch": self.superbatch} if self.superbatch > 1 else {})

    def make(
        self,
        optimizer: optax.GradientTransformation,
        rate: jax.Array | float,
        steps: int,
        settings: Mapping[str, Any],
    ) -> tuple[optax.GradientTransformation, int]:
        """The optimizer to train with and the superbatch."""
        own = {name: value for name, value in settings.items() if name != "superbatch"}
        superbatch = settings.get("superbatch", self.superbatch)
        if not (isinstance(superbatch, int) and superbatch >= 1):
            raise ValueError(f"superbatch must be an integer >= 1, got {superbatch!r}")
        return self.optimizer(optimizer, rate, steps, **own), superbatch

    def check(self, settings: Mapping[str, Any]) -> None:
        """Makes the optimizer once."""
        self.make(optax.sgd(1.0), 1.0, 100, settings)


def _keyword_only(function: Callable[..., Any]) -> dict[str, Any]:
    """The keyword-only parameters of a function with their defaults."""
    parameters = inspect.signature(function).parameters.values()
    return {each.name: each.default for each in parameters if each.kind is each.KEYWORD_ONLY}


def _inverse_sqrt(warmup: int) -> optax.Schedule:
    """Linear warm-up to 1 over ``warmup`` steps, then the inverse square root of the step."""

    def schedule(step: jax.Array) -> jax.Array:
        step = jnp.asarray(step, jnp.float32) + 1
        return jnp.minimum(step / warmup, jnp.sqrt(warmup / step))

    return schedule


def _cyclic_cosine(steps: int) -> optax.Schedule:
    """Two periods of cosine decay to 2%, the second twice as long as the first."""
    periods = (steps // 3, steps - steps // 3)
    common = {"init_value": 1.0, "peak_value": 1.0, "warmup_steps": 0, "end_value": 0.02}
    return optax.sgdr_schedule([{**common, "decay_steps": period} for period in periods])


def _three_cosines(steps: int) -> optax.Schedule:
    """Three periods of cosine decay to 2%, each twice as long as the previous one."""
    first = steps // 7
    common = {"init_value": 1.0, "peak_value": 1.0, "warmup_steps": 0, "end_value": 0.02}
    periods = (first, 2 * first, steps - 3 * first)
    return optax.sgdr_schedule([{**common, "decay_steps": max(1, period)} for period in periods])


def _staircase(epochs: int, factor: float) -> Callable[[int], optax.Schedule]:
    """Multiplies by ``factor`` after each of ``epochs`` equal parts of the training."""
    return lambda steps: lambda step: jnp.float32(factor) ** (epochs * step // steps)


def _always_raise(steps: int, *, decisions: int = 10) -> optax.Schedule:
    """What ARC does if its decision is always "raise"."""
    return _actions(steps, [MULTIPLIERS[ACTIONS.index("raise")]] * _at_least_one("decisions", decisions))


def _random_action(steps: int, *, decisions: int = 10, draw: int = 0) -> optax.Schedule:
    """What ARC does if each decision is drawn at random from its three actions; ``draw`` is the seed."""
    chosen = np.random.default_rng(draw).choice(MULTIPLIERS, _at_least_one("decisions", decisions))
    return _actions(steps, list(chosen))


def _at_least_one(name: str, value: int) -> int:
    if value < 1:
        raise ValueError(f"{name} must be an integer >= 1, got {value}")
    return value


def _actions(steps: int, multipliers: Sequence[float]) -> optax.Schedule:
    """Multiplies the rate in the last step of each cycle, as ARC does."""
    per_cycle = max(2, steps // len(multipliers))
    scales = np.concatenate([[1.0], np.cumprod(multipliers)])

    def schedule(step: jax.Array) -> jax.Array:
        cycle = jnp.minimum((step + 1) // per_cycle, len(multipliers))
        return jnp.asarray(scales, jnp.float32)[cycle]

    return schedule


def _defaults(function: Callable[..., Any], *names: str) -> dict[str, float]:
    """The defaults of some parameters of a function."""
    return {name: inspect.signature(function).parameters[name].default for name in names}


def _arc(
    optimizer: optax.GradientTransformation,
    rate: jax.Array,
    steps: int,
    *,
    weights: str | None = None,
    decisions: int = 10,
    validation: bool = True,
) -> optax.GradientTransformation:
    """ARC with the weights of a safetensors file, or with those of the package."""
    try:
        loaded = greedylr_jax.arc.load_weights(weights)
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read ARC's weights {weights!r}: {error}") from error
    rule = greedylr_jax.arc.arc(loaded, steps_per_cycle=max(2, steps // decisions), validation=validation)
    return greedylr_jax.chain(optimizer, optax.scale(rate), rule)


def _trend(
    optimizer: optax.GradientTransformation, rate: jax.Array, steps: int, *, max_scale: float = 1000.0
) -> optax.GradientTransformation:
    """The trend rule for rates that may be far too low; its own default bound is 5."""
    del steps
    return greedylr_jax.chain(optimizer, optax.scale(rate), greedylr_jax.trend_lr(max_scale=max_scale))


def _lr_tuner(
    optimizer: optax.GradientTransformation,
    rate: jax.Array,
    steps: int,
    *,
    explore: float = 0.25,
    decisions: int = 20,
    bound: float = 2.0,
    samples: int = 3,
    saturation: float = 100.0,
    rollback: float = 0.1,
) -> optax.GradientTransformation:
    """LRTuner, with the fraction of the steps that explore, and ``bound``: how far a decision may change the
    rate at a loss of 1, in initial rates.
    """
    return greedylr_jax.lr_tuner(
        optimizer,
        rate,
        explore_steps=round(explore * steps),
        recompute_every=max(1, steps // decisions),
        num_samples=samples,
        epsilon_threshold=(bound * rate) ** 3,
        saturation_threshold=saturation,
        rollback_threshold=rollback,
    )


def _relative(
    optimizer: optax.GradientTransformation,
    rate: jax.Array,
    steps: int,
    *,
    maximum: float = 0.03,
    warm_up: float = 0.3,
) -> optax.GradientTransformation:
    """Updates relative to the parameters with a linear warm-up over a share of the steps, times a cosine."""
    del rate
    cosine = optax.cosine_decay_schedule(maximum, steps)

    def relative_step(step: jax.Array) -> jax.Array:
        return jnp.minimum((step + 1) / (warm_up * steps), 1) * cosine(step)

    return optax.chain(optimizer, greedylr_jax.scale_to_parameters(relative_step))


def _polling(*factors: float) -> Callable[..., optax.GradientTransformation]:
    """Factor polling with some factors; ``every`` and ``sharpness`` are traced."""

    def optimizer(
        optimizer: optax.GradientTransformation,
        rate: jax.Array,
        steps: int,
        *,
        every: int = _POLLING["every"],
        sharpness: float = _POLLING["sharpness"],
        normalize: Literal["minmax", "standard", "none"] = "minmax",
        score: Literal["exponential", "inverse", "linear"] = "exponential",
    ) -> optax.GradientTransformation:
        rule = greedylr_jax.factor_polling(
            factors, every=every, sharpness=sharpness, normalize=normalize, score=score
        )
        return optax.chain(optimizer, optax.scale(rate), rule)

    return optimizer


_POLLING = _defaults(greedylr_jax.factor_polling, "every", "sharpness")
_PAPER_POLLING = "Y. Kim and Y. Yu, Automated Learning Rate Scheduling with In-training Information"
_ARC_PAPER = "X. Dong et al., To Raise or Not To Raise (the ARC paper), Section 4"
_ENTRIES: tuple[Schedule, ...] = (
    PassiveSchedule(
        name="constant",
        source="the initial rate throughout; a baseline of the ARC paper and of Kim and Yu",
        look=Look(palette.SKY),
        fractions=lambda steps: optax.constant_schedule(1.0),
    ),
    PassiveSchedule(
        name="linear",
        source="J. Devlin et al., BERT, 2019; a baseline of GreedyLR, LRTuner, and Kim and Yu",
        look=Look(palette.BLUE, ":"),
        fractions=lambda steps: optax.linear_schedule(1.0, 0.0, steps),
    ),
    PassiveSchedule(
        name="cosine",
        source="I. Loshchilov and F. Hutter, SGDR, 2017; one period, to 0; a baseline of all papers but the "
        "LRTuner paper",
        look=Look(palette.BLUE),
        fractions=lambda steps: optax.cosine_decay_schedule(1.0, steps),
    ),
    PassiveSchedule(
        name="polynomial",
        source="transformers.get_polynomial_decay_schedule_with_warmup, power 1 (its default); a baseline of "
        "the GreedyLR paper",
        look=Look(palette.BLUE, "-."),
        fractions=lambda steps: optax.polynomial_schedule(1.0, 0.0, 1, steps),
    ),
    PassiveSchedule(
        name="step",
        source="K. He et al., Deep Residual Learning, 2016; divided by 10 at 50% and 75% of the steps, as in "
        "the LRTuner paper on CIFAR-10",
        look=Look(palette.GREY, ":"),
        fractions=lambda steps: optax.piecewise_constant_schedule(
            1.0, {steps // 2: 0.1, 3 * steps // 4: 0.1}
        ),
    ),
    PassiveSchedule(
        name="warmup",
        label="constant with warm-up",
        source="transformers.get_constant_schedule_with_warmup, 10% of the steps; a baseline of the GreedyLR "
        "paper, which does not state the length",
        look=Look(palette.SKY, ":"),
        fractions=lambda steps: optax.linear_schedule(0.0, 1.0, max(1, steps // 10)),
    ),
    PassiveSchedule(
        name="warmup-cosine",
        label="warm-up, cosine",
        source="I. Loshchilov and F. Hutter, SGDR, 2017, after a linear warm-up over 10% of the steps",
        look=Look(palette.SKY, "-."),
        fractions=lambda steps: optax.warmup_cosine_decay_schedule(0.0, 1.0, max(1, steps // 10), steps),
    ),
    PassiveSchedule(
        name="inverse-sqrt",
        source="A. Vaswani et al., Attention Is All You Need, 2017, 10% of the steps; a baseline of "
        "the LRTuner paper",
        look=Look(palette.PINK, ":"),
        fractions=lambda steps: _inverse_sqrt(max(1, steps // 10)),
    ),
    PassiveSchedule(
        name="knee",
        source="N. Iyer et al., Wide-minima Density Hypothesis, 2023",
        look=Look(palette.PINK),
        fractions=lambda steps: knee_schedule(1.0, 8 * steps // 10, steps),
    ),
    PassiveSchedule(
        name="cyclic-cosine",
        source=f"{_ARC_PAPER}.1: periods of 10 and 20 of 30 epochs",
        look=Look(palette.BLUE, "--"),
        fractions=_cyclic_cosine,
    ),
    PassiveSchedule(
        name="cyclic-cosine-text",
        label="cyclic cosine, three periods",
        source=f"{_ARC_PAPER}.3: periods of 14, 28 and 56 of 98 epochs",
        look=Look(palette.ORANGE, "-."),
        fractions=_three_cosines,
    ),
    PassiveSchedule(
        name="exponential",
        source=f"torch.optim.lr_scheduler.ExponentialLR; {_ARC_PAPER}.1: times 0.9 in each of 30 epochs",
        look=Look(palette.GREY, "-."),
        fractions=_staircase(30, 0.9),
    ),
    PassiveSchedule(
        name="exponential-text",
        label="exponential, 98 epochs",
        source=f"torch.optim.lr_scheduler.ExponentialLR; {_ARC_PAPER}.3: times 0.96 in each of 98 epochs",
        look=Look(palette.GREY),
        fractions=_staircase(98, 0.96),
    ),
    PassiveSchedule(
        name="one-cycle",
        source="L. Smith and N. Topin, Super-Convergence, 2018; the initial rate is the maximum",
        look=Look(palette.PINK, "-."),
        fractions=lambda steps: optax.linear_onecycle_schedule(steps, 1.0),
    ),
    # ARC without its network: what the decisions of the network are compared with.
    PassiveSchedule(
        name="always-raise",
        source="times 1.618 at each of ARC's decisions",
        look=Look(palette.RED, ":"),
        fractions=_always_raise,
    ),
    PassiveSchedule(
        name="random-action",
        source="times 1.618, 1 or 0.618, drawn at random, at each of ARC's decisions",
        look=Look(palette.RED, "-."),
        fractions=_random_action,
    ),
    AdaptiveScale(
        name="plateau",
        # Factor 0.1, patience 10 and a relative threshold of 1e-4 are the defaults of Optax, Keras and
        # PyTorch (PyTorch waits for one evaluation more). The floor is that of He et al., who divide the rate
        # by 10 twice when the error plateaus. Their evaluations are epochs, of which runs this short have too
        # few.
        source="optax.contrib.reduce_on_plateau with its defaults, 50 evaluations, and a minimum of 1% of "
        "the initial rate as in K. He et al., Deep Residual Learning, 2016",
        look=Look(palette.GREY, "--"),
        transform=lambda steps_per_evaluation, settings: optax.contrib.reduce_on_plateau(
            factor=0.1, patience=10, rtol=1e-4, accumulation_size=steps_per_evaluation, min_scale=0.01
        ),
    ),
    AdaptiveScale(
        name="GreedyLR",
        source="the GreedyLR paper and the second GreedyLR paper, with the published settings",
        look=Look(palette.RED),
        transform=lambda steps_per_evaluation, settings: greedylr_jax.greedy_lr(**settings),
        traced=_defaults(
            greedylr_jax.greedy_lr,
            "factor",
            "patience",
            "threshold",
            "cooldown",
            "warmup",
            "min_scale",
            "max_scale",
        ),
    ),
    AdaptiveScale(
        name="plateau-torch",
        label="plateau, PyTorch's patience",
        # PyTorch lowers the rate at the eleventh epoch without improvement, Keras and Optax at the tenth.
        source="torch.optim.lr_scheduler.ReduceLROnPlateau with its defaults and a minimum of 1%",
        look=Look(palette.VIOLET, "--"),
        transform=lambda steps_per_epoch, settings: optax.contrib.reduce_on_plateau(
            factor=0.1, patience=11, rtol=1e-4, accumulation_size=steps_per_epoch, min_scale=0.01
        ),
    ),
    RateOptimizer(
        name="trend",
        label="trend rule",
        source="greedylr_jax.trend_lr with max_scale=1000",
        look=Look(palette.VIOLET, "-."),
        optimizer=_trend,
        traced=("max_scale",),
    ),
    RateOptimizer(
        name="hypergradient",
        source="A. G. Baydin et al., Online Learning Rate Adaptation with Hypergradient Descent, 2018",
        look=Look(palette.ORANGE),
        optimizer=lambda optimizer, rate, steps: greedylr_jax.hypergradient(
            optimizer, rate, 0.02, mode="multiplicative"
        ),
    ),
    RateOptimizer(
        name="LRTuner",
        source="N. Iyer et al., LRTuner: A Learning Rate Tuner for Deep Neural Networks",
        look=Look(palette.VIOLET),
        optimizer=_lr_tuner,
        superbatch=10,
    ),
    RateOptimizer(
        name="ARC", source=_ARC_PAPER, look=Look(palette.BROWN), optimizer=_arc, reads_validation=True
    ),
    RateOptimizer(
        name="auto",
        source="greedylr_jax.auto_lr; it has no initial rate, so its runs are equal at all of them",
        look=Look(palette.BLACK),
        optimizer=lambda optimizer, rate, steps: greedylr_jax.auto_lr(optimizer, total_steps=max(10, steps)),
    ),
    RateOptimizer(
        name="auto-without-steps",
        label="auto, unknown number of steps",
        source="greedylr_jax.auto_lr without total_steps; it has no initial rate",
        look=Look(palette.BROWN, ":"),
        optimizer=lambda optimizer, rate, steps: greedylr_jax.auto_lr(optimizer),
    ),
    RateOptimizer(
        name="relative",
        source="greedylr_jax.scale_to_parameters; with the default settings, auto_lr of an optimizer with "
        "momentum",
        look=Look(palette.BROWN, "-."),
        optimizer=_relative,
    ),
    RateOptimizer(
        name="polling-3",
        label="polling, 3 factors",
        source=_PAPER_POLLING,
        look=Look(palette.GREEN, ":"),
        optimizer=_polling(2.0, 1.0, 0.5),
        traced=tuple(_POLLING),
    ),
    RateOptimizer(
        name="polling-5",
        label="polling, 5 factors",
        source=_PAPER_POLLING,
        look=Look(palette.GREEN, "-."),
        optimizer=_polling(4.0, 2.0, 1.0, 0.5, 0.25),
        traced=tuple(_POLLING),
    ),
    RateOptimizer(
        name="polling-5-4batches",
        label="polling, 5 factors, 4 batches",
        source=_PAPER_POLLING,
        look=Look(palette.BLACK, ":"),
        optimizer=_polling(4.0, 2.0, 1.0, 0.5, 0.25),
        traced=tuple(_POLLING),
        superbatch=4,
    ),
    RateOptimizer(
        name="polling-5-16batches",
        label="polling, 5 factors, 16 batches",
        source=_PAPER_POLLING,
        look=Look(palette.BLACK, "-."),
        optimizer=_polling(4.0, 2.0, 1.0, 0.5, 0.25),
        traced=tuple(_POLLING),
        superbatch=16,
    ),
    RateOptimizer(
        name="polling",
        label="polling, 7 factors",
        source=_PAPER_POLLING,
        look=Look(palette.GREEN),
        optimizer=_polling(8.0, 4.0, 2.0, 1.0, 0.5, 0.25, 0.125),
        traced=tuple(_POLLING),
    ),
    # Baselines from Optax with its defaults. Those that are optimizers themselves ignore the run's optimizer.
    RateOptimizer(
        name="schedule-free",
        source="A. Defazio et al., The Road Less Scheduled, 2024",
        look=Look(palette.PINK, "--"),
        optimizer=lambda optimizer, rate, steps: optax.contrib.schedule_free_adamw(rate),
        reports_rate=False,
    ),
    RateOptimizer(
        name="prodigy",
        source="K. Mishchenko and A. Defazio, Prodigy, 2024",
        look=Look(palette.BLACK, "--"),
        optimizer=lambda optimizer, rate, steps: optax.contrib.prodigy(rate),
        reports_rate=False,
    ),
    RateOptimizer(
        name="prodigy-cosine",
        label="prodigy, cosine",
        source="K. Mishchenko and A. Defazio, Prodigy, 2024, with the schedule that they advise",
        look=Look(palette.ORANGE, ":"),
        optimizer=lambda optimizer, rate, steps: optax.contrib.prodigy(
            optax.cosine_decay_schedule(rate, steps)
        ),
        reports_rate=False,
    ),
    RateOptimizer(
        name="prodigy-guess",
        label="prodigy, initial estimate",
        source="K. Mishchenko and A. Defazio, Prodigy, 2024; the initial rate is its first estimate",
        look=Look(palette.ORANGE, "--"),
        optimizer=lambda optimizer, rate, steps: optax.contrib.prodigy(1.0, estim_lr0=rate),
        reports_rate=False,
    ),
    RateOptimizer(
        name="dog",
        label="DoG",
        source="M. Ivgi et al., DoG is SGD's Best Friend, 2023",
        look=Look(palette.VIOLET, ":"),
        optimizer=lambda optimizer, rate, steps: optax.contrib.dog(rate),
        reports_rate=False,
    ),
    RateOptimizer(
        name="dog-guess",
        label="DoG, initial estimate",
        source="M. Ivgi et al., DoG is SGD's Best Friend, 2023; the initial rate is its first estimate",
        look=Look(palette.GREEN, "--"),
        optimizer=lambda optimizer, rate, steps: optax.contrib.dog(1.0, ("learning_rate", rate)),
        reports_rate=False,
    ),
    RateOptimizer(
        name="mechanic",
        source="A. Cutkosky et al., Mechanic, 2023",
        look=Look(palette.SKY, "--"),
        optimizer=lambda optimizer, rate, steps: optax.contrib.mechanize(
            optax.chain(optimizer, optax.scale(rate))
        ),
        reports_rate=False,
    ),
    RateOptimizer(
        name="momo",
        source="F. Schaipp et al., MoMo, 2024",
        look=Look(palette.BROWN, "--"),
        optimizer=lambda optimizer, rate, steps: optax.contrib.momo_adam(rate),
        reports_rate=False,
    ),
    RateOptimizer(
        name="Armijo",
        source="L. Armijo, 1966; backtracking from the initial rate",
        look=Look(palette.RED, "--"),
        optimizer=lambda optimizer, rate, steps: optax.chain(
            optimizer,
            optax.scale(rate),
            optax.scale_by_backtracking_linesearch(max_backtracking_steps=15),
        ),
        reports_rate=False,
    ),
)
SCHEDULES: Mapping[str, Schedule] = {entry.name: entry for entry in _ENTRIES}


class ScheduleInputs(NamedTuple):
    """The inputs of a compiled run that select its schedule."""

    rates: np.ndarray  # shape=(steps,), dtype=float32; the passive part
    scale_index: np.ndarray  # shape=(), dtype=int32; 0: no adaptive scale, n: the n-th of the registry
    settings: tuple[dict[str, np.ndarray], ...]  # of each adaptive scale, each of shape=()
    own: dict[str, np.ndarray]  # the traced settings of a RateOptimizer, each of shape=()


def _scales() -> list[AdaptiveScale]:
    return [entry for entry in SCHEDULES.values() if isinstance(entry, AdaptiveScale)]


@functools.cache  # every run of a sweep calls it, and ARC reads a file
def parse(name: str) -> tuple[Schedule, Mapping[str, Any]]:
    """The schedule that a name with optional settings stands for.

    Args:
      name: the name of an entry, with settings that differ from the defaults in brackets.

    Returns:
      The entry, and the settings in brackets. Both are shared; do not change them.

    Raises:
      UsageError: if there is no such schedule or setting.
      ValueError: if a setting is out of range.

    Examples:
      >>> entry, settings = parse("GreedyLR(factor=0.8, patience=5)")
      >>> entry.name, settings
      ('GreedyLR', {'factor': 0.8, 'patience': 5})
    """
    base, bracket, rest = name.partition("(")
    if base not in SCHEDULES:
        raise UsageError(f"unknown schedule {name!r}; the schedules are {', '.join(SCHEDULES)}")
    entry = SCHEDULES[base]
    if not bracket:
        return entry, {}
    settings = {}
    try:
        for keyword in ast.parse(f"f({rest.removesuffix(')')})", mode="eval").body.keywords:
            settings[keyword.arg] = ast.literal_eval(keyword.value)
    except (SyntaxError, ValueError) as error:
        raise UsageError(
            f"cannot read the settings of schedule {name!r}; write NAME(setting=value, ...)"
        ) from error
    if unknown := settings.keys() - entry.settings.keys():
        raise UsageError(
            f"schedule {name!r} has unknown settings {sorted(unknown)}; the settings are "
            f"{', '.join(entry.settings) or 'none'}"
        )
    entry.check(settings)
    return entry, settings


def arc_with(weights: str | None, *, decisions: int, validation: bool = True) -> str:
    """The name of ARC with settings.

    Examples:
      >>> arc_with(None, decisions=10)
      'ARC(weights=None, decisions=10, validation=True)'
    """
    return f"ARC(weights={weights!r}, decisions={decisions}, validation={validation})"


def schedule_inputs(name: str, learning_rate: float, steps: int) -> ScheduleInputs:
    """The inputs of a run of ``steps`` steps with the schedule ``name`` from ``learning_rate``."""
    entry, settings = parse(name)
    traced = tuple(
        {
            key: _scalar(settings.get(key, default) if scale is entry else default, default)
            for key, default in scale.traced.items()
        }
        for scale in _scales()
    )
    index = 1 + _scales().index(entry) if isinstance(entry, AdaptiveScale) else 0
    passive = name if isinstance(entry, PassiveSchedule) else "constant"
    rates = np.float32(learning_rate) * _fractions(passive, steps)
    own = {}
    if isinstance(entry, RateOptimizer):
        own = {
            key: _scalar(settings.get(key, entry.settings[key]), entry.settings[key]) for key in entry.traced
        }
    return ScheduleInputs(rates, np.int32(index), traced, own)


def _scalar(value: float, default: float) -> np.ndarray:
    """A traced setting as an array, an integer if its default is one."""
    return np.asarray(value, np.int32 if isinstance(default, int) else np.float32)


def program_of(name: str) -> str | None:
    """The name of the schedule whose compiled program trains the schedule ``name``.

    Returns:
      None for passive schedules and adaptive scales, which share a program; otherwise the name without its
      traced settings.

    Examples:
      >>> program_of("cosine"), program_of("polling-5(every=40, normalize='none')")
      (None, "polling-5(normalize='none')")
    """
    entry, settings = parse(name)
    if not isinstance(entry, RateOptimizer):
        return None
    fixed = [f"{key}={value!r}" for key, value in settings.items() if key not in entry.traced]
    return f"{entry.name}({', '.join(fixed)})" if fixed else entry.name


@functools.cache
def _fractions(name: str, steps: int) -> np.ndarray:
    """A passive schedule over the initial learning rate, shape (steps,); shared, do not change."""
    entry, settings = parse(name)
    assert isinstance(entry, PassiveSchedule)
    return np.array(jax.vmap(entry.fractions(steps, **settings))(np.arange(steps)), np.float32)


def switch(
    index: jax.Array, transforms: Sequence[optax.GradientTransformation]
) -> optax.GradientTransformationExtraArgs:
    """A transformation that applies ``transforms[index]`` for a traced index.

    It holds the states of all transformations and changes only that of the selected one.
    """
    extended = [optax.with_extra_args_support(transform) for transform in transforms]

    def init_fn(params: optax.Params) -> tuple[Any, ...]:
        return tuple(transform.init(params) for transform in extended)

    def update_fn(updates, states, params=None, **extra_args):
        def branch(position: int) -> Callable[..., Any]:
            def apply(updates, states):
                updates, state = extended[position].update(updates, states[position], params, **extra_args)
                return updates, (*states[:position], state, *states[position + 1 :])

            return apply

        return jax.lax.switch(index, [branch(i) for i in range(len(extended))], updates, states)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def adaptive_scale(inputs: ScheduleInputs) -> optax.GradientTransformationExtraArgs:
    """The adaptive scale that ``inputs`` selects, or the identity."""
    steps_per_evaluation = max(1, len(inputs.rates) // EVALUATIONS)
    scales = [
        scale.transform(steps_per_evaluation, settings)
        for scale, settings in zip(_scales(), inputs.settings, strict=True)
    ]
    return switch(inputs.scale_index, [optax.identity(), *scales])
