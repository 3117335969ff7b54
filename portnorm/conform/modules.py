"""Modules that add to the tables when they are imported, as `portnorm conform --import` names them."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Iterable
from pathlib import Path

from portnorm.errors import UnsupportedError


def load_modules(names: Iterable[str]) -> None:
    """Import modules, of the working directory too, or files; whatever one raises is named by `UnsupportedError`."""
    for name in names:
        _load(name)


def _load(name: str) -> None:
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        if not name.endswith(".py"):
            importlib.import_module(name)
            return
        spec = importlib.util.spec_from_file_location(Path(name).stem, name)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules[spec.name] = module
    except Exception as error:
        raise UnsupportedError(f"`--import` names {name!r}: {type(error).__name__}: {error}") from error
