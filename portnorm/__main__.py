"""The command line, `portnorm demo | train | import | export | verify | …`: each a call of the library and a table."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy

import portnorm
from portnorm.arrays import require_extra
from portnorm.cells.variants import FUNCTIONS, IMPLEMENTATIONS, VARIANTS
from portnorm.digits import Dataset
from portnorm.errors import ConformanceError, PortnormError, UnsupportedError
from portnorm.files import written_whole
from portnorm.layers.recurrent import DIRECTIONS
from portnorm.libraries import SUPPORT
from portnorm.optimizers import OPTIMIZERS

_NORMS = {**VARIANTS["LSTM"], **IMPLEMENTATIONS["LSTM"]}
_PEERS = ("array-api-compat", "onnx", "onnxruntime", *(row.package for row in SUPPORT.values()), "scikit-learn")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 if it did what was asked, 1 if a graph differs from its model, 2 for an error that the caller can mend."""
    options = _parser().parse_args(arguments)
    try:
        result: dict[str, Any] = options.run(options)
    except PortnormError as error:
        if options.json:
            print(json.dumps({"error": type(error).__name__, "message": str(error)}))
        print(f"portnorm {options.command}: {type(error).__name__}: {error}", file=sys.stderr)
        return 1 if isinstance(error, ConformanceError) else 2
    except KeyboardInterrupt:
        print(f"portnorm {options.command}: interrupted; files that were not complete are not there", file=sys.stderr)
        return 130
    if options.json:
        print(json.dumps(result, default=str))
    return int(getattr(options, "failed", False))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="portnorm", description=portnorm.__doc__)
    parser.add_argument("--version", action="version", version=f"portnorm {portnorm.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    def command(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.add_argument("--json", action="store_true", help="print the result as JSON, for machines")
        sub.set_defaults(run=run)
        return sub

    demo = command("demo", _demo, "train three LSTMs on real digits in NumPy, export them, check them in onnxruntime")
    demo.add_argument("--out", type=Path, default=Path("out"), help="directory of the results (default: out)")
    demo.add_argument("--epochs", type=int, help="passes over the training images")

    train = command("train", _train, "train a classifier of sequences: an LSTM, its last state, a linear layer")
    train.add_argument("-o", "--output", type=Path, required=True, help="checkpoint to write (.safetensors)")
    train.add_argument("--data", default="digits", help="`digits`, or an .npz file with x (cases, time, features), y, and maybe lengths")
    train.add_argument("--norm", default="layer", choices=[name or "none" for name in _NORMS], help="variant (default: layer)")
    train.add_argument("--hidden", type=int, default=48)
    train.add_argument("--epochs", type=int, default=10)
    train.add_argument("--batch", type=int, default=48)
    train.add_argument("--optimizer", default="adam", choices=list(OPTIMIZERS))
    train.add_argument("--lr", type=float, default=0.01, help="learning rate (default: 0.01)")
    train.add_argument("--clip", type=float, default=1.0, help="largest global norm of the gradient (default: 1)")
    train.add_argument("--seed", type=int, default=0)

    foreign = command("import", _import, "make a checkpoint from weights that another library stored")
    foreign.add_argument("source", type=Path, help=".safetensors, .npz, .h5, .keras or .onnx")
    foreign.add_argument("-o", "--output", type=Path, required=True, help="checkpoint to write (.safetensors)")
    foreign.add_argument("--format", default="auto", choices=("auto", *portnorm.FORMATS), help="who stored it (default: auto)")
    foreign.add_argument("--prefix", default="", help="beginning of the names that are meant")
    foreign.add_argument("--layer", help="class of the layer, where arrays alone cannot tell")
    foreign.add_argument("--ignore", action="append", default=[], metavar="KEY", help="a key that is neither asked for nor refused")
    foreign.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="what arrays do not say, for example batch_first=true"
    )

    export = command("export", _export, "write a checkpoint as an ONNX file, checked in onnxruntime first")
    export.add_argument("checkpoint", type=Path)
    export.add_argument("-o", "--output", type=Path, required=True, help="file to write (.onnx)")
    export.add_argument("--opset", type=int, help="18 to 26, for some targets 28 (default: 18; 23 for onnxruntime)")
    export.add_argument("--target", default="portable", help="who will run it (default: portable, which is all of them)")
    export.add_argument("--dtype", choices=("float16", "bfloat16", "float32", "float64"))
    export.add_argument("--quantize", choices=("int8", "int4"), help="products of integers: a quarter of the file, or an eighth")
    export.add_argument("--streaming", action="store_true", help="one step with explicit states instead of a sequence")
    export.add_argument("--no-fold", action="store_true", help="keep normalizations and cells visible that could be folded away")
    export.add_argument("--accurate", action="store_true", help="centre before operators that cancel where the mean is large")
    export.add_argument("--prefix", default="", help="what stands before every name in the graph")
    export.add_argument("--function", action="store_true", help="write the model as one model-local function")
    export.add_argument("--no-lengths", action="store_true", help="leave the input `lengths` out")
    export.add_argument("--mask", action="store_true", help="take the input `mask` in place of `lengths`: padding in front, and gaps")
    export.add_argument("--state", action="store_true", help="take the state as an input and give it out")
    export.add_argument("--external-data", action="store_true", help="put the weights into a file of their own beside the model")
    export.add_argument("--no-metadata", action="store_true", help="write the graph alone: smaller, and `load` cannot read it")

    verify = command("verify", _verify, "check an ONNX file against a checkpoint, or against the layer that it says it holds")
    verify.add_argument("model", type=Path)
    verify.add_argument("--against", type=Path, help="checkpoint that the graph should compute (default: what the file says)")
    verify.add_argument("--runtime", action="append", help="runtime to check in, or `all` of them, a row each (default: onnxruntime)")
    verify.add_argument(
        "--tolerance", type=float, metavar="D", help="allow this difference instead, for a graph that was made smaller on purpose"
    )

    bench = command("bench", _bench, "time this library and its peers, each in a process of its own, checked against float64 first")
    bench.add_argument("engines", nargs="*", help="only these engines (default: all that are installed)")
    bench.add_argument("--only", action="append", default=[], help="only works whose name has this in it (may be repeated: any of them)")
    bench.add_argument("--cores", type=int, default=1, help="cores and threads of each engine (default: 1)")
    bench.add_argument("--seconds", type=float, default=0.1, help="time per work, engine and round (default: 0.1)")
    bench.add_argument("--rounds", type=int, default=5, help="how often the engines take turns (default: 5)")
    conform = command("conform", _conform, "measure array libraries and runtimes against float64, one table of cases for all")
    conform.add_argument(
        "subjects", nargs="*", metavar="SUBJECT", help="libraries and runtimes, or `all` (default: libraries that are installed)"
    )
    conform.add_argument("--operation", action="append", help="only this operation (may be repeated; no recurrent cells then)")
    conform.add_argument("--regime", action="append", help="only this regime of values (may be repeated)")
    conform.add_argument("--dtype", action="append", help="only this type (may be repeated)")
    conform.add_argument("--html", type=Path, metavar="FILE", help="write a page with a heat map")
    conform.add_argument("--junit", type=Path, metavar="FILE", help="write JUnit XML")
    conform.add_argument(
        "--vectors", type=Path, metavar="DIR", help="write the cases in the layout of ONNX's backend tests, and measure nothing"
    )
    conform.add_argument(
        "--import", dest="modules", action="append", default=[], metavar="MODULE", help="import a module that adds cases or runtimes"
    )

    warm = command("warm", _warm, "compile the kernels for NumPy arrays now, for instance when a container is built")
    warm.add_argument("--dtype", action="append", help="float32 (default) or float64; may be repeated")

    info = command("info", _info, "what is installed and compiled, or what is in a checkpoint")
    info.add_argument("checkpoint", type=Path, nargs="?")
    return parser


