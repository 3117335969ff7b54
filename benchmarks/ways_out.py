"""Where each door out of Python leads: `python -m benchmarks.ways_out`, or `make ways-out` with the doors in an environment of their own.

Every door of `ways_doors.py` makes an artifact of every kind of layer in every way of `ways_kinds.py`, in a process of its own. Another
process, in which portnorm cannot be imported, loads it and runs it at the sizes that it was made for, and at others. Writes
benchmarks/results/ways_out.json, from which `make readme` makes the tables of docs/ways-out.md.
"""

from __future__ import annotations

import json
import os
import re
import select
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.behind import version
from benchmarks.ways_doors import DOORS, Door
from benchmarks.ways_kinds import (
    INPUTS,
    KINDS,
    TRAINING,
    WAYS,
    Way,
    cotangent_of,
    expected_of,
    gradients_of,
    inputs_of,
    steps_alone,
    update_of,
    write,
)
from portnorm.bench.runner import machine

RESULTS = Path(__file__).parent / "results" / "ways_out.json"
SECONDS = 600
"""Longer than this is no answer."""
CLOSE = 2e-5
"""Differences of float32 in another order, over 40 steps of a layer-normalized net; of gradients, relative to the largest."""
EVERY = (*WAYS, TRAINING)


class Process:
    """A process that answers each line with a line; started again where it has ended."""

    def __init__(self, *command: str, python: str = sys.executable, **settings: str):
        self.command, self.settings = (python, *command), settings
        self.running: subprocess.Popen[bytes] | None = None

    def ask(self, question: list[Any]) -> tuple[str, Any]:
        """A word where there is no answer, and the answer."""
        if self.running is None:
            self.running = subprocess.Popen(
                self.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                bufsize=0,
                env={**os.environ, "JAX_PLATFORMS": "cpu", **self.settings},
            )
        assert self.running.stdin is not None
        assert self.running.stdout is not None
        self.running.stdin.write((json.dumps(question) + "\n").encode())
        ready, _, _ = select.select([self.running.stdout], [], [], SECONDS)
        line = self.running.stdout.readline() if ready else b""
        if line:
            return "", json.loads(line)
        self.close()
        return "ends its process" if ready else "gives no answer", None

    def close(self) -> None:
        if self.running is not None:
            self.running.kill()
            self.running.wait()
            self.running = None


# -- making, in the child --------------------------------------------------------------------------------------------------------------


def makes(name: str) -> None:
    """`[kind, way, path]` by line; what is told of the artifact, or the error. Whatever a tool prints goes elsewhere."""
    warnings.simplefilter("ignore")
    door = next(door for door in DOORS if door.name == name)
    with os.fdopen(os.dup(1), "w") as channel:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        for line in sys.stdin:
            kind, way, path = json.loads(line)
            try:
                told: dict[str, Any] = door.make(KINDS[kind](), next(w for w in EVERY if w.name == way), Path(path))
            except Exception as error:
                told = {"error": f"{type(error).__name__}: {error}"}
            channel.write(json.dumps(told) + "\n")
            channel.flush()


# -- running and judging, in the parent ------------------------------------------------------------------------------------------------


def short(said: str, folder: Path) -> str:
    """What an error says, without paths, on one line."""
    text = re.sub(r"\s+", " ", re.sub(r"\x1b\[[0-9;]*m|/\S*/", "", said.replace(f"{folder}/", "")))
    return text if len(text) <= 300 else f"{text[:200]} … {text[-90:]}"


def apart(found: list[Any], expected: list[Any], relative: bool) -> float | None:
    """The largest difference; none where shapes differ."""
    pairs = list(zip(found, expected, strict=False))
    if not pairs or any(a.size != b.size or a.shape[-1:] != b.shape[-1:] for a, b in pairs):
        return None
    scales = (max(1.0, float(np.abs(b).max())) if relative else 1.0 for _, b in pairs)
    return max(float(np.abs(a.reshape(b.shape) - b).max()) / scale for (a, b), scale in zip(pairs, scales, strict=True))


