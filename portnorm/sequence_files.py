"""Labelled sequences from an .npz file: `x` (cases, time, features), `y`, and maybe `lengths`. What is not that is refused by name."""

from __future__ import annotations

import contextlib
import difflib
import os
import zipfile
from typing import Any

import numpy

from portnorm.digits import Dataset, NumPyArray
from portnorm.errors import DTypeError, PortnormError, ShapeError, UnsupportedError

KEYS = ("x", "y", "lengths")
_EXPECTED = "expected an .npz file with x (cases, time, features), y (cases,) and maybe lengths (cases,)"


def read(path: str | os.PathLike[str]) -> Dataset:
    """The sequences of a file: x in float32, y as classes (int64) or as numbers (cases, outputs) in float64.

    Integers in `y` are classes, from 0 on; floating-point numbers are what a regression is to give, (cases,) or (cases, outputs). What
    stands behind `lengths` may be anything. Raises `UnsupportedError` for a file that is none, keys that are missing or not known, and a
    `y` of which there is nothing to learn; `ShapeError` and `DTypeError` for what does not fit; `PortnormError` for NaN and infinity.
    """
    name = os.fspath(path)
    arrays = _arrays("--data", name, ("x", "y"))
    x, lengths = _inputs(name, arrays)
    if len(x) < 2:
        raise ShapeError(f"`x` of {name!r} has shape {x.shape}; expected two cases at least, one of them to be held out")
    y = _targets(name, arrays["y"])
    return Dataset(numpy.ascontiguousarray(x.transpose(1, 0, 2)), y, lengths)


def read_inputs(path: str | os.PathLike[str], dtype: str) -> tuple[NumPyArray, NumPyArray | None]:
    """`x` (cases, time, features) of a file in this type, and its `lengths` or `None`; a `y` that is there is left alone.

    Raises as `read`.
    """
    name = os.fspath(path)
    return _inputs(name, _arrays("data", name, ("x",)), dtype)


def _inputs(name: str, arrays: dict[str, NumPyArray], dtype: str = "float32") -> tuple[NumPyArray, NumPyArray | None]:
    x, lengths = arrays["x"], arrays.get("lengths")
    _check_x(name, x)
    cases, steps = x.shape[:2]
    for key in ("y", "lengths"):
        a = arrays.get(key)
        if a is not None and a.shape[:1] != (cases,):
            raise ShapeError(f"`{key}` of {name!r} has shape {a.shape}; expected {cases} in front, as many as `x` {x.shape} has cases")
    if lengths is not None:
        lengths = _checked_lengths(name, lengths, cases, steps)
    with numpy.errstate(over="ignore"):
        x = x.astype(dtype)
    there = numpy.ones((cases, steps), bool) if lengths is None else numpy.arange(steps) < lengths[:, None]
    _check_finite(name, "x", numpy.where(there[:, :, None], x, x.dtype.type(0)))
    return x, lengths


def _arrays(argument: str, name: str, needed: tuple[str, ...]) -> dict[str, NumPyArray]:
    try:
        with contextlib.ExitStack() as stack:
            file = numpy.load(stack.enter_context(open(name, "rb")), allow_pickle=False)
            if isinstance(file, numpy.ndarray):
                raise UnsupportedError(f"`{argument}` is {name!r}, a single array; {_EXPECTED}: numpy.savez('data.npz', x=x, y=y)")
            stack.enter_context(file)
            arrays = {key: _array(name, file, key) for key in file.files}
    except PortnormError:
        raise
    except OSError as error:
        raise UnsupportedError(f"`{argument}` is {name!r}, which cannot be read: {error.strerror or error}; {_EXPECTED}") from None
    except Exception as error:  # whatever a file that is none brings NumPy and zipfile to
        what = f"a damaged .npz file ({error})" if zipfile.is_zipfile(name) else "no .npz file"
        raise UnsupportedError(f"`{argument}` is {name!r}, which is {what}; {_EXPECTED}") from None
    if wrong := [key for key, a in arrays.items() if not isinstance(a, numpy.ndarray)]:
        raise UnsupportedError(f"`{argument}` is {name!r}, a zip file with {', '.join(map(repr, wrong))}, which is no array; {_EXPECTED}")
    unknown, missing = [key for key in arrays if key not in KEYS], [key for key in needed if key not in arrays]
    if unknown:
        meant = {key: difflib.get_close_matches(key.lower(), KEYS, 1, 0.6) for key in unknown}
        hints = [f"{key!r}{f' (did you mean {found[0]!r}?)' if found else ''}" for key, found in meant.items()]
        raise UnsupportedError(f"`{argument}` is {name!r}, which has arrays of unknown names: {', '.join(hints)}; {_EXPECTED}")
    if missing:
        raise UnsupportedError(f"`{argument}` is {name!r}, which has no {' and no '.join(map(repr, missing))}; {_EXPECTED}")
    return arrays


