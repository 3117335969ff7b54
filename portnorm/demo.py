"""The demonstration: real digits, three trained LSTMs, checked ONNX graphs of each in float32 and with integers for weights, one table."""

from __future__ import annotations

import importlib
import json
import os
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from multiprocessing import Pipe, get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import numpy

from portnorm.arrays import require_extra
from portnorm.cells.variants import NormName
from portnorm.checkpoint.layers import load, save
from portnorm.digits import sequential_digits
from portnorm.errors import PortnormError
from portnorm.files import written_whole
from portnorm.interrupts import held_back, undone
from portnorm.layers.layer import Layer
from portnorm.optimizers import Adam
from portnorm.training import History, accuracy, classifier, predictions, train

MODELS: dict[str, NormName | None] = {"LSTM": None, "BN-LSTM": "batch", "LN-LSTM": "layer"}
"""The models of the demonstration, and the preset of each."""


@dataclass(frozen=True)
class Budget:
    """What every model gets, all alike."""

    epochs: int = 16
    hidden: int = 48
    batch: int = 48
    lr: float = 0.01
    clip: float = 1.0
    state_noise: float = 0.1
    """Of the initial state in training, for batch normalization only, as in the paper."""
    seed: int = 0


@dataclass
class Result:
    """One trained and exported model."""

    model: str
    test_accuracy: float
    loss_by_thirds: list[float]
    nodes: int
    scan_nodes: int
    worst_difference: float
    """Largest absolute difference of a logit between the eager run and onnxruntime, on the held-out digits."""
    equal_predictions: float
    worst_one_step_difference: float
    integers_accuracy: float
    """Of the graph whose products are those of integers, in onnxruntime."""
    integers_equal: float
    """How many predictions are those of the model as it was trained."""
    integers_size: float
    """Its bytes for one of the float32 graph."""
    export_seconds: float
    training_seconds: float
    losses: list[float]


def run(out: Path, budget: Budget) -> list[Result]:
    """Train and export the models, leave everything in `out`, and print the table."""
    for module in ("rich", "sklearn", "matplotlib"):
        require_extra(module, "demo")
    require_extra("onnx", "onnx")
    require_extra("onnxruntime", "onnx")
    out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    trained = _train_all(budget, out)
    results = [_export(name, *trained[name], out) for name in MODELS]
    _draw(results, out / "curves.png")
    report = {"budget": asdict(budget), "seconds": time.perf_counter() - started, "results": [asdict(r) for r in results]}
    with written_whole(out / "report.json") as file:
        file.write(json.dumps(report, indent=1).encode())
    _print(results, out)
    return results


