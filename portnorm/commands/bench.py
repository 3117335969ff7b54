"""`portnorm bench`: times."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from portnorm.errors import UnsupportedError


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("engines", nargs="*", help="only these engines (default: all that are installed)")
    parser.add_argument("--only", action="append", default=[], help="only works whose name has this in it (may be repeated: any of them)")
    parser.add_argument("--cores", type=int, default=1, help="cores and threads of each engine (default: 1)")
    parser.add_argument("--seconds", type=float, default=0.1, help="time per work, engine and round (default: 0.1)")
    parser.add_argument("--rounds", type=int, default=5, help="how often the engines take turns (default: 5)")


def run(options: argparse.Namespace) -> dict[str, Any]:
    from portnorm import bench

    works = [work for work in bench.WORKS if not options.only or any(part in work.name for part in options.only)]
    if not works:
        raise UnsupportedError(
            f"`--only` {' '.join(options.only)} leaves no work; works are {', '.join(work.name for work in bench.WORKS)}"
        )

    def progress(what: str) -> None:
        if not options.json:
            print(what, file=sys.stderr, flush=True)

    rows = bench.measure(
        works, options.engines or None, cores=options.cores, seconds=options.seconds, rounds=options.rounds, progress=progress
    )
    if not options.json:
        print(bench.laid_out(rows))
    return {"machine": bench.machine(), "cores": options.cores, "rows": rows}