def _array(name: str, file: Any, key: str) -> NumPyArray:
    """One array of a file; raises `UnsupportedError` for one of Python objects, which could run code when they are read."""
    try:
        found: NumPyArray = file[key]
    except ValueError as error:
        if "allow_pickle" not in str(error):
            raise
        way_out = (
            "x, lengths = portnorm.pad_sequences(sequences, batch_first=True) pads sequences that differ in length; save x and lengths"
            if key == "x"
            else f"save numbers, {key}.astype(int) or {key}.astype(float)"
        )
        raise UnsupportedError(f"`{key}` of {name!r} is an array of Python objects, which is not read; {way_out}") from None
    return found


def _check_x(name: str, x: NumPyArray) -> None:
    if x.dtype.kind not in "fiub":
        raise DTypeError(f"`x` of {name!r} has dtype {x.dtype}; expected real numbers")
    if x.ndim != 3:
        hint = "; with one feature that is x[:, :, None]" if x.ndim == 2 else ""
        raise ShapeError(f"`x` of {name!r} has shape {x.shape}; expected (cases, time, features){hint}")
    if 0 in x.shape:
        raise ShapeError(f"`x` of {name!r} has shape {x.shape}: there is nothing in it; expected a case, a step and a feature at least")


def _checked_lengths(name: str, lengths: NumPyArray, cases: int, steps: int) -> NumPyArray:
    if lengths.shape != (cases,):
        raise ShapeError(f"`lengths` of {name!r} has shape {lengths.shape}; expected ({cases},)")
    if lengths.dtype.kind not in "iu":
        raise DTypeError(f"`lengths` of {name!r} has dtype {lengths.dtype}; expected integers")
    if int(lengths.min()) < 1 or int(lengths.max()) > steps:
        raise ShapeError(
            f"`lengths` of {name!r} reach from {int(lengths.min())} to {int(lengths.max())}; expected 1 to {steps}, the steps of `x`"
        )
    return lengths.astype(numpy.int64)


def _targets(name: str, y: NumPyArray) -> NumPyArray:
    if y.dtype.kind not in "fiub":
        raise DTypeError(f"`y` of {name!r} has dtype {y.dtype}; expected integers (classes) or floating-point numbers (a regression)")
    if y.dtype.kind == "f":
        return _numbers(name, y)
    if y.ndim != 1:
        hint = "; of one-hot labels that is y.argmax(axis=1)" if y.ndim == 2 else ""
        raise ShapeError(f"`y` of {name!r} has shape {y.shape}; expected (cases,) for classes{hint}")
    least, most = int(y.min()), int(y.max())
    if least < 0 or most >= max(len(y), 2):
        raise UnsupportedError(
            f"`y` of {name!r} reaches from {least} to {most} in {len(y)} cases; expected classes from 0 on, fewer than cases "
            "(numbers that a regression is to give are saved as floating-point numbers)"
        )
    if least == most:
        raise UnsupportedError(f"`y` of {name!r} is {least} everywhere: nothing to learn; expected two classes at least")
    return y.astype(numpy.int64)


def _numbers(name: str, y: NumPyArray) -> NumPyArray:
    if y.ndim not in (1, 2) or 0 in y.shape:
        raise ShapeError(f"`y` of {name!r} has shape {y.shape}; expected (cases,) or (cases, outputs) for a regression")
    with numpy.errstate(over="ignore"):
        _check_finite(name, "y", y.astype(numpy.float32))
    if bool((y == y[:1]).all()):
        raise UnsupportedError(f"`y` of {name!r} is {y.ravel()[0]} everywhere: nothing to learn; expected numbers that differ")
    return y.astype(numpy.float64).reshape(len(y), -1)


def _check_finite(name: str, key: str, a: NumPyArray) -> None:
    if not numpy.isfinite(a).all():
        at: Any = tuple(map(int, numpy.argwhere(~numpy.isfinite(a))[0]))
        raise PortnormError(f"`{key}` of {name!r} has {a[at]} at {at}, in {a.dtype}; expected finite numbers")
