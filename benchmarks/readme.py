"""The generated parts of the README and of docs/: `make readme` writes them, a test holds them against what they are made from."""

from __future__ import annotations

import json
import math
import re
import statistics
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import portnorm as pn
from benchmarks import accuracy_tables, further_tables
from portnorm import bench
from portnorm.checkpoint.formats import ROWS
from portnorm.conform import LIBRARIES, REGIMES
from portnorm.libraries import SUPPORT
from portnorm_onnx.runtimes import RUNTIMES
from portnorm_onnx.targets import TARGETS

GROWING = ("portnorm", "portnorm compile", "torch", "JAX jit")
ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DEMO, GPU = RESULTS / "demo.json", RESULTS / "gpu.json"


def table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """A Markdown table."""
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def variants(tables: dict[str, dict[str | None, pn.Variant]] = pn.VARIANTS) -> str:
    """The presets, from the rows that the code reads."""
    rows = []
    for cell, name, v in ((cell, name, v) for cell, named in tables.items() for name, v in named.items()):
        what = {
            None: "–",
            "layer": "layer",
            "rms": "RMS",
            "weight": "rows of the matrices",
            "batch": f"batch, per {'time step' if v.timed else 'sequence'}",
        }[v.norm]
        where = v.where() + {"all": "", "candidate": ", candidate apart", "gate": ", per gate"}[v.groups]
        state = {None: "–", "copy": "into tanh only", "state": "written back"}[v.cell]
        inner = " + ".join(v.early) or "–"
        outer = " + ".join((*v.biases, *(("β",) if v.shift and v.norm not in (None, "weight") and v.terms else ()))) or "–"
        outer += f", forget gate + {v.runtime_forget_bias:g}" if v.runtime_forget_bias else ""
        gain = "–" if v.norm in (None, "weight") else f"{v.gain:g}" if v.scale else "none in the gates"
        eps = "–" if v.norm in (None, "weight") else f"{v.eps:g}" + " beside σ" * (v.eps_place == "std")
        what += {"biased": "", "running": ", running ones / (n − 1)", "unbiased": ", / (n − 1)"}[v.variance]
        what += ", γ and β per step" * (v.affine == "step")
        form = [f"reset {v.reset}" if v.reset else "no reset"] if cell == "GRU" else []
        form += ["z replaces"] * (v.update == "replace") + ["h ⊙ u"] * (v.recurrence == "diagonal")
        form += [f for f, usual in zip(v.activations(), ("sigmoid", "tanh", v.activation), strict=True) if f != usual]
        form += ["peepholes"] * v.peepholes
        shown = f"`{name!r}`".replace("'", '"')
        rows.append((f"`{cell}`", shown, what, where, state, inner, outer, gain, eps, ", ".join(form) or "–", v.source))
    header = ("layer", "`norm=`", "statistics", "gates", "cell state", "bias before", "bias after", "gain", "eps", "form", "source")
    return table(header, rows)


def implementations() -> str:
    """The published cells that differ from the presets."""
    return variants(pn.IMPLEMENTATIONS)


def formats() -> str:
    """What can be imported, from the rows that the importer reads."""
    found: dict[str, list[str]] = {}
    for row in ROWS:
        title = f"`{row.layer}`" + (f" {row.norm!r}" if row.norm not in (None, "weight") else "")
        found.setdefault(row.format, []).append(title)
    return table(("`format=`", "layers"), ((f"`{name}`", ", ".join(dict.fromkeys(titles))) for name, titles in found.items()))