def _demo(options: argparse.Namespace) -> dict[str, Any]:
    from portnorm import demo

    budget = demo.Budget() if options.epochs is None else demo.Budget(epochs=options.epochs)
    demo.run(options.out, budget)
    report: dict[str, Any] = json.loads((options.out / "report.json").read_text())
    return report


def _train(options: argparse.Namespace) -> dict[str, Any]:
    from portnorm import training

    rich_progress = require_extra("rich.progress", "demo")
    data, held_out = _dataset(options.data)
    classes = int(max(data.labels.max(), held_out.labels.max())) + 1
    norm = None if options.norm == "none" else options.norm
    model = training.classifier(norm, data.x.shape[2], options.hidden, classes, data.x.shape[0], options.seed)
    with rich_progress.Progress(disable=options.json) as bars:
        task = bars.add_task(options.norm, total=None)
        history = training.train(
            model,
            data,
            OPTIMIZERS[options.optimizer](lr=options.lr),
            epochs=options.epochs,
            batch=options.batch,
            clip=options.clip,
            state_noise=0.1 if _NORMS[norm].timed else 0.0,
            seed=options.seed,
            progress=lambda done, total, loss: bars.update(task, completed=done, total=total, description=f"loss {loss:.3f}"),
        )
    portnorm.save(model, options.output)
    found = {"checkpoint": str(options.output), "test_accuracy": training.accuracy(model, held_out), "loss": history.by_thirds()[-1]}
    if not options.json:
        print(f"{options.output}: held-out accuracy {found['test_accuracy']:.1%}, training loss {found['loss']:.3f}")
    return found


