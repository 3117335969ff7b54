"""Measure what docs/runtimes.md shows: every layer × target × runtime, and the accuracy of libraries and runtimes over all regimes.

`python -m benchmarks.conformance` writes benchmarks/results/support.json and conformance.json; `make readme` makes the tables of them.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from pathlib import Path

from portnorm import conform
from portnorm_onnx.conformance import support
from portnorm_onnx.runtimes import RUNTIMES

RESULTS = Path(__file__).parent / "results"
LIBRARIES = ("numpy", "array_api_strict", "torch", "jax", "cupy")


def main() -> None:
    """Measure and write; `--support` or `--accuracy` does one of the two."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--support", action="store_true")
    parser.add_argument("--accuracy", action="store_true")
    options = parser.parse_args()
    both = options.support == options.accuracy

    def progress(what: str) -> None:
        print(f"\r\x1b[K{what}", end="", file=sys.stderr, flush=True)

    if both or options.support:
        (RESULTS / "support.json").write_text(json.dumps(support(progress), indent=1) + "\n")
    if both or options.accuracy:
        rows = [r.to_dict() for r in conform.measure((*LIBRARIES, *RUNTIMES), progress=progress)]
        for row in rows:
            del row["reproduce"]
        about = {"python": platform.python_version(), "machine": platform.machine()}
        (RESULTS / "conformance.json").write_text(json.dumps({"about": about, "results": rows}, indent=0) + "\n")
    print(file=sys.stderr)


if __name__ == "__main__":
    main()
