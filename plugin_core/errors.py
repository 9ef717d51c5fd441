"""Errors that say which argument is wrong."""

from __future__ import annotations

import difflib
import inspect
import traceback
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any


class ArgumentError(ValueError):
    """The value of an argument is wrong.

    Whoever passes a setting on as an argument can say in the setting's own words where it stands.

    Args:
        argument: its name.
        reason: what would be right and what was given, such as "must be odd, got 4".
    """

    def __init__(self, argument: str, reason: str = "") -> None:
        super().__init__(argument, reason)
        self.argument = argument
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.argument} {self.reason}".rstrip()


class StateDictError(RuntimeError):
    """A state dict is of a module that was built otherwise.

    Frameworks load what fits and log the rest, so that the result would be wrong. PyTorch's own
    error for a state dict is a RuntimeError.
    """


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A hint such as "; did you mean 'eca'?" for a name with a typo; empty if none is similar."""
    likely = difflib.get_close_matches(str(name), [*known])
    return f"; did you mean {' or '.join(map(repr, likely))}?" if likely else ""


def few(texts: Iterable[str]) -> str:
    """Join the first four of ``texts``, and count the others."""
    texts = list(texts)
    return ", ".join(texts[:4]) + (f" and {len(texts) - 4} more" if len(texts) > 4 else "")


def check_arguments(
    function: Callable[..., Any], arguments: Iterable[str], reserved: Collection[str] = ()
) -> None:
    """Check that a function, or a class, takes arguments of these names.

    Where a constructor hands ``**kwargs`` on, those of the next base class count too.

    Args:
        function: that will be called with them.
        arguments: their names.
        reserved: names that are passed already.

    Raises:
        ArgumentError: names the first one that is unknown, and the likely one.
    """
    functions: list[Any] = [function]
    if inspect.isclass(function):
        functions = [base.__init__ for base in function.__mro__]  # type: ignore[misc]
    known: dict[str, None] = {}
    for one in functions:
        parameters = inspect.signature(one).parameters.values()
        named = (p for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL))
        known |= dict.fromkeys(p.name for p in named)
        if all(p.kind is not p.VAR_KEYWORD for p in parameters):
            break
    else:
        return  # it takes any
    names = [name for name in known if name != "self" and name not in reserved]
    for argument in arguments:
        if argument not in names:
            raise unknown_argument(argument, names)


def check_bool(**arguments: Any) -> None:
    """Raise ArgumentError for the first value that is neither True nor False."""
    for argument, value in arguments.items():
        if not isinstance(value, bool):
            raise ArgumentError(argument, f"must be True or False, got {value!r}")


def check_positive_int(**arguments: Any) -> None:
    """Raise ArgumentError for the first value that is no integer of at least 1."""
    for argument, value in arguments.items():
        if type(value) is not int or value < 1:
            raise ArgumentError(argument, f"must be a positive integer, got {value!r}")


def check_one_of(argument: str, value: object, choices: Sequence[str]) -> None:
    """Raise ArgumentError if a value is not among the choices, of which there are at least two."""
    if value not in choices:
        names = f"{', '.join(map(repr, choices[:-1]))} or {choices[-1]!r}"
        raise ArgumentError(argument, f"must be {names}, got {value!r}")


def unknown_argument(argument: str, names: Sequence[str]) -> ArgumentError:
    """Make the error of an argument that is none of ``names``."""
    there_are = f"there are {', '.join(names)}" if names else "it takes none"
    return ArgumentError(argument, f"is no argument; {there_are}{did_you_mean(argument, names)}")


def origin(error: BaseException) -> str:
    """Say in which file and line an error was raised."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{frame.filename}:{frame.lineno}"
