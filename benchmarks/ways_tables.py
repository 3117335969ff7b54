"""The tables of docs/behind-the-export.md and docs/ways-out.md, from benchmarks/behind.py and benchmarks/ways_out.py."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from benchmarks.tables import kept_of, table


def _by_tool(cell: Callable[[list[dict[str, Any]]], str]) -> str:
    """Tools × graphs; a cell has a row for each target."""
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for row in kept_of("behind")["rows"]:
        found.setdefault(row["tool"], {}).setdefault(row["graph"], []).append(row)
    names = list(next(iter(found.values())))
    return table(("tool", *names), ((tool, *(cell(graphs[name]) for name in names)) for tool, graphs in found.items()))


def _of_targets(words: list[str]) -> str:
    return " / ".join(dict.fromkeys(words))


def behind() -> str:
    """What comes of each graph, in a word, and the largest difference where there is one."""

    def cell(rows: list[dict[str, Any]]) -> str:
        words = list(dict.fromkeys(r["word"] for r in rows))
        shown = []
        for word in words:
            difference = max((r.get("difference") or 0.0 for r in rows if r["word"] == word), default=0.0)
            shown.append(f"{word} {difference:.0e}".replace("e-0", "e-") if difference > 0 else word)
        return _of_targets(shown)

    return _by_tool(cell)


def behind_files() -> str:
    """What `load` gives of the file, and its bytes over those of the exported one."""

    def cell(rows: list[dict[str, Any]]) -> str:
        made = [r for r in rows if r.get("size") is not None]
        sizes = "–".join(dict.fromkeys(f"{r['size']:.2f}" for r in sorted(made, key=lambda r: float(r["size"]))))
        return f"{_of_targets([r['load'] for r in made])} {sizes}" if made else "–"

    return _by_tool(cell)


def behind_versions() -> str:
    about = kept_of("behind")["about"]
    packages = ", ".join(f"{name} {version or 'not installed'}" for name, version in about["packages"].items())
    return f"{packages}; on {about['processor']}, {'with' if about['vnni'] else 'without'} VNNI."


_WAYS = ("fixed", "open time", "open batch", "step", "training")


def of_door(row: dict[str, Any]) -> str:
    """What a way of a door comes to, in a word, with the largest difference."""
    if row["word"] == "none":
        return "–"
    difference = row.get("difference")
    shown = "" if difference is None else " 0" if difference == 0 else f" {difference:.0e}".replace("e-0", "e-")
    return f"✓{shown}{', frozen' if row.get('cuts') else ''}" if row["word"] == "right" else f"{row['word']}{shown}"


def _ways_out() -> dict[tuple[str, str, str], dict[str, Any]]:
    """By door, way and kind; a step for one number of sequences stands where there is none for any."""
    found = {(r["door"], r["way"], r["kind"]): r for r in kept_of("ways_out")["rows"]}
    for (door, way, kind), row in found.copy().items():
        if way == "step of one batch" and row["word"] in ("right", "converts"):
            found[door, "step", kind] = row | {"one batch": True}
    return found


def ways_out() -> str:
    """Doors and ways × kinds."""
    found = _ways_out()
    kinds = list(dict.fromkeys(kind for _, _, kind in found))
    rows = []
    for door in dict.fromkeys(door for door, _, _ in found):
        for way in _WAYS:
            cells = [found[door, way, kind] for kind in kinds if (door, way, kind) in found]
            if cells:
                rows.append((door, way, *(of_door(r) + ", one batch" * r.get("one batch", False) for r in cells)))
    return table(("door", "way", *kinds), rows)


def ways_out_said() -> str:
    """What is said where an artifact is refused, once for each text."""
    said: dict[tuple[str, str, str], list[str]] = {}
    for (door, way, kind), row in _ways_out().items():
        if row["said"] and row["word"] != "right":
            text = " ".join(re.sub(r"[|<>`*_\[\]]", " ", row["said"]).split())
            text = text if len(text) <= 150 else f"{text[:80]} … {text[-60:]}"
            said.setdefault((door, row["word"], text), []).append(f"{way} {kind}")
    return table(
        ("door", "what comes of it", "of", "what it says"),
        (
            (door, word, f"{where[0]}{f' and {len(where) - 1} more' if len(where) > 1 else ''}", text)
            for (door, word, text), where in said.items()
        ),
    )


def ways_out_pieces() -> str:
    """Into how many parts a phone's runtime takes a step and a sequence of five, by kind."""
    rows = [r for r in kept_of("ways_out")["rows"] if "delegates" in r and r["way"] in ("fixed", "step", "step of one batch")]
    kinds = list(dict.fromkeys(r["kind"] for r in rows))
    shown = []
    for door in dict.fromkeys(r["door"] for r in rows):
        for name, ways in (("one step", ("step", "step of one batch")), ("five steps", ("fixed",))):
            of = {r["kind"]: str(r["delegates"]) for r in rows if r["door"] == door and r["way"] in ways}
            shown.append((door, name, *(of.get(kind, "–") for kind in kinds)))
    return table(("door", "", *kinds), shown)


def ways_out_speed() -> str:
    """How long each takes, over the first of its kind."""
    rows = []
    for of, measured in kept_of("ways_out")["speed"].items():
        for r in measured:
            low, high = r["ratios"]
            took = f"{r['microseconds'] / 1000:.1f} ms" if r["microseconds"] >= 1000 else f"{r['microseconds']:.0f} µs"
            rows.append((of, r["what"], took, f"{r['ratio']:.2f}" + (f" ({low:.2f}–{high:.2f})" if low < high else "")))
    return table(("", "", "time", "ratio"), rows)


def ways_out_versions() -> str:
    about = kept_of("ways_out")["about"]
    packages = ", ".join(f"{name} {version or 'not installed'}" for name, version in about["packages"].items())
    return f"{packages}; on {about['processor']}."


TABLES = {
    "behind": behind,
    "behind_files": behind_files,
    "behind_versions": behind_versions,
    "ways_out": ways_out,
    "ways_out_said": ways_out_said,
    "ways_out_speed": ways_out_speed,
    "ways_out_pieces": ways_out_pieces,
    "ways_out_versions": ways_out_versions,
}
"""What a page may hold, by name."""
