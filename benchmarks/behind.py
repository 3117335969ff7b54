"""What tools do with exported graphs: `python -m benchmarks.behind`, or `make behind` with the tools in an environment of their own.

Every tool of `behind_tools.py` gets every graph of `behind_graphs.py` for two targets, in a process of its own, which may end early or
never. Writes benchmarks/results/behind.json, from which `make readme` makes the tables of docs/behind-the-export.md.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import select
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx

import portnorm as pn
from benchmarks.behind_graphs import GRAPHS, TARGETS, feed_of, sequence_of
from benchmarks.behind_tools import ROUNDED, TOOLS, Tool
from portnorm.bench.runner import machine
from portnorm.checkpoint.onnx_constants import graphs, tensors
from portnorm_onnx.changed import facts

RESULTS = Path(__file__).parent / "results" / "behind.json"
CELLS = [(graph, target) for graph in GRAPHS for target in TARGETS]
SECONDS = 180
"""Longer than this is no answer."""
EQUAL = 1e-5
"""Differences of float32 graphs that add in another order, over 20 steps."""


# -- one tool on one graph, in the child ---------------------------------------------------------------------------------------------------


def session(path: Path) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def results(run: Any, feed: dict[str, Any]) -> dict[str, Any]:
    """Outputs by name; inputs by their places, since a tool may rename them and change their type."""
    given = {
        i.name: a.astype(np.float16) if i.type == "tensor(float16)" else a for i, a in zip(run.get_inputs(), feed.values(), strict=True)
    }
    return dict(zip([o.name for o in run.get_outputs()], run.run(None, given), strict=True))


def apart(tool: Tool, before: dict[str, Any], after: dict[str, Any]) -> float:
    """The largest difference of an output, by its name with or without a prefix."""
    by_name = {name.rpartition("/")[2]: a for name, a in after.items()} | after
    pairs = ((a, by_name[tool.outputs.get(name.rpartition("/")[2], name)]) for name, a in before.items())
    return max(float(np.abs(a.astype(np.float64) - b).max()) for a, b in pairs)


def float_body(model: onnx.ModelProto) -> bool:
    """Whether a node in the body of a loop reads a matrix in float32."""
    parts = list(graphs(model.graph))
    wide = {
        t.name
        for g in parts
        for t in (*g.initializer, *tensors(g))
        if t.data_type == onnx.TensorProto.FLOAT and len(t.dims) >= 2 and min(t.dims[-2:]) > 8
    }
    return any(name in wide for g in parts[1:] for n in g.node for name in n.input)


def measure(tool: Tool, graph: str, target: Any, folder: Path) -> dict[str, Any]:
    """What comes of it: a word, what was said, the largest difference, what `load` gives, and bytes after over before."""
    source, path = folder / f"{CELLS.index((graph, target))}.onnx", folder / f"made{tool.suffix}"
    row: dict[str, Any] = {"tool": tool.name, "graph": graph, "target": target, "difference": None, "load": None, "size": None}
    if tool.keywords:
        source = folder / "prefixed.onnx"
        pn.export(GRAPHS[graph].layer(), source, target=target, **GRAPHS[graph].keywords, **tool.keywords)
    for old in folder.glob("made*"):
        old.unlink()
    try:
        tool.run(source, path)
    except Exception as error:
        return row | {"word": "refuses", "said": told(error, folder)}
    row["size"] = sum(p.stat().st_size for p in folder.glob("made*")) / source.stat().st_size
    row["load"] = loaded(tool, source, path)
    try:
        run = session(path)
    except Exception as error:
        return row | {"word": "not loadable", "said": told(error, folder)}
    feed = feed_of(onnx.load(source), 7)
    try:
        after = results(run, feed)
    except Exception as error:
        return row | {"word": "does not run", "said": told(error, folder)}
    row["difference"] = apart(tool, results(session(source), feed), after)
    return row | judged(tool, source, path, row["difference"], folder)


def judged(tool: Tool, source: Path, path: Path, difference: float, folder: Path) -> dict[str, Any]:
    """The word for a graph that runs."""
    before, after = onnx.load(source), None if tool.suffix == ".ort" else onnx.load(path)
    if tool.rounds and after is not None:
        if facts(before)["weights"] == facts(after)["weights"]:
            return {"word": "untouched", "said": ""}
        if float_body(after):
            return {"word": "float body", "said": ""}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = tool.whole(pn.load(source, prefix=tool.prefix))
        try:
            pn.verify(path, model)
            return {"word": "same" if tool.packages or difference <= EQUAL else "checked", "said": ""}
        except pn.PortnormError as error:
            said, differs = told(error, folder), isinstance(error, pn.ConformanceError)
        if tool.rounds:
            try:
                pn.verify(path, model, tolerance=ROUNDED[tool.rounds], inputs=[sequence_of(before, 7)])
                return {"word": "changed", "said": said}
            except pn.PortnormError as error:
                word = "too far" if isinstance(error, pn.ConformanceError) else "invalid" if "not valid ONNX" in str(error) else "unchecked"
                return {"word": word, "said": told(error, folder)}
    return {"word": "runs the same" if not differs and difference <= EQUAL else "differs", "said": said}


def loaded(tool: Tool, source: Path, path: Path) -> str:
    """What `portnorm.load` says of the file: the layer bit by bit, other numbers with a warning, what the exporter rounded, or nothing."""
    before = pn.load(source, prefix=tool.prefix).state_dict()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            after = pn.load(path, prefix=tool.prefix).state_dict()
        except pn.PortnormError:
            return "refuses"
    same = before.keys() == after.keys() and all(a.tobytes() == after[name].tobytes() for name, a in before.items())
    told_so = any(w.category is pn.ChangedFileWarning for w in warned)
    return "warns" if told_so else "same" if same else "rounded" if not tool.packages else "differs"


def told(error: Exception, folder: Path) -> str:
    """An error's kind and what it says, without the folder, on one line."""
    text = re.sub(r"\s+", " ", f"{type(error).__name__}: {error}".replace(f"{folder}/", ""))
    return text if len(text) <= 300 else f"{text[:200]} … {text[-90:]}"