def graphs() -> str:
    """What each layer becomes in ONNX, by exporting it."""
    layers: list[tuple[str, pn.Layer, dict[str, object]]] = [
        ("`LayerNorm`", pn.LayerNorm(8), {}),
        ("`RMSNorm`", pn.RMSNorm(8), {"opset": 23}),
        ("`BatchNorm`", pn.BatchNorm(8), {}),
        ("`InstanceNorm`", pn.InstanceNorm(8, affine=True), {}),
        ("`GroupNorm`", pn.GroupNorm(2, 8), {"input_shape": ("batch", 8, 16)}),
        *(
            (f"`{cell}(norm={name!r})`".replace("'", '"'), getattr(pn, cell)(8, 16, norm=name, rng=0), {})
            for cell, table in pn.VARIANTS.items()
            for name in table
        ),
    ]
    rows = []
    for name, layer, keywords in layers:
        report = pn.export(layer, None, **keywords)  # type: ignore[arg-type]
        assert report.model is not None
        operators = sorted({n.op_type for n in report.model.graph.node})
        inside = f" + {report.body_nodes[0]} in the `Scan`" if report.body_nodes else ""
        shown = operators[0] if len(operators) == 1 else "`Scan`, any length" if report.body_nodes else ", ".join(operators)
        rows.append((name, str(report.opset), f"{report.nodes}{inside}", shown))
    return table(("layer", "opset", "nodes", "operators"), rows)


def libraries() -> str:
    """The rows that dispatch and the product tests are made of."""
    rows = []
    for row in SUPPORT.values():
        kernels = ", ".join(f"`{name}`" for name in row.kernels) or "–"
        about = {"autodiff takes our vjps": row.autodiff, "lazy": row.lazy, "no `out=`": not row.out}
        brings = f"the extra `{row.extra}`" if row.extra else f"`{row.package}`"
        tested = "`make test`" if row.always else "`make test-all`"
        if row.gpu:
            tested = "`python -m benchmarks.gpu`" + ("" if GPU.exists() else ": not run here, for want of a GPU")
        rows.append((row.name, ", ".join(row.dtypes), kernels, ", ".join(k for k, v in about.items() if v) or "–", brings, tested))
    return table(("arrays of", "dtypes", "kernels", "besides", "comes with", "tested by"), rows)


def demo() -> str:
    """The result of `make demo`, kept from one run."""
    report = json.loads(DEMO.read_text())
    rows = []
    for r in report["results"]:
        losses = " · ".join(f"{loss:.2f}" for loss in r["loss_by_thirds"])
        difference, equal = f"{r['worst_difference']:.1e}", f"{r['equal_predictions']:.1%}"
        integers = f"{r['integers_accuracy']:.1%} ({r['integers_equal']:.1%})"
        rows.append((r["model"], f"{r['test_accuracy']:.1%}", losses, f"{r['nodes']} + {r['scan_nodes']}", difference, equal, integers))
    header = (
        "model",
        "test accuracy",
        "loss at ⅓ · ⅔ · end",
        "nodes + in the `Scan`",
        "largest difference of a logit",
        "equal predictions",
        "in int8 (equal predictions)",
    )
    return table(header, rows)


def norms_elsewhere() -> str:
    """Where which norm comes first: kept results of benchmarks/papers."""
    names = ("plain", "BN", "LN")
    kept = {
        n: json.loads((RESULTS / "papers" / f"{n}.json").read_text())["rows"] for n in ("sequential_digits", "characters", "small_batches")
    }
    digits = {row[0]: row[3] for row in kept["sequential_digits"] if row[1] == "in order"}
    characters = {row[0]: row[2] for row in kept["characters"]}
    batches = {row[1]: (row[4], row[3]) for row in kept["small_batches"] if row[0] == "batch 4"}
    rows = [
        ("digits, one pixel per step, five seeds", "accuracy %, higher is better", *(digits[name] for name in names)),
        ("the next character of a text", "bits, lower is better", *(characters[name] for name in names)),
        ("digits without time, batches of 4", "training loss at the end, lower is better", *(batches[name][0] for name in names)),
        ("the same", "held-out error %, lower is better", *(batches[name][1] for name in names)),
    ]
    return table(("task", "measured", "plain", "BN", "LN"), rows)


# -- docs/runtimes.md, kept from runs of benchmarks/conformance.py and benchmarks/latency.py -----------------------------------------------


def _kept(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text())