def _train_all(budget: Budget, out: Path) -> dict[str, tuple[list[float], float]]:
    """Each model in a process of its own, so that two cores are busy. None of them writes a file, so each may be ended at any time."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    # One thread per process: matrices this small gain nothing from more. Set before the processes import NumPy.
    for variable in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(variable, "1")
    columns = (TextColumn("{task.description:<9}"), BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]:.3f}"))
    # The slowest first, so that no core idles at the end.
    waiting = sorted(MODELS, key=lambda name: MODELS[name] is None)
    running: dict[Connection, tuple[str, SpawnProcess]] = {}
    trained: dict[str, tuple[list[float], float]] = {}
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn()) as bars, ExitStack() as ends:
        tasks = {name: bars.add_task(name, total=None, loss=float("nan")) for name in MODELS}
        while waiting or running:
            while waiting and len(running) < (os.cpu_count() or 1):
                name = waiting.pop(0)
                there, process = _started(name, budget, ends)
                running[there] = name, process
            ready = wait([*running])
            for there in [one for one in running if one in ready]:
                name, process = running[there]
                match _told(name, there, process):
                    case int(done), int(total), float(loss):
                        bars.update(tasks[name], completed=done, total=total, loss=loss)
                    case Layer() as model, list(losses), float(seconds):
                        save(model, _checkpoint(name, out))
                        trained[name] = losses, seconds
                        del running[there]
    return trained


def _started(name: str, budget: Budget, ends: ExitStack) -> tuple[Connection, SpawnProcess]:
    """A process that trains this model, and the end of the pipe on which it tells; it is ended with `ends`."""
    there, own = Pipe(duplex=False)
    process = get_context("spawn").Process(target=_train_one, args=(name, budget, own), daemon=True)

    def end() -> None:
        process.kill()
        process.join()

    with held_back():
        process.start()
        ends.callback(undone(process.kill))
        ends.callback(end)
    own.close()
    return there, process


def _told(name: str, there: Connection, process: SpawnProcess) -> Any:
    """What a process tells: how far it is, what it made, or why it could not, which is raised."""
    try:
        told = there.recv()
    except EOFError:
        process.join()
        raise PortnormError(f"the process that trained the {name} ended with {process.exitcode}") from None
    if isinstance(told, Exception):
        raise told
    return told


def _train_one(name: str, budget: Budget, tell: Connection) -> None:
    """Train one model, and tell how far it is; then the model, its losses and the seconds it took."""
    try:
        data, _ = sequential_digits()
        model = _warmed(classifier(MODELS[name], 1, budget.hidden, 10, data.x.shape[0], budget.seed))

        def report(done: int, total: int, loss: float) -> None:
            if done % 5 == 0 or done == total:
                tell.send((done, total, loss))

        started = time.perf_counter()
        history = train(
            model,
            data,
            Adam(budget.lr),
            epochs=budget.epochs,
            batch=budget.batch,
            clip=budget.clip,
            state_noise=budget.state_noise if MODELS[name] == "batch" else 0.0,
            seed=budget.seed,
            progress=report,
        )
        tell.send((model, history.losses, time.perf_counter() - started))
    except Exception as error:
        tell.send(error)


def _warmed(model: Layer) -> Layer:
    """The model, after all kernels for it are there: one that comes on the way rounds otherwise, and no two runs would be alike."""
    importlib.import_module("portnorm_backends.cpu.warming").warm(model)
    return model


def _checkpoint(name: str, out: Path) -> Path:
    return out / f"{name.lower()}.safetensors"


def _export(name: str, losses: list[float], seconds: float, out: Path) -> Result:
    from portnorm_onnx.export import export
    from portnorm_onnx.runtimes import session_of

    _, held_out = sequential_digits()
    model, path = _warmed(load(_checkpoint(name, out))), out / f"{name.lower()}.onnx"
    report = export(model, path)
    small = path.with_suffix(".int8.onnx")
    export(model, small, quantize="int8")

    def runner(file: Path) -> Any:
        session = session_of("onnxruntime", file.read_bytes())
        return lambda x, _: session({"x": x, "lengths": numpy.full(x.shape[1], x.shape[0])})["y"]

    run_graph = runner(path)
    differences = [float(numpy.max(numpy.abs(run_graph(x, None) - model(x)[0]))) for x, _ in held_out.batches(500)]
    eager = predictions(lambda x, lengths: model(x)[0], held_out)
    rounded = predictions(runner(small), held_out)
    return Result(
        model=name,
        test_accuracy=accuracy(model, held_out),
        loss_by_thirds=History(losses).by_thirds(),
        nodes=report.nodes,
        scan_nodes=sum(report.body_nodes),
        worst_difference=max(differences),
        equal_predictions=float(numpy.mean(predictions(run_graph, held_out) == eager)),
        worst_one_step_difference=report.worst_step or 0.0,
        integers_accuracy=float(numpy.mean(rounded == held_out.labels)),
        integers_equal=float(numpy.mean(rounded == eager)),
        integers_size=small.stat().st_size / path.stat().st_size,
        export_seconds=report.seconds,
        training_seconds=seconds,
        losses=losses,
    )


def _draw(results: list[Result], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for r in results:
        window = max(1, len(r.losses) // 30)
        smooth = numpy.convolve(r.losses, numpy.ones(window) / window, mode="valid")
        (line,) = axes.plot(numpy.arange(len(smooth)) + window, smooth, label=f"{r.model}: {r.test_accuracy:.1%} on held-out digits")
        axes.plot(numpy.arange(len(r.losses)) + 1, r.losses, color=line.get_color(), alpha=0.15, linewidth=0.8)
    axes.set(xlabel="updates", ylabel="training loss (nats)", title="Handwritten digits, one pixel per step (64 steps)", ylim=(0, None))
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    with written_whole(path) as file:
        figure.savefig(file, format="png", dpi=150)


def _print(results: list[Result], out: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Handwritten digits, one pixel per step (64 steps)")
    table.add_column("model", no_wrap=True)
    for column in ("accuracy", "loss ⅓ · ⅔ · end", "nodes", "max |Δ|", "equal", "int8"):
        table.add_column(column, justify="right", no_wrap=True)
    for r in results:
        losses = " · ".join(f"{loss:.2f}" for loss in r.loss_by_thirds)
        nodes = f"{r.nodes} + {r.scan_nodes}"
        numbers = f"{r.worst_difference:.1e}", f"{r.equal_predictions:.1%}", f"{r.integers_accuracy:.1%}"
        table.add_row(r.model, f"{r.test_accuracy:.1%}", losses, nodes, *numbers)
    console = Console()
    console.print(table)
    console.print(
        "accuracy: on held-out digits. loss: in nats, after each third of the budget.\n"
        "nodes: of the ONNX graph + inside its Scan. max |Δ|: largest difference of a\n"
        "logit between NumPy and onnxruntime, over all held-out digits. equal: share of\n"
        "them for which both name the same class. int8: accuracy of the graph that has\n"
        "integers for weights.",
        highlight=False,
        style="dim",
    )
    files = ", ".join(sorted(p.name for p in out.iterdir() if p.is_file()))
    console.print(f"{out}/: {files}", highlight=False)
