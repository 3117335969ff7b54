"""The generated parts of the README and of docs/: `make readme` writes them, a test holds them against what they are made from."""

from __future__ import annotations

import sys

import portnorm as pn
from benchmarks import accuracy_tables, further_tables, runtimes_tables, speed_tables, ways_tables
from benchmarks.tables import RESULTS, ROOT, kept_of, table
from portnorm.checkpoint.formats import ROWS
from portnorm.libraries import SUPPORT

GPU = RESULTS / "gpu.json"


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
    report = kept_of("demo")
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
    kept = {n: kept_of(f"papers/{n}")["rows"] for n in ("sequential_digits", "characters", "small_batches")}
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


TABLES = {
    **accuracy_tables.TABLES,
    **further_tables.TABLES,
    **runtimes_tables.TABLES,
    **speed_tables.TABLES,
    **ways_tables.TABLES,
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
