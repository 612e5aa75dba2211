"""A warning for a learning-rate rule whose effect is undone by the transformations after it.

In ``optax.chain(greedy_lr(), optax.adamw(1e-3))`` the rule scales the gradients, and Adam divides the factor
out again. The rule notices when its update is traced:

1. Its ``init`` and ``update`` find the ``optax.chain`` (or ``named_chain``) that calls them in the call
   stack, and in its local variables the functions of the transformations after the rule.
2. These run for a few steps on small stand-ins of the parameters, from fresh states, with gradients g and
   2 g of three magnitudes. If the updates are the same, the rule has no effect. Clipping passes, since it
   does not act on small gradients.

What cannot be known causes no warning: other combinators, a chain that is built anew at each step
(``optax.inject_hyperparams`` of a function), transformations that fail on the stand-ins, and AdaGrad, whose
initial accumulator makes it depend on the scale of small gradients.

Rejected alternatives:

* The arguments of the rule's ``update`` and the provenance of its tracers show what precedes the rule, not
  what follows it.
* A list of optimizers by name is incomplete, and closures such as ``optax.chain`` have no name for it.
* ``init`` alone does not see the update functions.
"""

import functools
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from greedylr_jax import _inner

_CHAINS = (optax.chain(optax.identity()), optax.named_chain(("identity", optax.identity())))
_INIT_CODES = [getattr(chain.init, "__code__", None) for chain in _CHAINS]
_UPDATE_CODES = [getattr(chain.update, "__code__", None) for chain in _CHAINS]
_LIBRARIES = tuple(str(Path(module.__file__ or "").parent) for module in (optax, jax, _inner))
_MAX_CHECKS = 16  # for each rule, so that a chain built anew at each step costs no time for long
_MAX_LEAVES = 32  # of the parameters up to which the check uses their structure at once
_STEPS = 8
_MAGNITUDES = (1.0, 1e-2, 1e2)  # of the gradients
_MAX_RATIO = 1.2  # of the updates for 2 g and for g, up to which a rule has no effect

_IS_RULE = "_scales_by_rule"  # attribute of the update functions of rules

_local = threading.local()


class MisplacedRuleWarning(UserWarning):
    """A learning-rate rule does not control the learning rate where it stands in a chain.

    Examples:
      >>> import warnings, jax.numpy as jnp, optax, greedylr_jax
      >>> tx = optax.chain(greedylr_jax.greedy_lr(), optax.adamw(1e-3))  # the wrong order
      >>> with warnings.catch_warnings(record=True) as caught:
      ...     warnings.simplefilter("always")
      ...     updates, state = tx.update(jnp.ones(2), tx.init(jnp.ones(2)), jnp.ones(2), value=1.0)
      >>> print(caught[0].category.__name__)
      MisplacedRuleWarning
    """


class _Level(NamedTuple):
    """An ``optax.chain`` in the call stack."""

    functions: tuple[Any, ...]  # the init or update functions of its transformations
    position: int  # of the transformation that runs
    params: Any
    states: list[Any]  # of the transformations; empty in init

    def start(self) -> "_Level":
        """The level without arrays."""
        return self._replace(params=jax.tree.map(_shape_of, self.params), states=[])