def targets() -> str:
    """What a target's graphs avoid, from the rows that the exporter reads."""
    rows = ((f"`{t.name}`", str(t.last_opset), ", ".join(t.dtypes), t.reason) for t in TARGETS.values())
    return table(("`target=`", "opset up to", "types", "what it says of the runtime"), rows)


def runtimes() -> str:
    """The adapters, and the versions that were measured."""
    versions = _kept("support")["versions"]
    rows = (
        (f"`{name}`", row.note, versions[name] or "not installed", _operators(row.no_steps), _operators(row.no_sequences))
        for name, row in RUNTIMES.items()
    )
    return table(("`--runtime`", "what it is", "measured", "no answer for no steps", "for no sequences"), rows)


def _operators(names: frozenset[str]) -> str:
    return ", ".join(f"`{name}`" if name.isidentifier() else name for name in sorted(names))


def support() -> str:
    """Layers × targets, each checked in the runtime of the target; the portable graph in every runtime that was there."""
    kept, own = _kept("support"), [t.name for t in TARGETS.values() if not t.further]
    there = [name for name, version in kept["versions"].items() if version]
    found: dict[str, dict[str, Any]] = {}
    for r in kept["rows"]:
        found.setdefault(r["layer"], {})[r.get("target") or f"in {r['runtime']}"] = r
    marks = {"passed": "✓", "differs": "differs", "does not run": "no", "failed": "no"}
    rows = []
    for layer, cells in found.items():
        made = [cells[t]["nodes"] if cells[t]["status"] == "passed" else "no" for t in own]
        rows.append((layer, *made, *(marks[cells[f"in {name}"]["status"]] for name in there)))
    return table(("layer", *(f"`{t}`" for t in own), *there), rows)


def unsupported() -> str:
    """Every cell of the support table that is not a success: for each target and runtime the layers, and the reason of the first."""
    found: dict[str, list[dict[str, Any]]] = {}
    for r in _kept("support")["rows"]:
        if r["status"] not in ("passed", "not installed"):
            found.setdefault(r.get("target") or r["runtime"], []).append(r)
    lines = [
        f"- `{where}`: {', '.join(r['layer'] for r in rows)}. The first: {rows[0]['detail'].removeprefix(f'{where}: ')}"
        for where, rows in found.items()
    ]
    return "\n".join(lines) or "None: every layer is exported for every target, and every portable graph agrees in every runtime above."


_SHOWN = [name for name in REGIMES if name not in ("no values", "NaN and Inf")]


def _number(row: dict[str, Any]) -> str:
    """ULP of the worst operation, and what failed beside."""
    shown = "–" if row["max_ulp"] is None else f"{row['max_ulp']:.1f}" if row["max_ulp"] < 100 else f"{row['max_ulp']:.0e}"
    return f"**{shown}**" if row["failed"] else shown


def accuracy(side: str, dtypes: tuple[str, ...], subjects: Iterable[str]) -> str:
    """The worst of all operations by regime, in ULP of the row's largest output."""
    kept = {(r["subject"], r["regime"], r["dtype"]): r for r in _kept("accuracy") if r["side"] == side}
    columns = [(s, d) for s in subjects for d in dtypes if (s, "normal", d) in kept]
    rows = []
    for regime in _SHOWN:
        cells = [kept.get((s, regime, d)) for s, d in columns]
        if any(cells):
            rows.append((regime, *("" if r is None or not r["cases"] else _number(r) for r in cells)))
    return table(("regime", *(f"{s} {d}" if len(dtypes) > 1 else s for s, d in columns)), rows)


def definitions_forward() -> str:
    absent = {r["subject"] for r in _kept("accuracy") if r["absent"]}
    return (
        accuracy("forward", ("float32", "float64"), LIBRARIES)
        + f"\n\nNot run here: {', '.join(n for n in LIBRARIES if n in absent) or 'none'}."
    )


def definitions_gradient() -> str:
    return accuracy("gradient", ("float32", "float64"), LIBRARIES)


def definitions_half() -> str:
    return accuracy("forward", ("float16", "bfloat16"), LIBRARIES)


