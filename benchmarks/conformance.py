"""Measure what docs/runtimes.md shows: every layer × target × runtime, and the accuracy of libraries and runtimes over all regimes.

    python -m benchmarks.conformance --support                every layer for every target, every portable graph in every runtime
    python -m benchmarks.conformance --accuracy [SUBJECT …]   the cases of `portnorm conform`; what is not named stays as it was

They write benchmarks/results/support.json and accuracy.json; `make readme` makes the tables of them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from portnorm import conform
from portnorm_onnx.conformance import support
from portnorm_onnx.runtimes import RUNTIMES

RESULTS = Path(__file__).parent / "results"


def worst(results: Iterable[conform.Result]) -> list[dict[str, Any]]:
    """The worst operation of each subject, regime, type and side, and how many operations were beyond their limit or did not run."""
    groups: dict[tuple[str, ...], list[conform.Result]] = {}
    for r in results:
        regime = r.operation if r.side in ("one step", "trajectory") else r.regime
        groups.setdefault((r.subject, r.version, regime, r.dtype, r.side), []).append(r)
    rows = []
    for key, group in groups.items():
        measured = [r for r in group if r.max_ulp is not None and not r.nonfinite]
        top = max(measured, key=lambda r: r.max_ulp or 0.0, default=None)
        row = dict(zip(("subject", "version", "regime", "dtype", "side"), key, strict=True))
        row |= {"cases": sum(r.status != "not measured" for r in group), "failed": sum(r.failed for r in group)}
        row |= {"nonfinite": sum(bool(r.nonfinite) for r in group), "absent": any(r.status == "not installed" for r in group)}
        row |= {"worst": top and top.operation, "max_ulp": top and float(f"{top.max_ulp:.3g}")}
        row |= {"detail": next((r.detail for r in group if r.status == "does not run"), "")[:160]}
        rows.append(row)
    return rows


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--support", action="store_true")
    parser.add_argument("--accuracy", nargs="*", metavar="SUBJECT")
    options = parser.parse_args()

    def progress(what: str) -> None:
        print(f"\r\x1b[K{what}", end="", file=sys.stderr, flush=True)

    if options.support:
        (RESULTS / "support.json").write_text(json.dumps(support(progress), indent=1) + "\n")
    if options.accuracy is not None:
        path, subjects = RESULTS / "accuracy.json", options.accuracy or [*conform.LIBRARIES, *RUNTIMES]
        kept = [row for row in json.loads(path.read_text()) if row["subject"] not in subjects] if path.exists() else []
        rows = kept + worst(conform.measure(subjects, progress=progress))
        path.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    print(file=sys.stderr)


if __name__ == "__main__":
    main()