def child(folder: Path, tool: Tool, cells: list[int]) -> None:
    """One line for each cell; whatever a tool prints goes elsewhere."""
    with os.fdopen(os.dup(1), "w") as channel:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        for k in cells:
            channel.write(json.dumps(measure(tool, *CELLS[k], folder)) + "\n")
            channel.flush()


# -- all of them, in the parent ------------------------------------------------------------------------------------------------------------


def rows_of(folder: Path, tool: Tool) -> Iterator[dict[str, Any]]:
    """A row for each graph; where the process ends or hangs, that is the word, and a new one goes on with the next."""
    missing = [p for p in tool.packages if not version(p)]
    cells = list(range(len(CELLS)))
    while cells and not missing:
        command = [sys.executable, "-m", "benchmarks.behind", str(folder), tool.name, *map(str, cells)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0) as process:
            assert process.stdout is not None
            while cells:
                ready, _, _ = select.select([process.stdout], [], [], SECONDS)
                line = process.stdout.readline() if ready else b""
                if not line:
                    break
                cells.pop(0)
                yield json.loads(line)
            if not ready or not cells:
                process.kill()
            if cells:
                graph, target = CELLS[cells.pop(0)]
                word = "ends its process" if ready else "gives no answer"
                yield {"tool": tool.name, "graph": graph, "target": target, "word": word, "said": f"exit status {process.wait()}"}
    if missing:
        yield from ({"tool": tool.name, "graph": g, "target": t, "word": "not installed", "said": ", ".join(missing)} for g, t in CELLS)


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def main(names: list[str]) -> None:
    """Measure all tools, or those whose names contain one of these, and keep the rest as it was."""
    tools = [t for t in TOOLS if not names or any(n in t.name for n in names)]
    kept = json.loads(RESULTS.read_text())["rows"] if names and RESULTS.exists() else []
    found = [r for r in kept if r["tool"] not in {t.name for t in tools}]
    with tempfile.TemporaryDirectory(prefix="behind-") as folder:
        for k, (graph, target) in enumerate(CELLS):
            pn.export(GRAPHS[graph].layer(), Path(folder) / f"{k}.onnx", target=target, **GRAPHS[graph].keywords)
        for tool in tools:
            for row in rows_of(Path(folder), tool):
                found.append(row)
                said = (
                    f"{row['tool']:<46} {row['graph']:<24} {row['target']:<12} {row['word']:<16} {row.get('difference')} {row.get('load')}"
                )
                print(said, row["said"][:120], flush=True)
    order = [t.name for t in TOOLS]
    found = sorted((r for r in found if r["tool"] in order), key=lambda r: order.index(r["tool"]))
    packages = sorted({p for t in TOOLS for p in t.packages})
    about = machine() | {"vnni": "vnni" in Path("/proc/cpuinfo").read_text(), "packages": {p: version(p) for p in packages}}
    RESULTS.write_text(json.dumps({"about": about, "rows": found}, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    if len(sys.argv) > 3 and sys.argv[3].isdigit():
        child(Path(sys.argv[1]), next(t for t in TOOLS if t.name == sys.argv[2]), [int(k) for k in sys.argv[3:]])
    else:
        main(sys.argv[1:])