def operators() -> str:
    return accuracy("forward", ("float32",), [name for name in RUNTIMES if name != "web-page"])


def latency() -> str:
    """Milliseconds in onnxruntime, one thread, and the ratio to the plain operator: of minima, and the median of turns."""
    rows, kept = [], _kept("latency")["rows"]
    others = [name for name in kept[0]["ratio"] if name != "plain"]
    for r in kept:
        plain = r["milliseconds"]["plain"]["min"]
        shown = (f"{r['ratio'][n]['of minima']:.2f} ({r['ratio'][n]['median']:.2f})" for n in others)
        rows.append((str(tuple(r["shape"])), f"{plain:.2f} ms", *shown))
    return table(("(T, B, I, H)", "`LSTM` operator", *others), rows)


def integers() -> str:
    """Times of graphs with integers for weights over those in float32, by shape, their files, and what that changed."""
    rows: dict[str, list[Any]] = {}
    kept = _kept("integers")["rows"]
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
    about = _kept("integers")["about"]
    numpy = "  ".join(f"{r['layer']} {r['ratio']:.2f} ({r['spread'][0]:.2f}–{r['spread'][1]:.2f})" for r in _kept("integers")["numpy"])
    return (
        table(("(T, B, I, H)", *shapes, "file", "mean difference of `y`"), shown)
        + f"\n\nonnxruntime {about['onnxruntime']}, {about['processor']}{', with VNNI' if about['vnni'] else ', without VNNI'}. "
        + f"A step of one sequence with 1024 features in NumPy, `pn.quantized(layer).step` over `layer.step`: {numpy}."
    )


def _milliseconds(t: float | None) -> str:
    return "–" if t is None else f"{t:.4f}" if t < 0.1 else f"{t:.2f}" if t < 10 else f"{t:.0f}"


def speed() -> str:
    """One core: milliseconds, the ratio of the fastest of our engines to the fastest peer, and GB/s or GFLOP/s; on two cores the ratio."""
    kept = _kept("speed")
    names = (
        "portnorm",
        "portnorm out=",
        "portnorm compile",
        "torch",
        "torch.compile",
        "JAX jit",
        "onnxruntime",
        "NumPy",
        "copy",
        "matmuls",
    )
    two = {row["work"]: bench.ratio(row) for row in kept.get("cores 2", [])}
    rows = []
    for row in kept["cores 1"]:
        cells = [_milliseconds(row["times"][name]["min"] if name in row["times"] else None) for name in names]
        ratios = (bench.ratio(row), *((two.get(row["work"]),) if two else ()))
        rate = bench.rate(row)
        rows.append((row["work"], *cells, *("–" if n is None else f"{n:.2f}" for n in ratios), f"{rate:.1f}" if rate else "–"))
    return table(("ms", *names, "ratio", *(("two cores",) if two else ()), "GB/s, GFLOP/s"), rows)


def _mean(ratios: Iterable[float]) -> float:
    """The geometric one."""
    return math.exp(statistics.fmean(map(math.log, ratios)))


def speed_in_short() -> str:
    """The machine, and the geometric mean of the ratios."""
    kept = _kept("speed")
    rows = kept["cores 1"]
    ratios = [r for r in map(bench.ratio, rows) if r is not None]
    above = sum(r > 1.1 for r in ratios)
    turns = range(len(next(iter(rows[0]["times"].values()))["turns"]))
    each = sorted(_mean(r for row in rows if (r := bench.ratio(row, turn)) is not None) for turn in turns)
    about = kept["machine"]
    versions = ", ".join(f"{name} {about[name]}" for name in ("numpy", "numba", "torch", "jax", "onnxruntime") if name in about)
    return (
        f"{about['processor']}, one core, float32, minimum of many runs ({versions}).\n"
        f"Over {len(ratios)} works the geometric mean of the time over that of the fastest peer is {_mean(ratios):.2f} "
        f"({each[0]:.2f} to {each[-1]:.2f} in each of the {len(each)} turns alone); "
        f"{len(ratios) - above} ratios are at most 1.1, {above} above."
    )


