"""Real models beside their own packages, kept in `results/models.json`: `python -m benchmarks.models`, then `make readme`."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

from portnorm import bench

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "docs" / "examples"
SCRIPTS = sorted(EXAMPLES.glob("real_*.py"))
ONE_CORE = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "KERAS_BACKEND": "torch"}


def packages() -> dict[str, str]:
    """Those that the scripts compute, with the version that is installed; raises where one is missing."""
    lines = (EXAMPLES / "real-models.txt").read_text().splitlines()
    return {name: importlib.metadata.version(name) for name in (line.partition("==")[0] for line in lines if "==" in line)}


def main() -> None:
    rows = []
    for script in SCRIPTS:
        done = subprocess.run([sys.executable, script, "--json"], stdout=subprocess.PIPE, text=True, check=True, env=os.environ | ONE_CORE)
        rows.append({"script": script.name, "cases": json.loads(done.stdout)})
        sys.stdout.write(f"{script.name}: {len(rows[-1]['cases'])} measured\n")
    kept = {"machine": bench.machine(), "packages": packages(), "scripts": rows}
    (ROOT / "benchmarks" / "results" / "models.json").write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
