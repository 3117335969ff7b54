"""A run of training as one value, and as a file: the model with what its next update hangs on, so that a stopped run can be taken up."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy

from portnorm.arrays import Array, DType, to_numpy, xp_of
from portnorm.dtypes import default_integer, dtype_name, is_kind, load_dtype
from portnorm.errors import CheckpointError, DTypeError, PortnormError, UnsupportedError
from portnorm.layers.initial import Generator, generator
from portnorm.layers.layer import Layer
from portnorm.layers.sequential import Sequential
from portnorm.optimizers import OPTIMIZERS, Optimizer
from portnorm.scalars import switch, whole_number
from portnorm.updates import Arrays, OptimizerState, weights_only

TRAINING_KEY = "portnorm.training"
"""Under which the metadata of a file says what it holds beside the model."""

_TRAINED = "trained"
"""Under which it says which arrays training goes on from, where these are not the model's in the file."""

_OWN = {c.__name__: c for c in OPTIMIZERS.values()}
_BITS = ("PCG64", "PCG64DXSM", "MT19937", "Philox", "SFC64")
"""NumPy's bit generators, by the names that their states say."""
_FUNCTIONS = {"weights_only": weights_only}
"""Functions that a file can name."""

NumPyArray = numpy.ndarray[Any, Any]
NumPyArrays = dict[str, NumPyArray]


@dataclass
class Training:
    """A model in training, with what its next update depends on: the optimizer and its state, the number of updates, a generator.

    `pn.save(training, path)` writes all of it as one safetensors file, complete or not at all, and `pn.load(path, training=True)` gives it
    back, bit by bit, so that a run that was stopped goes on as if it had not been; `pn.load(path)` gives the model alone. Without `state`
    it starts with that of `optimizer.init`; `rng` is a seed or a NumPy generator, which is yours to draw from: the order of cases, dropout.
    `notes` are of what JSON has, and arrays, for all else that a run keeps, such as curves. `result`, parameters and buffers by name, is
    the model that `pn.load(path)` gives where training goes on from another: the best so far, say. An update forgets it.
    Functions are in no file: give an optimizer with a schedule again, and set a layer's `reduce` again.
    Raises `UnsupportedError` for what is no layer, and for what is no optimizer.

    >>> import numpy as np, portnorm as pn, tempfile, os
    >>> model = pn.Sequential(pn.GRU(2, 4, return_sequences=False, rng=0), pn.Linear(4, 1, rng=1))
    >>> run = pn.Training(model, pn.AdamW(1e-2), rng=0)
    >>> def update(run):
    ...     x = run.rng.standard_normal((5, 8, 2), dtype="float32")  # (time, batch, features)
    ...     y, _, pullback = run.model.vjp(x, training=True)
    ...     loss, loss_pullback = pn.vjp(pn.mean_squared_error, y, x.sum(axis=0)[:, :1])
    ...     _, _, grads = pullback(loss_pullback(np.float32(1))[0])
    ...     run.update(grads)
    ...     return float(loss)
    >>> losses = [update(run) for _ in range(3)]
    >>> path = os.path.join(tempfile.mkdtemp(), "run.safetensors")
    >>> pn.save(run, path)
    >>> same = pn.load(path, training=True)
    >>> same.step, [update(run) for _ in range(3)] == [update(same) for _ in range(3)]
    (3, True)
    """

    model: Layer
    optimizer: Optimizer
    state: OptimizerState | None = None
    step: int = 0
    rng: Any = None
    notes: dict[str, Any] = field(default_factory=dict)
    result: tuple[Arrays, Arrays] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.model, Layer):
            raise UnsupportedError(f"`model` is a {type(self.model).__name__}; expected a layer of portnorm")
        if not callable(getattr(self.optimizer, "update", None)) or not callable(getattr(self.optimizer, "init", None)):
            raise UnsupportedError(f"`optimizer` is a {type(self.optimizer).__name__}; expected one such as portnorm.Adam(1e-3)")
        if isinstance(self.optimizer, type):
            raise UnsupportedError(
                f"`optimizer` is the class {self.optimizer.__name__}; expected one that was made, {self.optimizer.__name__}()"
            )
        self.step = whole_number("step", self.step, 0)
        self.rng: Generator = generator(self.rng)
        if self.state is None:
            self.state = self.optimizer.init(self.model.parameters())

    def update(self, grads: Mapping[str, Array], *, in_place: bool = False) -> None:
        """One update of the model by gradients of its parameters, as `model.vjp`'s pullback gives them. Raises as the optimizer does.

        `in_place` writes into the arrays that the model and the state have: whoever else holds them sees them change.
        """
        assert self.state is not None
        how = {"in_place": True} if switch("in_place", in_place) else {}  # which an optimizer of somebody need not know
        params, state = self.optimizer.update(self.model.parameters(), grads, self.state, **how)
        self.model.assign(params)
        self.state, self.step, self.result = state, self.step + 1, None


