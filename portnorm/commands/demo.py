"""`portnorm demo`: the demonstration."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("out"), help="directory of the results (default: out)")
    parser.add_argument("--epochs", type=int, help="passes over the training images")


def run(options: argparse.Namespace) -> dict[str, Any]:
    from portnorm import demo

    budget = demo.Budget() if options.epochs is None else demo.Budget(epochs=options.epochs)
    demo.run(options.out, budget)
    report: dict[str, Any] = json.loads((options.out / "report.json").read_text())
    return report
