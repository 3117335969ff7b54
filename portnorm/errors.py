"""The one family of errors that portnorm raises for what a caller can mend, and its one warning."""

from __future__ import annotations


class PortnormError(Exception):
    """Base of every error that portnorm raises on purpose."""


class ArgumentError(PortnormError, TypeError):
    """A function was called with an argument that it does not have, with one twice, or without one that it needs."""


class ShapeError(PortnormError, ValueError):
    """An argument has a shape, axis or length that does not fit the others."""


class DTypeError(PortnormError, TypeError):
    """An argument has a data type that the operation does not take."""


class UnsupportedError(PortnormError, ValueError):
    """An unknown name, or a combination of arguments that has no meaning or no implementation."""


class CheckpointError(PortnormError, ValueError):
    """A checkpoint cannot be read, or does not fit the layer it is loaded into."""


class ConformanceError(PortnormError, AssertionError):
    """Two computations that should agree do not."""


class ExportError(PortnormError, RuntimeError):
    """A model cannot be written as an ONNX graph that computes the same."""


class MissingExtraError(PortnormError, ImportError):
    """An optional dependency is needed and not installed."""


def install(extra: str) -> str:
    """The command that brings an extra, for messages: portnorm is on no package index."""
    return f'pip install ".[{extra}]" in a checkout of portnorm'


class ChangedFileWarning(PortnormError, UserWarning):  # noqa: N818
    """A file holds other numbers than were written into it, since a tool has changed them; what is loaded is what it holds now."""