# -- to a file -----------------------------------------------------------------------------------------------------------------------------


def given_out(run: Training) -> Arrays:
    """The arrays that a file of the run has as its model's: those of `result`, where there is one."""
    if run.result is None:
        return run.model.state_dict()
    run.model.copy().assign(*run.result)  # raises where they are not those of the model
    params, buffers = run.result
    return {**params, **buffers}


def described(run: Training, arrays: NumPyArrays) -> str:
    """What a file says of a run beside its model; its own arrays join `arrays`. Raises `CheckpointError` for what no file can hold."""
    model, found = run.model.state_dict(), given_out(run)
    other = any(a is not found[name] for name, a in model.items())
    about = {
        "version": 1,
        "optimizer": settings(run.optimizer),
        "state": _tree(run.state, "optimizer", arrays),
        "step": run.step,
        "rng": drawn_from(run.rng),
        "notes": _tree(run.notes, "notes", arrays),
        "evaluates": [layer.evaluates for layer in inside(run.model)],
        **({_TRAINED: _tree(model, _TRAINED, arrays)} if other else {}),
    }
    return json.dumps(about)


def inside(layer: Layer) -> Iterator[Layer]:
    """The layer and all inside it, containers too."""
    yield layer
    if isinstance(layer, Sequential):
        for part in layer.parts:
            yield from inside(part)


def settings(optimizer: Optimizer) -> dict[str, Any]:
    """The class of an optimizer, and its settings where it is one of ours; functions by name, or as something that has to be given."""
    kind = type(optimizer).__name__
    if type(optimizer) is not _OWN.get(kind):
        return {"type": kind, "missing": "all"}
    values: dict[str, Any] = {f.name: getattr(optimizer, f.name) for f in dataclasses.fields(optimizer)}  # type: ignore[arg-type]
    named = {name: {"function": known} for name, v in values.items() for known, f in _FUNCTIONS.items() if v is f}
    missing = [name for name, v in values.items() if callable(v) and name not in named]
    return {"type": kind, "config": {name: v for name, v in values.items() if name not in missing} | named, "missing": missing}


def _tree(tree: Any, path: str, arrays: NumPyArrays) -> Any:
    """`tree` for JSON, with each array in its place named; the arrays join `arrays`."""
    if isinstance(tree, Mapping):
        if not all(isinstance(name, str) for name in tree):
            raise CheckpointError(f"`{path}` has the keys {list(tree)}; expected strings")
        return {"dict": {name: _tree(branch, f"{path}.{name}", arrays) for name, branch in tree.items()}}
    if isinstance(tree, list | tuple):
        return {"list": [_tree(branch, f"{path}.{k}", arrays) for k, branch in enumerate(tree)], "tuple": isinstance(tree, tuple)}
    if tree is None or isinstance(tree, bool | int | float | str):
        return {"value": _json(tree, path)}
    try:
        xp = xp_of(tree)
        kind = dtype_name(xp, tree.dtype) if is_kind(xp, tree.dtype, "real floating") else ""
    except (TypeError, DTypeError):
        raise CheckpointError(
            f"`{path}` is a {type(tree).__name__}, which no file can hold; expected dicts, lists, numbers, strings and arrays"
        ) from None
    name = path
    while name in arrays:
        name += "_"
    arrays[name] = to_numpy(tree)
    return {"array": name, "dtype": kind}


def _json(value: Any, path: str) -> Any:
    """`value` as JSON has it: NumPy's numbers and arrays in it become lists."""
    if isinstance(value, dict):
        return {name: _json(v, f"{path}.{name}") for name, v in value.items()}
    if isinstance(value, numpy.ndarray):
        return {"words": value.tolist(), "dtype": value.dtype.name}
    return value.item() if isinstance(value, numpy.generic) else value


def drawn_from(rng: Generator) -> Any:
    """The state of a generator, as JSON has it. Raises `CheckpointError` for one that is not NumPy's own."""
    state = dict(rng.bit_generator.state)
    if state.get("bit_generator") not in _BITS:
        raise CheckpointError(f"`rng` draws from {type(rng.bit_generator).__name__}; expected one of NumPy's own: {', '.join(_BITS)}")
    return _json(state, "rng")


# -- from a file ---------------------------------------------------------------------------------------------------------------------------


