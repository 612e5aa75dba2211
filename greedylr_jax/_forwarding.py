"""Passing the extra arguments of ``update`` on to a transformation."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import optax

_OF_RULES = ("has_value", "validation_value")  # arguments that only rules read


def accept_extra_args(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """The same transformation, whose ``update`` can be called with any extra arguments.

    Arguments that are None, or that ``inner.update`` does not accept, are left out. The signature decides
    instead of the type: ``optax.MultiSteps`` accepts extra arguments, but is not a
    ``GradientTransformationExtraArgs``. A line search passes every extra argument on to ``value_fn`` and
    fails if one is not accepted, so ``value_fn`` is made to ignore the arguments that only rules read.
    """
    parameters = inspect.signature(inner.update).parameters.values()
    accepts_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    names = {parameter.name for parameter in parameters}

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, Any]:
        given = {
            name: argument
            for name, argument in extra_args.items()
            if argument is not None and (accepts_all or name in names)
        }
        ignored = [name for name in _OF_RULES if name in given]
        if ignored and "value_fn" in given:
            given["value_fn"] = _ignoring(given["value_fn"], ignored)
        return inner.update(updates, state, params, **given)

    return optax.GradientTransformationExtraArgs(inner.init, update_fn)


def bind_extra_args(tx: optax.GradientTransformation, **extra_args: Any) -> optax.GradientTransformation:
    """The same transformation, whose ``update`` gets those of these extra arguments that it accepts."""
    update = functools.partial(accept_extra_args(tx).update, **extra_args)
    return optax.GradientTransformation(tx.init, update)


def _ignoring(value_fn: Callable[..., Any], names: list[str]) -> Callable[..., Any]:
    """The same function, which also accepts keyword arguments of these names, and ignores them."""
    signature = inspect.signature(value_fn)
    new_names = [name for name in names if name not in signature.parameters]
    parameters = list(signature.parameters.values())
    has_var_keyword = bool(parameters) and parameters[-1].kind is inspect.Parameter.VAR_KEYWORD
    added = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in new_names]
    place = len(parameters) - has_var_keyword

    @functools.wraps(value_fn, updated=())
    def call(*args: Any, **kwargs: Any) -> Any:
        return value_fn(*args, **{name: value for name, value in kwargs.items() if name not in new_names})

    vars(call)["__signature__"] = signature.replace(
        parameters=parameters[:place] + added + parameters[place:]
    )
    return call