def with_check(
    init: Callable[..., Any], update: Callable[..., Any]
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The functions of a rule's transformation, with a check of its position at the first update."""
    chains: list[list[_Level]] = []  # those that init was called from
    checked: list[tuple[Any, ...]] = []

    @functools.wraps(init)
    def init_fn(params: optax.Params) -> optax.OptState:
        if not _is_checking() and len(chains) < _MAX_CHECKS:
            # Shapes only: the parameters may be traced, and the chain's states are of no use here.
            chains.append([level.start() for level in _levels(_INIT_CODES)])
        return init(params)

    @functools.wraps(update)
    def update_fn(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        if not _is_checking() and len(checked) < _MAX_CHECKS:
            levels = list(_levels(_UPDATE_CODES))
            functions = tuple(level.functions for level in levels)
            if functions not in checked:
                checked.append(functions)
                _check(levels, chains)
        return update(updates, state, params, **extra_args)

    setattr(update_fn, _IS_RULE, True)
    return init_fn, update_fn


def _is_checking() -> bool:
    return getattr(_local, "checking", False)


def _levels(codes: list[Any]) -> Iterator[_Level]:
    """The chains in the call stack, innermost first."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        if frame.f_code in codes:
            scope = frame.f_locals
            transforms = scope.get("transforms")  # of named_chain
            if transforms is None:
                functions = scope.get("init_fns", scope.get("update_fns", ()))
            else:
                functions = tuple(tx for _, tx in transforms)
            states = scope.get("state", ())
            yield _Level(
                functions=tuple(functions),
                position=len(scope.get("new_state", ())),
                params=scope.get("params"),
                states=list(states.values() if isinstance(states, dict) else states),
            )
        frame = frame.f_back


def _shape_of(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf))


def _check(levels: list[_Level], chains: list[list[_Level]]) -> None:
    from greedylr_jax import _placement  # noqa: PLC0415  (which imports this module)

    for number, level in enumerate(levels):
        wrapper = _placement.find_wrapper(level.states[: level.position])
        if wrapper is not None:
            _warn(f"scales the updates of an optimizer with a {wrapper}. {_placement.ADVICE_INSIDE}")
            return
        for starts in chains:
            same = [len(start.functions) for start in starts] == [len(each.functions) for each in levels]
            if same and _undo_scaling(_after(level, starts[number]), starts[number].params):
                _warn(f"has no effect: the transformations after it undo its scaling. {_placement.ADVICE}")
                return


def _after(level: _Level, start: _Level) -> list[optax.GradientTransformation]:
    """The transformations after the rule, except for other rules."""
    pairs = list(zip(start.functions, level.functions, strict=True))[level.position + 1 :]
    return [
        update
        if isinstance(update, optax.GradientTransformation)
        else optax.GradientTransformationExtraArgs(init, update)
        for init, update in pairs
        if not hasattr(getattr(update, "update", update), _IS_RULE)  # other rules commute with it
    ]


def _undo_scaling(transforms: list[optax.GradientTransformation], params: Any) -> bool:
    """Whether the updates of these transformations are known not to depend on the gradients' scale."""
    if not transforms or not jax.tree.leaves(params):
        return False
    tx = optax.chain(*transforms)
    stand_ins = list(_inner._stand_ins(params))
    if len(jax.tree.leaves(params)) > _MAX_LEAVES:
        stand_ins.insert(0, np.array([[1.0, 0.5], [-0.5, -1.0]], np.float32))
    _local.checking = True
    try:
        for stand_in in stand_ins:
            try:
                with _inner._eager_on_host():
                    return bool(np.all(_ratios(tx, stand_in) < _MAX_RATIO))
            except Exception:  # of any type: it comes from the code of the transformations
                continue
        return False
    finally:
        _local.checking = False


def _ratios(tx: optax.GradientTransformationExtraArgs, params: Any) -> np.ndarray:
    """Size of the updates for doubled gradients, relative to the original ones, for each magnitude."""

    def size(factor: jax.Array) -> jax.Array:
        gradient = jax.tree.map(lambda leaf: (factor * leaf).astype(leaf.dtype), params)
        extra_args = {"value": jnp.ones(()), "grad": gradient, "value_fn": lambda _: jnp.ones(())}

        def step(state: optax.OptState, _: None) -> tuple[optax.OptState, jax.Array]:
            updates, state = tx.update(gradient, state, params, **extra_args)
            return state, optax.tree.norm(updates).astype(jnp.float32)

        return jnp.sum(jax.lax.scan(step, tx.init(params), length=_STEPS)[1])

    sizes = jax.jit(lambda factors: jax.lax.map(size, factors))(
        np.outer([1, 2], _MAGNITUDES).ravel().astype(np.float32)
    )
    before, after = np.asarray(sizes).reshape(2, -1)
    return np.divide(after, before, out=np.full_like(before, np.inf), where=before > 0)


def _warn(problem: str) -> None:
    """Warns at the line that calls the optimizer."""
    frame, depth = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_LIBRARIES):
        frame, depth = frame.f_back, depth + 1
    warnings.warn(f"a learning-rate rule in optax.chain {problem}", MisplacedRuleWarning, stacklevel=depth)