def parted(arrays: NumPyArrays, metadata: Mapping[str, str], path: str | os.PathLike[str]) -> tuple[NumPyArrays, NumPyArrays, Any]:
    """The arrays of the model, those beside it, and what the metadata says of them (`None` in a file of a model alone)."""
    if TRAINING_KEY not in metadata:
        return arrays, {}, None
    try:
        about = json.loads(metadata[TRAINING_KEY])
        trees = (about["state"], about["notes"], *([about[_TRAINED]] if _TRAINED in about else []))
        beside = {name for tree in trees for name in _named(tree)}
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{os.fspath(path)!r} is damaged: what it says of its training is not understood ({error!r})") from None
    missing = sorted(name for name in beside if name not in arrays)
    if missing:
        raise CheckpointError(f"{os.fspath(path)!r} is damaged: it says that it holds {missing[0]!r}, which is not there")
    return {n: a for n, a in arrays.items() if n not in beside}, {n: arrays[n] for n in beside}, about


def _named(tree: Any) -> list[str]:
    """The arrays that a tree names."""
    if "array" in tree:
        return [str(tree["array"])]
    branches = tree["dict"].values() if "dict" in tree else tree.get("list", ())
    return [name for branch in branches for name in _named(branch)]


def loaded(
    model: Layer, beside: NumPyArrays, about: Any, optimizer: Optimizer | None, dtype: DType | None, path: str | os.PathLike[str]
) -> Training:
    """The run of `model`, which was loaded already. Raises `CheckpointError` where the file is not understood, or `optimizer` is needed."""
    try:
        for layer, evaluates in zip(inside(model), about["evaluates"], strict=True):
            layer.evaluates = switch("evaluates", evaluates)
        result = None
        if _TRAINED in about:
            result = model.parameters(), dict(model.buffers)
            model.load_state_dict({name: beside[branch["array"]] for name, branch in about[_TRAINED]["dict"].items()})
        return Training(
            model,
            optimizer or _made(about["optimizer"], path),
            _grown(about["state"], _placed(model, beside, dtype)),
            int(about["step"]),
            _drawn(about["rng"]),
            _grown(about["notes"], _placed(model, beside, None)),
            result,
        )
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        if isinstance(error, CheckpointError):
            raise
        if isinstance(error, PortnormError):
            raise CheckpointError(f"{os.fspath(path)!r}: {error}") from error
        raise CheckpointError(f"{os.fspath(path)!r} is damaged: what it says of its training is not understood ({error!r})") from None


def _made(settings: Any, path: str | os.PathLike[str]) -> Any:
    kind, missing = settings["type"], settings["missing"]
    if missing:
        what = (
            f"is a {kind}, which is none of portnorm's"
            if missing == "all"
            else f"has a function for {', '.join(f'`{n}`' for n in missing)}"
        )
        raise CheckpointError(
            f"the optimizer of {os.fspath(path)!r} {what}, and functions are in no file; give it again: load(…, optimizer=…)"
        )
    if kind not in _OWN:
        raise CheckpointError(f"{os.fspath(path)!r} names the optimizer {kind!r}; expected one of {', '.join(_OWN)}")
    return _OWN[kind](**{n: _FUNCTIONS[v["function"]] if isinstance(v, dict) else v for n, v in settings["config"].items()})


def _placed(model: Layer, beside: NumPyArrays, dtype: DType | None) -> Callable[[str, str], Array]:
    """Makes an array of the file one of the model's library, where it is: of its own type, or as wide as a model of `dtype` asks for."""

    def place(name: str, kind: str) -> Array:
        a, xp = beside[name], model.xp
        if not kind:
            wanted = default_integer(xp) if a.dtype == numpy.int64 else load_dtype(xp, a.dtype.name)
            return xp.asarray(a, dtype=wanted, device=model.device)
        of_file = load_dtype(xp, kind)
        return xp.asarray(a, dtype=of_file if dtype is None else model._dtype_of(statistic=True), device=model.device)

    return place


def _grown(tree: Any, place: Callable[[str, str], Array]) -> Any:
    """The tree that `_tree` has described."""
    if "array" in tree:
        return place(tree["array"], tree["dtype"])
    if "dict" in tree:
        return {name: _grown(branch, place) for name, branch in tree["dict"].items()}
    if "list" in tree:
        found = [_grown(branch, place) for branch in tree["list"]]
        return tuple(found) if tree["tuple"] else found
    return tree["value"]


def _drawn(state: Any) -> Generator:
    """The generator as it was."""
    kind = state["bit_generator"]
    if kind not in _BITS:
        raise CheckpointError(f"the file names the generator {kind!r}; expected one of {', '.join(_BITS)}")
    bits = getattr(numpy.random, kind)()
    bits.state = _words(state)
    return numpy.random.Generator(bits)


def _words(value: Any) -> Any:
    if isinstance(value, dict) and "words" in value:
        return numpy.asarray(value["words"], dtype=value["dtype"])
    return {name: _words(v) for name, v in value.items()} if isinstance(value, dict) else value