def _dataset(name: str) -> tuple[Dataset, Dataset]:
    """Training data, and the fifth of it that is held out."""
    from portnorm.digits import sequential_digits

    if name == "digits":
        return sequential_digits()
    try:
        with numpy.load(name, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
        x = numpy.ascontiguousarray(arrays["x"].astype(numpy.float32).transpose(1, 0, 2))
        whole = Dataset(x, arrays["y"].astype(numpy.int64), arrays.get("lengths"))
    except (OSError, KeyError, ValueError) as error:
        raise UnsupportedError(f"`--data` {name!r} is no .npz file with x (cases, time, features) and y (cases,): {error}") from error
    order = numpy.random.default_rng(0).permutation(len(whole.labels))
    held = max(1, len(order) // 5)
    return whole.take(order[held:]), whole.take(order[:held])


def _import(options: argparse.Namespace) -> dict[str, Any]:
    config = {}
    for setting in options.set:
        name, _, value = setting.partition("=")
        try:
            config[name] = value if value in FUNCTIONS or value in DIRECTIONS else json.loads(value)
        except ValueError:
            raise UnsupportedError(
                f"`--set` is {setting!r}; expected NAME=VALUE with a number, true, false, null, or one of "
                f"{', '.join((*FUNCTIONS, *DIRECTIONS))}"
            ) from None
    layer = portnorm.import_checkpoint(
        options.source, options.format, prefix=options.prefix, layer=options.layer, ignore=options.ignore, **config
    )
    portnorm.save(layer, options.output)
    if not options.json:
        print(f"{options.output}: {layer!r}\nrecognised as {layer.provenance}")
    return {"checkpoint": str(options.output), "layer": repr(layer), "provenance": layer.provenance}


def _export(options: argparse.Namespace) -> dict[str, Any]:
    model = portnorm.load(options.checkpoint)
    report = portnorm.export(
        model,
        options.output,
        opset=options.opset,
        target=options.target,
        dtype=options.dtype,
        streaming=options.streaming,
        fold=not options.no_fold,
        accurate=options.accurate,
        lengths=not options.no_lengths,
        mask=options.mask,
        state=options.state,
        prefix=options.prefix,
        function=options.function,
        external_data=options.external_data or None,
        metadata=not options.no_metadata,
        quantize=options.quantize,
    )
    return _shown(report, options)


def _verify(options: argparse.Namespace) -> dict[str, Any]:
    model = None if options.against is None else portnorm.load(options.against)
    runtimes = options.runtime or ["onnxruntime"]
    report = portnorm.verify(options.model, model, runtimes="all" if "all" in runtimes else runtimes, tolerance=options.tolerance)
    found = _shown(report, options)
    if report.failures:
        raise ConformanceError("; ".join(f"{o.runtime}: {o.status}" for o in report.failures))
    return found


def _conform(options: argparse.Namespace) -> dict[str, Any]:
    from portnorm import conform
    from portnorm.conform import report
    from portnorm.conform.libraries import LIBRARIES

    for module in options.modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise UnsupportedError(f"`--import` names {module!r}: {error}") from None
    chosen = (options.operation, options.regime, options.dtype)
    if options.vectors is not None:
        names = require_extra("portnorm_onnx.conformance", "onnx").write_vectors(options.vectors, conform.cases(*chosen))
        if not options.json:
            print(f"{options.vectors}: {len(names)} cases")
        return {"vectors": str(options.vectors), "cases": names}
    if not any(True for _ in conform.cases(*chosen)):
        raise UnsupportedError(f"no case is left; operations are {', '.join(conform.OPERATIONS)}; regimes are {', '.join(conform.REGIMES)}")
    subjects = options.subjects or [*SUPPORT]
    if "all" in subjects:
        runtimes = require_extra("portnorm_onnx.runtimes", "onnx").RUNTIMES
        subjects = [*LIBRARIES, *runtimes]
    started, count = time.monotonic(), 0
    interactive = sys.stderr.isatty() and not options.json

    def progress(what: str) -> None:
        nonlocal count
        count += 1
        if interactive:
            print(f"\r\x1b[K{count:5d}  {time.monotonic() - started:5.0f} s  {what}", end="", file=sys.stderr, flush=True)

    results = list(conform.measure(subjects, operations=chosen[0], regimes=chosen[1], dtypes=chosen[2], progress=progress))
    if interactive:
        print("\r\x1b[K", end="", file=sys.stderr)
    about = {"portnorm": portnorm.__version__, "python": platform.python_version(), "machine": platform.machine()}
    for path, text in ((options.html, report.to_html), (options.junit, lambda found, _: report.to_junit(found))):
        if path is not None:
            with written_whole(path) as file:
                file.write(text(results, about).encode())
    if not options.json:
        print(report.laid_out(report.table(results)))
        for r in results:
            if r.failed:
                print(f"{r.status}: {r.subject} / {r.operation} / {r.regime} / {r.dtype} / {r.side}: {r.detail}")
    options.failed = any(r.failed for r in results)
    return {"about": about, "results": [r.to_dict() for r in results]}


def _bench(options: argparse.Namespace) -> dict[str, Any]:
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


def _shown(report: Any, options: argparse.Namespace) -> dict[str, Any]:
    if not options.json:
        print(report)
    found: dict[str, Any] = report.to_dict()
    return found


def _info(options: argparse.Namespace) -> dict[str, Any]:
    if options.checkpoint is not None:
        layer = portnorm.load(options.checkpoint)
        arrays = {name: {"dtype": str(a.dtype), "shape": list(a.shape)} for name, a in layer.state_dict().items()}
        found = {"layer": repr(layer), "parameters": sum(int(p.size) for p in layer.parameters().values()), "arrays": arrays}
        if not options.json:
            print(f"{layer}\n{found['parameters']:,} parameters")
            for name, a in arrays.items():
                print(f"  {name:<32} {a['dtype']:<10} {tuple(a['shape'])}")
        return found
    versions: dict[str, str | None] = {"portnorm": portnorm.__version__, "python": platform.python_version()}
    versions |= {name: _version(name) for name in _PEERS}
    kernels = _warming().state()
    if not options.json:
        for name, version in versions.items():
            print(f"{name:<18} {version or '- (not installed)'}")
        print(f"{'numba':<18} {kernels['numba'] or '- (not installed: definitions alone on NumPy arrays)'}")
        for kind, names in kernels.get("compiled", {}).items():
            print(f"{'kernels ' + kind:<18} {', '.join(names) or '-'}")
        if kernels["numba"]:
            print(f"{'noted in':<18} {kernels['cache']}")
    return {**versions, "kernels": kernels}


def _warm(options: argparse.Namespace) -> dict[str, Any]:
    there = {dtype: portnorm.warm(dtype=dtype) for dtype in options.dtype or ["float32"]}
    if not options.json:
        for dtype, names in there.items():
            print(
                f"{dtype}: {len(names)} families of kernels are compiled"
                if names
                else f"{dtype}: without numba there is nothing to compile"
            )
    return there


def _warming() -> Any:
    return importlib.import_module("portnorm_backends.cpu.warming")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    sys.exit(main())
