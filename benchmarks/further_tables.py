"""Tables of docs/runtimes.md and docs/deploy.md that are kept from runs of benchmarks/further.py and benchmarks/further_steps.py."""

from __future__ import annotations

import json
import re
from typing import Any

from benchmarks.further import KINDS, RESULTS, SUBJECTS, WAYS
from benchmarks.tables import table
from portnorm_onnx.elsewhere import ENGINES
from portnorm_onnx.targets import LONG, TARGETS

Rows = list[dict[str, Any]]


def kept() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(RESULTS.read_text())
    return found


def shown(row: dict[str, Any]) -> str:
    """What comes of a graph, in a word, with the largest difference."""
    if row["word"] == "none":
        return "–"
    difference = row.get("difference")
    number = "" if difference is None else " 0" if difference == 0 else f" {difference:.0e}".replace("e-0", "e-")
    return {"right": f"✓{number}", "batch open": f"✓{number}, steps fixed"}.get(row["word"], f"{row['word']}{number}")


def cells() -> str:
    """Layers and ways × targets."""
    found = {(r["kind"], r["way"], r["subject"]): r for r in kept()["rows"]}
    rows = []
    for kind in KINDS:
        for way in WAYS:
            line = [found[kind, way, subject] for subject in SUBJECTS]
            if any(r["word"] != "none" for r in line):
                rows.append((kind, way, *map(shown, line)))
    return table(("layer", "way", *(f"`{s}`" for s in SUBJECTS)), rows)


def said() -> str:
    """What is said where a graph is not made, or not right, once for each text."""
    texts: dict[tuple[str, str, str], list[str]] = {}
    for r in kept()["rows"]:
        if r["said"] and r["word"] not in ("right", "batch open"):
            text = " ".join(re.sub(r"[|<>`*_\[\]]", " ", r["said"]).split())
            text = re.sub(r"'[a-z', ]+' of x is open.*", "… of x is open: give numbers by input shape", text)
            text = text if len(text) <= 190 else f"{text[:120]} … {text[-60:]}"
            texts.setdefault((r["subject"], r["word"], text), []).append(f"{r['way']} {r['kind']}")
    return table(
        ("target", "what comes of it", "of", "what it says"),
        [
            (f"`{subject}`", word, f"{where[0]}{f' and {len(where) - 1} more' if len(where) > 1 else ''}", text)
            for (subject, word, text), where in texts.items()
        ],
    )


def versions() -> str:
    about = kept()["about"]
    listed = ", ".join(f"{name} {version or 'not installed'}" for name, version in about["versions"].items())
    return f"{listed}; on {about['processor']}."


def runtimes() -> str:
    """The further targets and runtimes."""
    found = kept()["about"]["versions"]
    rows = []
    for name, engine in ENGINES.items():
        row = TARGETS.get(name)
        fields = [] if row is None else [text for text, holds in _FIELDS if holds(row)]
        packages = ", ".join(f"`{p}`" for p in engine.packages if p != "onnx")
        rows.append((f"`{name}`", engine.note, packages, found.get(name) or "not installed", "; ".join(fields) or "the portable graph"))
    return table(("runtime", "what it is", "packages", "measured", "its graph"), rows)


_FIELDS: list[tuple[str, Any]] = [
    ("one step of one sequence", lambda t: not t.sequences),
    ("every length a number", lambda t: not t.open_shapes),
    ("a Loop where it has a Scan, and no RNN operator", lambda t: t.as_loop),
    ("every step written out", lambda t: t.sequences and not t.loops),
    ("no LSTM, GRU or RNN operator", lambda t: not t.fused),
    ("no first state of zeros", lambda t: t.fused_start),
    ("flips by Gather", lambda t: not t.backward_slices),
    ("BatchNormalization as (x − m)·s", lambda t: "BatchNormalization" in t.without or t.broadcasts_to_maps),
    ("LayerNormalization of one axis", lambda t: t.one_axis),
    ("with a bias", lambda t: t.biased_norms),
    ("centred before LayerNormalization and InstanceNormalization", lambda t: bool(t.one_pass)),
    (f"rows of {LONG} values and more centred", lambda t: bool(t.sums_in_order)),
    ("no broadcast last input of Where", lambda t: not t.where_broadcasts),
    ("states (batch, features)", lambda t: t.flat_states),
    ("`time_0` of shape (1,)", lambda t: not t.scalars and not t.lacks),
]


def steps() -> str:
    """A hundred steps with states fed back: time per step, that over onnxruntime's, and how far they are from float64."""
    found, rows = kept(), []
    for kind, lines in found["steps"].items():
        for r in lines:
            if r["said"]:
                rows.append((kind, f"`{r['subject']}`", r["said"], "", ""))
                continue
            low, high = min(r["ratios"]), max(r["ratios"])
            spread = f"{r['ratio']:.2f} ({low:.2f}–{high:.2f})" if r["ratio"] < 100 else f"{r['ratio']:.0f}"
            rows.append((kind, f"`{r['subject']}`", f"{r['microseconds']:.0f}", spread, f"{r['difference']:.0e}".replace("e-0", "e-")))
    eager = max(r.get("eager", 0.0) for lines in found["steps"].values() for r in lines)
    return (
        table(("layer", "runtime", "µs per step", "over onnxruntime", "from float64"), rows)
        + f"\n\nThe layer in float32 with NumPy is {eager:.0e} from float64. To export {found['unrolled']['steps']} steps of it, each "
        + f"written out, took {found['unrolled']['seconds']:.1f} s. On {found['machine of steps']['processor']}."
    )


TABLES = {
    "further_cells": cells,
    "further_said": said,
    "further_versions": versions,
    "further_runtimes": runtimes,
    "further_steps": steps,
}
