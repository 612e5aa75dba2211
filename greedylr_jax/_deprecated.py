"""Old names of arguments, accepted with a warning."""

import functools
import warnings
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def renamed_arguments(**new_names: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Makes a function accept old keyword names, with a ``DeprecationWarning`` that gives the new one.

    Args:
      **new_names: old name to new name.

    Examples:
      >>> import warnings
      >>> @renamed_arguments(min_value="min_learning_rate")
      ... def schedule(*, min_learning_rate):
      ...     return min_learning_rate
      >>> with warnings.catch_warnings(record=True) as caught:
      ...     warnings.simplefilter("always")
      ...     schedule(min_value=0.1)
      0.1
      >>> print(caught[0].message)
      schedule: the argument min_value is now min_learning_rate.
    """

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            arguments: dict[str, Any] = dict(kwargs)
            for old, new in new_names.items():
                if old not in arguments:
                    continue
                if new in arguments:
                    raise TypeError(f"{function.__name__} got both {new} and its old name {old}.")
                message = f"{function.__name__}: the argument {old} is now {new}."
                warnings.warn(message, DeprecationWarning, stacklevel=2)
                arguments[new] = arguments.pop(old)
            return function(*args, **arguments)  # type: ignore[arg-type]

        return call

    return decorate
