"""`portnorm demo`: the demonstration."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from portnorm import demo
from portnorm.errors import UnsupportedError
from portnorm.files import require_place
from portnorm.scalars import whole_number


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("out"), help="directory of the results, made where it is not there (default: out)")
    epochs = demo.Budget.epochs
    parser.add_argument("--epochs", type=int, default=epochs, help=f"passes over the training images (default: {epochs})")


def run(options: argparse.Namespace) -> dict[str, Any]:
    whole_number("--epochs", options.epochs, 1)
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UnsupportedError(f"`--out` is {str(options.out)!r}, which can be no directory: {error.strerror or error}") from None
    require_place("--out", options.out / "report.json")
    demo.run(options.out, demo.Budget(epochs=options.epochs))
    report: dict[str, Any] = json.loads((options.out / "report.json").read_text())
    return report
