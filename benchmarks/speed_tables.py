"""The tables of docs/speed.md and docs/real-models.md, and times of graphs in docs/runtimes.md and docs/onnx.md, from kept results."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from typing import Any

from benchmarks.tables import kept_of, milliseconds, table
from portnorm import bench

GROWING = ("portnorm", "portnorm compile", "torch", "JAX jit")


PARTS = {"cores 1": "one core", "held avx2": "one core, held to AVX2", "cores 2": "two cores", "growth": ""}
"""What is kept, and what the tables call it."""
_COLUMNS = {name: shown for name, shown in PARTS.items() if shown}


def part_of(kept: dict[str, Any], name: str) -> dict[str, Any] | None:
    """`{"machine", "commit", "rows"}` of a part, `None` where it was not measured; first results had one machine and commit for all."""
    part = kept.get(name)
    return {"machine": kept["machine"], "commit": kept["commit"], "rows": part} if isinstance(part, list) else part


def _parts() -> dict[str, dict[str, Any]]:
    kept = kept_of("speed")
    return {name: part for name in PARTS if (part := part_of(kept, name)) is not None}


def _ratios(parts: dict[str, dict[str, Any]]) -> dict[str, dict[str, float | None]]:
    """By what the tables call a part, the ratio of each work."""
    return {shown: {r["work"]: bench.ratio(r) for r in parts[name]["rows"]} for name, shown in _COLUMNS.items() if name in parts}


def _shown(ratio: float | None) -> str:
    return "–" if ratio is None else f"{ratio:.2f}"


def speed() -> str:
    """One core: milliseconds, and GB/s or GFLOP/s. Of all parts the ratio of the fastest of our engines to the fastest peer."""
    parts, rows = _parts(), []
    ratios = _ratios(parts)
    for row in parts["cores 1"]["rows"]:
        cells = [milliseconds(row["times"][name]["min"] if name in row["times"] else None) for name in bench.ENGINES]
        rate = bench.rate(row)
        rows.append((row["work"], *cells, *(_shown(of.get(row["work"])) for of in ratios.values()), f"{rate:.1f}" if rate else "–"))
    return table(("ms", *bench.ENGINES, *ratios, "GB/s, GFLOP/s"), rows)


def _mean(ratios: Iterable[float]) -> float:
    """The geometric one."""
    return math.exp(statistics.fmean(map(math.log, ratios)))


def speed_in_short() -> str:
    """The machine, and for each part the geometric mean of the ratios, and how many are above 1."""
    parts, lines, first = _parts(), list[str](), ""
    for name in (name for name in _COLUMNS if name in parts):
        rows, about = parts[name]["rows"], parts[name]["machine"]
        ratios = [r for r in map(bench.ratio, rows) if r is not None]
        turns = range(min(len(t["turns"]) for row in rows for t in row["times"].values()))
        each = sorted(_mean(r for row in rows if (r := bench.ratio(row, turn)) is not None) for turn in turns)
        machine = f"{about['processor']} ({_versions(about)})"
        first = first or machine
        isa = f", {about['isa']}" if about.get("isa") and not name.startswith("held") else ""
        lines.append(
            f"- {_COLUMNS[name]}{isa}: {_mean(ratios):.2f} ({each[0]:.2f} to {each[-1]:.2f} in each of the {len(each)} turns alone); "
            f"of {len(ratios)} works {sum(r > 1 for r in ratios)} are above 1{'' if machine == first else f'; on {machine}'}."
        )
    return "\n".join([f"{first}. Geometric mean of the time, the least of many runs, over that of the fastest peer:\n", *lines])


def speed_best() -> str:
    """One core: the fastest of our engines beside the fastest peer, and the ratio; the ratios of other parts."""
    parts, rows = _parts(), []
    ratios = _ratios(parts)
    for row in parts["cores 1"]["rows"]:
        own, peer = min(t["min"] for n, t in row["times"].items() if bench.ENGINES[n].own), bench.best_peer(row)
        if peer is not None:
            shown = (_shown(of.get(row["work"])) for of in ratios.values())
            rows.append((row["work"], milliseconds(own), milliseconds(peer[1]), peer[0], *shown))
    return table(("work", "portnorm, ms", "fastest peer, ms", "which", *ratios), rows)


def _growth() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = _parts().get("growth", {}).get("rows", [])
    return rows


def growth() -> str:
    """How time and peak memory grow."""
    rows = []
    for row in _growth():
        shown = [f"{milliseconds(t['min'])} ({t['peak_kb'] / 1024:.0f})" if t else "–" for t in (row["times"].get(n) for n in GROWING)]
        rows.append((row["work"], *shown))
    return table(("ms (peak of the process in MB)", *GROWING), rows)


def growth_in_short() -> str:
    """The memory of a training step that grows with every step of the sequence."""
    peaks = {row["work"]: row["times"] for row in _growth()}
    few, many = (peaks.get(f"LN-LSTM forward+backward {steps}×1×64×128", {}) for steps in (1000, 10000))
    found = [f"{n} {(many[n]['peak_kb'] - few[n]['peak_kb']) * 1024 / 9000:,.0f}" for n in GROWING if n in few and n in many]
    return f"From 1,000 steps to 10,000 a training step of LN-LSTM 1×64×128 takes so many more bytes per step: {', '.join(found)}."


def memory() -> str:
    """A training step of many steps: bytes that each of them takes, and the time."""
    kept, rows = kept_of("memory")["rows"], []
    torch, alone = kept["torch"]["bytes per step"], min(kept["portnorm"]["seconds"])
    for name, row in kept.items():
        least, most = min(row["seconds"]), max(row["seconds"])
        taken = row["bytes per step"]
        rows.append((name, f"{taken / 1e6:.2f}", f"{taken / torch:.2f}", f"{least:.1f}–{most:.1f}", f"{least / alone:.2f}"))
    return table(("", "MB a step", "over torch", "s", "over portnorm"), rows)


def memory_in_short() -> str:
    """The machine and the work."""
    kept = kept_of("memory")
    return f"{kept['work']}. {_processor(kept['machine'])}, one core ({_versions(kept['machine'])})."


def first_calls() -> str:
    """Seconds from the start of a process to its first answer, with nothing compiled, and of the processor."""
    rows = []
    for work, engines in kept_of("first_call")["works"].items():
        least = {name: {what: min(times) for what, times in of.items()} for name, of in engines.items()}
        for name, of in least.items():
            ratio = of["answer"] / least["torch"]["answer"]
            rows.append((work, name, f"{of['answer']:.2f}", f"{ratio:.2f}", f"{of['processor']:.2f}"))
    return table(("work", "", "first answer, s", "over torch", "processor, s"), rows)


def first_calls_in_short() -> str:
    """The machine."""
    about = kept_of("first_call")["machine"]
    return f"{_processor(about)}, one core ({_versions(about)})."


def _versions(about: dict[str, str]) -> str:
    return ", ".join(f"{name} {about[name]}" for name in ("numpy", "numba", "torch", "jax", "onnxruntime") if name in about)


def latency() -> str:
    """Milliseconds in onnxruntime, one thread, and the ratio to the plain operator: of minima, and the median of turns."""
    rows, kept = [], kept_of("latency")["rows"]
    others = [name for name in kept[0]["ratio"] if name != "plain"]
    for r in kept:
        plain = r["milliseconds"]["plain"]["min"]
        shown = (f"{r['ratio'][n]['of minima']:.2f} ({r['ratio'][n]['median']:.2f})" for n in others)
        rows.append((str(tuple(r["shape"])), f"{plain:.2f} ms", *shown))
    return table(("(T, B, I, H)", "`LSTM` operator", *others), rows)


def integers() -> str:
    """Times of graphs with integers for weights over those in float32, by shape, their files, and what that changed."""
    rows: dict[str, list[Any]] = {}
    kept = kept_of("integers")["rows"]
    for r in kept:
        rows.setdefault(r["layer"], []).append(r)
    shapes = [str(tuple(r["shape"])) for r in next(iter(rows.values()))]
    shown = (
        (
            layer,
            *(f"{r['ratio']:.2f} ({r['spread'][0]:.2f}–{r['spread'][1]:.2f})" for r in found),
            f"{min(r['file'] for r in found):.2f}–{max(r['file'] for r in found):.2f}",
            f"{max(r['difference'] for r in found):.0e}",
        )
        for layer, found in rows.items()
    )
    whole = kept_of("integers")
    alone = [f"{r['layer']} {r['alone']:.2f}" for r in kept if r["shape"][0] == 1 and r["shape"][2] == 1024 and "alone" in r]
    numpy = [f"{_steps(whole['numpy'])}", *(f"held to {isa.upper()} {_steps(found)}" for isa, found in whole["held"].items())]
    return (
        table(("(T, B, I, H)", *shapes, "file", "mean difference of `y`"), shown)
        + f"\n\nonnxruntime {whole['about']['onnxruntime']}, {_processor(whole['about'])}. "
        + f"Of a step with 1024 features its two products of integers alone, by `DynamicQuantizeMatMul`: {', '.join(alone)}. "
        + f"A step of one sequence with 1024 features in NumPy, `pn.quantized(layer).step` over `layer.step`: {'; '.join(numpy)}."
    )


def _steps(rows: list[dict[str, Any]]) -> str:
    return ", ".join(f"{r['layer']} {r['ratio']:.2f} ({r['spread'][0]:.2f}–{r['spread'][1]:.2f})" for r in rows)


def _processor(about: dict[str, str]) -> str:
    """The processor, with its instruction set where that was noted."""
    return about["processor"] + (f" ({about['isa']})" if about.get("isa") else "")


def models() -> str:
    """Real models beside their packages: differences relative to the largest value, times, and ratios of times."""
    rows = []
    for r in (case for script in kept_of("models")["scripts"] for case in script["cases"]):
        differs = (f"{r['differences'][name] / r['largest']:.1e}" for name in ("NumPy", "ONNX"))
        ms = r["ms"]
        ratios = (f"{ms[name] / ms['original']:.2f}" if ms[name] * 50 > ms["original"] else "< 0.02" for name in ("NumPy", "ONNX"))
        times = (milliseconds(ms[name]) for name in ("NumPy", "ONNX", "original"))
        rows.append((f"{r['model']}, {r['part']}", r["by"], *differs, *times, *ratios))
    header = ("model", "original", "NumPy differs", "ONNX differs", "NumPy, ms", "ONNX, ms", "original, ms", "NumPy ×", "ONNX ×")
    return table(header, rows)


def models_in_short() -> str:
    kept = kept_of("models")
    about, cases = kept["machine"], [case for script in kept["scripts"] for case in script["cases"]]
    versions = ", ".join(f"{name} {about[name]}" for name in ("numpy", "numba", "torch", "onnxruntime") if name in about)
    packages = ", ".join(f"{name} {version}" for name, version in kept["packages"].items())
    ahead = {n: sum(c["ms"][n] <= c["ms"]["original"] for c in cases) for n in ("NumPy", "ONNX")}
    return (
        f"{_processor(about)}, one core ({versions}).\nThe packages: {packages}.\n"
        f"Of {len(cases)} cases the exported graph takes at most the time of the original in {ahead['ONNX']}, "
        f"portnorm on NumPy in {ahead['NumPy']}."
    )


TABLES = {
    "speed": speed,
    "speed_in_short": speed_in_short,
    "speed_best": speed_best,
    "growth": growth,
    "growth_in_short": growth_in_short,
    "memory": memory,
    "memory_in_short": memory_in_short,
    "first_calls": first_calls,
    "first_calls_in_short": first_calls_in_short,
    "latency": latency,
    "integers": integers,
    "models": models,
    "models_in_short": models_in_short,
}
"""What a page may hold, by name."""
