"""Numbers and switches that users pass: of Python or of any array library, taken for what they mean, or refused by name.

What comes out is of Python, so that a configuration can be written as JSON and no kernel sees a type that it does not know.
"""

from __future__ import annotations

import operator
from collections.abc import Collection
from typing import Any

from portnorm.errors import UnsupportedError


def whole_number(name: str, value: Any, least: int | None = None) -> int:
    """`value` as an int, from any kind of integer; raises `UnsupportedError` for what is none, or is below `least`."""
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or (number is not value and _is_truth_value(value)):  # an int of Python is what it was, and asked no further
        raise UnsupportedError(f"`{name}` is {value!r}; expected a whole number")
    if least is not None and number < least:
        raise UnsupportedError(f"`{name}` is {number}; expected at least {least}")
    return number


def real_number(name: str, value: Any, low: float, high: float, expected: str) -> float:
    """`value` as a float, from any kind of number; raises `UnsupportedError` for what is none, or does not lie from `low` to `high`."""
    try:
        number = None if isinstance(value, str) or _is_truth_value(value) else float(value)
    except (TypeError, ValueError):
        number = None
    if number is None or not low <= number <= high:
        raise UnsupportedError(f"`{name}` is {value if number is None else number!r}; expected {expected}")
    return number


def switch(name: str, value: Any) -> bool:
    """`value` as a bool, from any kind of truth value; raises `UnsupportedError` for what is neither true nor false."""
    if value is True or value is False:
        return value
    try:
        meant = bool(value) if _is_truth_value(value) or value in (0, 1) else None
    except (TypeError, ValueError, RuntimeError):  # of many arrays of several values
        meant = None
    if meant is None:
        raise UnsupportedError(f"`{name}` is {value!r}; expected True or False")
    return meant


def switches(**given: Any) -> list[bool]:
    """`switch` of each, in their order."""
    return [switch(name, value) for name, value in given.items()]


def choice(name: str, value: Any, allowed: Collection[Any]) -> Any:
    """`value`, one of these texts, tuples of them or `None`; raises `UnsupportedError` for another."""
    if not (value is None or isinstance(value, str | tuple)) or value not in allowed:
        raise UnsupportedError(f"`{name}` is {value!r}; expected one of {', '.join(map(repr, allowed))}")
    return value


def _is_truth_value(value: Any) -> bool:
    """Whether `value` is true or false, which no number is meant by: of Python, or an array or scalar of such a type."""
    return isinstance(value, bool) or (not isinstance(value, int) and "bool" in str(getattr(value, "dtype", "")))