def speed_best() -> str:
    """One core: the fastest of our engines beside the fastest peer, and the ratio; on two cores the ratio."""
    kept = _kept("speed")
    two, rows = {row["work"]: bench.ratio(row) for row in kept.get("cores 2", [])}, []
    for row in kept["cores 1"]:
        own, peer, found = min(t["min"] for n, t in row["times"].items() if bench.ENGINES[n].own), bench.best_peer(row), bench.ratio(row)
        if peer is not None and found is not None:
            ratios = (found, *((two.get(row["work"]),) if two else ()))
            shown = ("–" if r is None else f"{r:.2f}" for r in ratios)
            rows.append((row["work"], _milliseconds(own), _milliseconds(peer[1]), peer[0], *shown))
    return table(("work", "portnorm, ms", "fastest peer, ms", "which", "ratio", *(("on two cores",) if two else ())), rows)


def growth() -> str:
    """How time and peak memory grow."""
    rows = []
    for row in _kept("speed").get("growth", []):
        shown = [f"{_milliseconds(t['min'])} ({t['peak_kb'] / 1024:.0f})" if t else "–" for t in (row["times"].get(n) for n in GROWING)]
        rows.append((row["work"], *shown))
    return table(("ms (peak of the process in MB)", *GROWING), rows)


def growth_in_short() -> str:
    """The memory of a training step that grows with every step of the sequence."""
    peaks = {row["work"]: row["times"] for row in _kept("speed").get("growth", [])}
    few, many = (peaks.get(f"LN-LSTM forward+backward {steps}×1×64×128", {}) for steps in (1000, 10000))
    found = [f"{n} {(many[n]['peak_kb'] - few[n]['peak_kb']) * 1024 / 9000:,.0f}" for n in GROWING if n in few and n in many]
    return f"From 1,000 steps to 10,000 a training step of LN-LSTM 1×64×128 takes so many more bytes per step: {', '.join(found)}."


def models() -> str:
    """Real models beside their packages: differences relative to the largest value, times, and ratios of times."""
    rows = []
    for r in (case for script in _kept("models")["scripts"] for case in script["cases"]):
        differs = (f"{r['differences'][name] / r['largest']:.1e}" for name in ("NumPy", "ONNX"))
        ms = r["ms"]
        ratios = (f"{ms[name] / ms['original']:.2f}" if ms[name] * 50 > ms["original"] else "< 0.02" for name in ("NumPy", "ONNX"))
        times = (_milliseconds(ms[name]) for name in ("NumPy", "ONNX", "original"))
        rows.append((f"{r['model']}, {r['part']}", r["by"], *differs, *times, *ratios))
    header = ("model", "original", "NumPy differs", "ONNX differs", "NumPy, ms", "ONNX, ms", "original, ms", "NumPy ×", "ONNX ×")
    return table(header, rows)


def models_in_short() -> str:
    kept = _kept("models")
    about, cases = kept["machine"], [case for script in kept["scripts"] for case in script["cases"]]
    versions = ", ".join(f"{name} {about[name]}" for name in ("numpy", "numba", "torch", "onnxruntime") if name in about)
    packages = ", ".join(f"{name} {version}" for name, version in kept["packages"].items())
    ahead = {n: sum(c["ms"][n] <= c["ms"]["original"] for c in cases) for n in ("NumPy", "ONNX")}
    return (
        f"{about['processor']}, one core ({versions}).\nThe packages: {packages}.\n"
        f"Of {len(cases)} cases the exported graph takes at most the time of the original in {ahead['ONNX']}, "
        f"portnorm on NumPy in {ahead['NumPy']}."
    )


# -- docs/behind-the-export.md, kept from a run of benchmarks/behind.py -----------------------------------------------------------------


