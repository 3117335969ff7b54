"""The command line: `portnorm demo | train | import | export | verify | info`. Each is one call of the library and a table."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy

import portnorm
from portnorm.arrays import require_extra
from portnorm.cells.variants import IMPLEMENTATIONS, VARIANTS
from portnorm.digits import Dataset
from portnorm.errors import ConformanceError, PortnormError, UnsupportedError
from portnorm.optimizers import OPTIMIZERS

_NORMS = {**VARIANTS["LSTM"], **IMPLEMENTATIONS["LSTM"]}
_PEERS = ("numpy", "array-api-compat", "onnx", "onnxruntime", "cupy", "torch", "jax", "dask", "array-api-strict", "scikit-learn")


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
    return 0


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
    export.add_argument("--opset", type=int, help="18 to 26 (default: 18)")
    export.add_argument("--dtype", choices=("float16", "float32", "float64"))
    export.add_argument("--no-lengths", action="store_true", help="leave the input `lengths` out")
    export.add_argument("--state", action="store_true", help="take the state as an input and give it out")

    verify = command("verify", _verify, "check an ONNX file against a checkpoint")
    verify.add_argument("model", type=Path)
    verify.add_argument("--against", type=Path, required=True, help="checkpoint that the graph should compute")
    verify.add_argument("--runtime", action="append", help="runtime to check in (default: onnxruntime)")

    info = command("info", _info, "what is installed, or what is in a checkpoint")
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
            config[name] = json.loads(value)
        except ValueError:
            raise UnsupportedError(f"`--set` is {setting!r}; expected NAME=VALUE with a number, true, false or null") from None
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
        model, options.output, opset=options.opset, dtype=options.dtype, lengths=not options.no_lengths, state=options.state
    )
    return _shown(report, options)


def _verify(options: argparse.Namespace) -> dict[str, Any]:
    model = portnorm.load(options.against)
    return _shown(portnorm.verify(options.model, model, runtimes=options.runtime or ("onnxruntime",)), options)


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
    if not options.json:
        for name, version in versions.items():
            print(f"{name:<18} {version or '- (not installed)'}")
    return versions


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    sys.exit(main())