def at_size(door: Door, kind: str, way: Way, size: tuple[int, int], path: Path, runs: Process) -> dict[str, Any]:
    """What comes at one size: how far apart, or what was said."""
    layer, folder = KINDS[kind](), path.parent
    inputs, loader = inputs_of(layer, way, size), door.load
    if way is TRAINING:
        loader = door.gradient
        if door.name == "ONNX" and len(layer.input_dims()) == 2:  # a norm of rows, as its training step takes it
            inputs[0] = inputs[0].reshape(-1, INPUTS)
        x, y = inputs[0], expected_of(layer, way, inputs)[0]
        wanted = update_of(layer, x, cotangent_of(y)) if door.updates else gradients_of(layer, x)
        inputs += [cotangent_of(y), *([layer.params[n] for n in wanted] if door.name == "jax.export" else [])]
        expected = list(wanted.values())
    else:
        expected = expected_of(layer, way, inputs)
    given, taken = write(folder / "given.npz", inputs), folder / "taken.npz"
    taken.unlink(missing_ok=True)
    word, said = runs.ask([loader, str(path), str(given), str(taken)])
    row: dict[str, Any] = {"size": list(size)}
    if word or said is not None:
        return row | {"said": short(said or word, folder)}
    with np.load(taken) as file:
        found = [file[str(k)] for k in range(len(file.files))]
    return row | {"shape": list(found[0].shape), "difference": apart(found, expected, way is TRAINING)}


def is_right(row: dict[str, Any]) -> bool:
    return row.get("difference") is not None and row["difference"] <= CLOSE


def judged(way: Way, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A word for what came at every size; those of `way.others` are to be refused, or right."""
    own, others = rows[: len(way.sizes)], rows[len(way.sizes) :]
    said = next((r["said"] for r in rows if "said" in r), "")
    if "said" in own[0]:
        return {"word": "does not run", "said": said}
    wrong = [r for r in own if "said" not in r and not is_right(r)]
    if wrong:
        return {"word": "frozen" if all(r["shape"] == own[0]["shape"] for r in wrong) and is_right(own[0]) else "wrong", "said": ""}
    difference = max(r["difference"] for r in own if "said" not in r)
    if any("said" in r for r in own):
        return {"word": "example only", "said": said, "difference": difference}
    cut = [r for r in others if "said" not in r and not is_right(r)]
    return {"word": "right", "said": "", "difference": difference, "cuts": bool(cut)}


def python_of(door: Door) -> str:
    return str(Path(f"{sys.prefix}-{door.environment}", "bin", "python")) if door.environment else sys.executable


def version_of(door: Door, package: str) -> str:
    """That of a package where the door is run; nothing where it is not installed."""
    if not door.environment:
        return version(package)
    asked = f"import importlib.metadata as m; print(m.version({package!r}))"
    try:
        return subprocess.run([python_of(door), "-c", asked], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def rows_of(door: Door, kinds: list[str], folder: Path) -> list[dict[str, Any]]:
    making = Process("-m", "benchmarks.ways_out", "makes", door.name)
    runs = Process(str(Path(__file__).with_name("ways_load.py")), python=python_of(door), **door.settings)
    missing, found = [p for p in door.packages if not version_of(door, p)], []
    for kind in kinds:
        for way in [w for w in EVERY if not door.ways or w.name in door.ways]:
            row: dict[str, Any] = {"door": door.name, "kind": kind, "way": way.name}
            path = folder / f"artifact{len(found)}{door.suffix}"
            if way.step and not steps_alone(KINDS[kind]()):
                row |= {"word": "none", "said": ""}
            elif way.name == "step of one batch" and found[-1]["word"] in ("right", "none"):
                continue
            elif way is TRAINING and not door.gradient:
                row |= {"word": "inference only", "said": ""}
            elif missing:
                row |= {"word": "not installed", "said": ", ".join(missing)}
            else:
                word, told = making.ask([kind, way.name, str(path)])
                error = word or told.pop("error", "")
                row |= {"word": "refuses", "said": short(error, folder)} if error else told
                if not error and not door.load:
                    row |= {"word": "converts", "said": ""}
                elif not error:
                    row |= judged(way, [at_size(door, kind, way, size, path, runs) for size in (*way.sizes, *way.others)])
            print(f"{door.name:<34} {kind:<24} {way.name:<18} {row['word']:<14} {row.get('difference')}", row["said"][:90], flush=True)
            found.append(row)
    making.close()
    runs.close()
    return found


def main(names: list[str]) -> None:
    """Measure all doors, or those whose names contain one of these, and keep the rest as it was."""
    doors = [d for d in DOORS if not names or any(n in d.name for n in names)]
    order = [d.name for d in DOORS]
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"rows": []}
    found = [r for r in kept["rows"] if r["door"] in order and r["door"] not in {d.name for d in doors}]
    with tempfile.TemporaryDirectory(prefix="ways-") as folder:
        for door in doors:
            found += rows_of(door, list(KINDS), Path(folder))
    found.sort(key=lambda r: order.index(r["door"]))
    packages = dict(sorted({p: version_of(d, p) for d in DOORS for p in d.packages}.items()))
    whole = kept | {"about": machine() | {"packages": packages}, "rows": found}
    RESULTS.write_text(json.dumps(whole, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["makes"]:
        makes(sys.argv[2])
    else:
        main(sys.argv[1:])