def _by_tool(cell: Callable[[list[dict[str, Any]]], str]) -> str:
    """Tools × graphs; a cell has a row for each target."""
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for row in _kept("behind")["rows"]:
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
    about = _kept("behind")["about"]
    packages = ", ".join(f"{name} {version or 'not installed'}" for name, version in about["packages"].items())
    return f"{packages}; on {about['processor']}, {'with' if about['vnni'] else 'without'} VNNI."


# -- docs/ways-out.md, kept from a run of benchmarks/ways_out.py -------------------------------------------------------------------------

_WAYS = ("fixed", "open time", "open batch", "step", "training")


def _of_door(row: dict[str, Any]) -> str:
    """What a way of a door comes to, in a word, with the largest difference."""
    if row["word"] == "none":
        return "–"
    difference = row.get("difference")
    shown = "" if difference is None else " 0" if difference == 0 else f" {difference:.0e}".replace("e-0", "e-")
    return f"✓{shown}{', frozen' if row.get('cuts') else ''}" if row["word"] == "right" else f"{row['word']}{shown}"


def _ways_out() -> dict[tuple[str, str, str], dict[str, Any]]:
    """By door, way and kind; a step for one number of sequences stands where there is none for any."""
    found = {(r["door"], r["way"], r["kind"]): r for r in _kept("ways_out")["rows"]}
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
                rows.append((door, way, *(_of_door(r) + ", one batch" * r.get("one batch", False) for r in cells)))
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
    rows = [r for r in _kept("ways_out")["rows"] if "delegates" in r and r["way"] in ("fixed", "step", "step of one batch")]
    kinds = list(dict.fromkeys(r["kind"] for r in rows))
    shown = []
    for door in dict.fromkeys(r["door"] for r in rows):
        for name, ways in (("one step", ("step", "step of one batch")), ("five steps", ("fixed",))):
            of = {r["kind"]: str(r["delegates"]) for r in rows if r["door"] == door and r["way"] in ways}
            shown.append((door, name, *(of.get(kind, "–") for kind in kinds)))
    return table(("door", "", *kinds), shown)


def ways_out_versions() -> str:
    about = _kept("ways_out")["about"]
    packages = ", ".join(f"{name} {version or 'not installed'}" for name, version in about["packages"].items())
    return f"{packages}; on {about['processor']}."


TABLES = {
    **accuracy_tables.TABLES,
    **further_tables.TABLES,
    "behind": behind,
    "behind_files": behind_files,
    "behind_versions": behind_versions,
    "ways_out": ways_out,
    "ways_out_pieces": ways_out_pieces,
    "ways_out_said": ways_out_said,
    "ways_out_versions": ways_out_versions,
    "models": models,
    "models_in_short": models_in_short,
    "speed": speed,
    "speed_in_short": speed_in_short,
    "speed_best": speed_best,
    "growth": growth,
    "growth_in_short": growth_in_short,
    "targets": targets,
    "integers": integers,
    "runtimes": runtimes,
    "support": support,
    "unsupported": unsupported,
    "definitions_forward": definitions_forward,
    "definitions_gradient": definitions_gradient,
    "definitions_half": definitions_half,
    "operators": operators,
    "latency": latency,
    "variants": variants,
    "implementations": implementations,
    "formats": formats,
    "graphs": graphs,
    "libraries": libraries,
    "demo": demo,
    "norms_elsewhere": norms_elsewhere,
}


def filled(text: str) -> str:
    """`text` with every generated table as it is now."""
    for name, make in TABLES.items():
        start, end = f"<!-- generated: {name} -->\n", "<!-- end -->"
        before, found, rest = text.partition(start)
        _, _, after = rest.partition(end)
        text = f"{before}{start}{make()}\n{end}{after}" if found else text
    return text


PAGES = (ROOT / "README.md", *sorted(page for page in (ROOT / "docs").glob("*.md") if "<!-- generated: " in page.read_text()))
"""Pages with generated tables."""

if __name__ == "__main__":
    for page in PAGES:
        new = filled(page.read_text())
        changed = new != page.read_text()
        page.write_text(new)
        sys.stdout.write(f"{page.name}: tables {'written anew' if changed else 'are as they should be'}\n")
