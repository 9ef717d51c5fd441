"""Building what a setting of a config describes, with errors that name the setting."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from plugin_core.errors import ArgumentError, check_arguments

T = TypeVar("T")


def build_from(setting: str, kind: Callable[..., T], arguments: Any, **given: Any) -> T:
    """Call a function or class with the arguments that a setting has.

    Args:
        setting: its name in the config.
        kind: the function or class.
        arguments: the setting's value, a dict.
        **given: arguments that the setting may not have.

    Raises:
        ArgumentError: if the setting is no dict, or an argument is unknown or wrong; names both.
    """
    if not isinstance(arguments, Mapping):
        raise ArgumentError(setting, f"must be dict(…), got {arguments!r}")
    try:
        check_arguments(kind, arguments, reserved=given)
        return kind(**given, **arguments)
    except ArgumentError as error:
        raise ArgumentError(f"{setting}.{error.argument}", error.reason) from error
