"""Symbolic arrays: a graph of ONNX nodes that grows as Array API code runs on it.

An array is a graph input, a constant (it holds a NumPy array), or an output of a node. Nothing has a name and nothing belongs to a
model until `build.py` collects what the outputs need; so whatever is not needed is not there. Each node's result type is inferred by
onnx's own schema the moment it is made: a mistake fails on the line that makes it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar, NoReturn, TypeAlias

import numpy
import onnx
from onnx import helper

from portnorm.errors import ExportError, UnsupportedError
from portnorm_onnx.targets import TARGETS, Target

NumPyArray: TypeAlias = "numpy.ndarray[Any, Any]"
_serial = itertools.count()


@dataclass(frozen=True, eq=False)
class Opset:
    """The operator set a graph is written for, and the table of how operations become its nodes."""

    version: int
    rows: dict[str, Any] = field(repr=False)
    target: Target = TARGETS["portable"]
    fold: bool = False
    """Whether what is known before the graph runs is folded away."""
    final_state: bool = True
    """Whether somebody wants the states after the last step."""
    accurate: bool = False
    """Whether input with |mean| ≫ std is centred before an operator that cancels."""
    unroll: bool = False
    """Whether every step of a loop is written out."""
    trainable: bool = False
    """Whether parameters are inputs of the nodes as they are, and operators give out what their gradients take."""
    written: list[int] = field(default_factory=list, repr=False)
    """How many nodes each of the loops so far is when it is written out."""


@dataclass(eq=False)
class Node:
    """One ONNX node: operator, inputs (`None` where an optional one is left out), attributes, and a body for `Scan`."""

    op_type: str
    inputs: tuple[SymbolicArray | None, ...]
    attributes: dict[str, Any]
    outputs: tuple[SymbolicArray, ...] = ()
    body: Body | None = None
    domain: str = ""
    """Whose operator it is; "" for ONNX's own."""
    serial: int = field(default_factory=lambda: next(_serial))


@dataclass(eq=False)
class Body:
    """The graph inside a `Scan`."""

    inputs: tuple[SymbolicArray, ...]
    """The states, then one step of every scanned input."""
    outputs: tuple[SymbolicArray, ...]
    """The new states, then what is stacked."""
    states: int
    reverse: bool
    """Whether the loop goes from the last step to the first."""
    first_serial: int
    """Nodes made before this one belong to the graph outside."""


class Dim:
    """A length that is not known until the graph runs. Arithmetic gives an array without axes; equal if the names are."""

    def __init__(self, name: str, array: SymbolicArray, axis: int):
        self.name, self.array, self.axis = name, array, axis

    def vector(self) -> SymbolicArray:
        """The length as an array (1,)."""
        return node("Shape", self.array, start=self.axis, end=self.axis + 1)

    def scalar(self) -> SymbolicArray:
        """The length as an array ()."""
        return node("Squeeze", self.vector(), constant(numpy.array([0])))

    def number(self) -> SymbolicArray:
        """The length as an array () to compute with; where a runtime cannot give out what is made of lengths, a sum of so many ones."""
        if self.array.opset is None or self.array.opset.target.length_outputs:
            return self.scalar()
        ones = node("ConstantOfShape", self.vector(), value=onnx.numpy_helper.from_array(numpy.array([1])))
        return node("ReduceSum", ones, keepdims=0)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Dim) and other.name == self.name

    def __hash__(self) -> int:
        return hash(self.name)

    def __repr__(self) -> str:
        return self.name

    def __sub__(self, other: Any) -> SymbolicArray:
        return self.scalar()._call("subtract", other)

    def __mul__(self, other: Any) -> SymbolicArray:
        return self.scalar()._call("multiply", other)

    __rmul__ = __mul__


Shape: TypeAlias = "tuple[int | Dim, ...]"


def dims_of(shape: Iterable[Any]) -> tuple[int | str, ...]:
    """A shape with names for the lengths that are not known."""
    return tuple(d.name if isinstance(d, Dim) else d for d in shape)


@dataclass(eq=False)
class SymbolicArray:
    """An array of the standard whose values are computed by the ONNX graph; `constant` holds the values that are known already."""

    dtype: Any
    dims: tuple[int | str, ...]
    opset: Opset | None = None
    producer: Node | None = None
    constant: NumPyArray | None = None
    name: str | None = None
    serial: int = field(default_factory=lambda: next(_serial))
    affine: Any = None
    """The product that it is, where that is known (`fold.py`)."""
    linear_of: Any = None
    """(x, weight, bias) where it is that linear map of parameters that are trained."""
    rows_of: Any = None
    """(table, rows) where it is rows of a constant table."""
    shaped_as: SymbolicArray | None = None
    """What has the same shape and is there in any case: then only who asks for values needs the array itself."""
    integers: Any = None
    """What it is the product of, where it is a grid of numbers that stand for integers (`integers.py`)."""
    step_of: Any = None
    """(loop, scanned input) where it is one step of that."""
    namespace: ClassVar[Any] = None
    """The functions over symbolic arrays, which are made of these arrays: `namespace.py` puts them here."""

    @property
    def shape(self) -> Shape:
        source = self if self.shaped_as is None else self.shaped_as
        return tuple(Dim(d, source, axis) if isinstance(d, str) else d for axis, d in enumerate(self.dims))

    @property
    def ndim(self) -> int:
        return len(self.dims)

    @property
    def device(self) -> str:
        return "symbolic"

    def __array_namespace__(self, api_version: str | None = None) -> Any:
        return self.namespace

    def __getitem__(self, key: Any) -> SymbolicArray:
        return self._call("getitem", key)

    def _call(self, name: str, *args: Any) -> SymbolicArray:
        result: SymbolicArray = getattr(self.__array_namespace__(), name)(self, *args)
        return result

    def __add__(self, other: Any) -> SymbolicArray:
        return self._call("add", other)

    def __sub__(self, other: Any) -> SymbolicArray:
        return self._call("subtract", other)

    def __mul__(self, other: Any) -> SymbolicArray:
        return self._call("multiply", other)

    def __truediv__(self, other: Any) -> SymbolicArray:
        return self._call("divide", other)

    def __floordiv__(self, other: Any) -> SymbolicArray:
        """Of floats; schedules of a learning rate go down by it."""
        quotient: SymbolicArray = self / other
        return quotient._call("floor")

    def __rsub__(self, other: Any) -> SymbolicArray:
        return _as_array(other, self) - self

    def __rtruediv__(self, other: Any) -> SymbolicArray:
        return _as_array(other, self) / self

    __radd__, __rmul__ = __add__, __mul__

    def __pow__(self, other: Any) -> SymbolicArray:
        return self._call("pow", other)

    def __rpow__(self, other: Any) -> SymbolicArray:
        result: SymbolicArray = self.__array_namespace__().pow(_as_array(other, self), self)
        return result

    def __neg__(self) -> SymbolicArray:
        return self._call("negative")

    def __lt__(self, other: Any) -> SymbolicArray:
        return self._call("less", other)

    def __gt__(self, other: Any) -> SymbolicArray:
        return self._call("greater", other)

    def __ge__(self, other: Any) -> SymbolicArray:
        return self._call("greater_equal", other)

    def __le__(self, other: Any) -> SymbolicArray:
        return self._call("less_equal", other)

    def __and__(self, other: Any) -> SymbolicArray:
        return self._call("logical_and", other)

    def __bool__(self) -> NoReturn:
        raise ExportError("a value that is only known when the graph runs was asked for while it is made")

    def __iter__(self) -> NoReturn:
        raise ExportError("an array of the exporter cannot be iterated over; its length may be unknown")

    def __repr__(self) -> str:
        return f"SymbolicArray({self.name or ''}{list(self.dims)}, {self.dtype})"


def constant(values: Any, name: str | None = None) -> SymbolicArray:
    """An array whose values are known; it becomes an initializer, named if `name` is given."""
    values = numpy.asarray(values)
    return SymbolicArray(values.dtype, values.shape, constant=values, name=name)


def graph_input(name: str, dtype: Any, dims: tuple[int | str, ...], opset: Opset) -> SymbolicArray:
    """An input of the graph; lengths that are strings are known only when it runs."""
    return SymbolicArray(numpy.dtype(dtype), dims, opset, name=name)


def opset_of(*arrays: Any) -> Opset | None:
    """The operator set that arrays were made for; `None` if all are constants."""
    return next((a.opset for a in arrays if isinstance(a, SymbolicArray) and a.opset is not None), None)


def node(op_type: str, *inputs: SymbolicArray | None, **attributes: Any) -> SymbolicArray:
    """A node with one output."""
    return nodes(op_type, 1, *inputs, **attributes)[0]


def nodes(
    op_type: str, count: int, *inputs: SymbolicArray | None, dims: tuple[int | str, ...] | None = None, **attributes: Any
) -> tuple[SymbolicArray, ...]:
    """A node with `count` outputs. `dims` states the first output's shape where inference cannot know it."""
    opset = opset_of(*inputs)
    if opset is None:
        raise UnsupportedError(f"{op_type} of constants alone: compute it with NumPy instead")
    made = Node(op_type, inputs, attributes)
    made.outputs = tuple(
        SymbolicArray(dtype, shape if dims is None else dims, opset, producer=made)
        for dtype, shape in _inferred(op_type, count, inputs, attributes, opset.version)
    )
    return made.outputs


def reduction(op_type: str, x: SymbolicArray, axes: tuple[int, ...], *, keepdims: int = 0) -> SymbolicArray:
    """A node that takes axes away, or leaves a length of 1. They became an input at opset 18, those of a sum before."""
    opset = opset_of(x)
    if opset is not None and opset.version < 18 and op_type != "ReduceSum":
        return node(op_type, x, axes=axes, keepdims=keepdims)
    return node(op_type, x, constant(numpy.array(axes, dtype=numpy.int64)), keepdims=keepdims)


def foreign_node(domain: str, op_type: str, *inputs: SymbolicArray, like: SymbolicArray, features: int, **attributes: Any) -> SymbolicArray:
    """A node of an operator that is not ONNX's own, whose output has the shape and type of `like` but for the last length."""
    made = Node(op_type, inputs, attributes, domain=domain)
    made.outputs = (SymbolicArray(like.dtype, (*like.dims[:-1], features), opset_of(*inputs), producer=made),)
    return made.outputs[0]


def _inferred(
    op_type: str, count: int, inputs: tuple[SymbolicArray | None, ...], attributes: dict[str, Any], version: int
) -> list[tuple[Any, tuple[int | str, ...]]]:
    """Types of the outputs by onnx's own inference; a length that it cannot name gets a name of its own."""
    names = ["" if a is None else f"i{k}" for k, a in enumerate(inputs)]
    proto = helper.make_node(op_type, names, [f"o{k}" for k in range(count)], **attributes)
    known = {name: a for name, a in zip(names, inputs, strict=True) if a is not None}
    data = {n: onnx.numpy_helper.from_array(a.constant) for n, a in known.items() if a.constant is not None and a.constant.size < 64}
    try:
        types = onnx.shape_inference.infer_node_outputs(
            onnx.defs.get_schema(op_type, version, ""),
            proto,
            {name: type_of(a) for name, a in known.items()},
            data,
            opset_imports=[helper.make_opsetid("", version)],
            ir_version=8,
        )
    except (onnx.shape_inference.InferenceError, onnx.checker.ValidationError, onnx.defs.SchemaError) as error:
        raise ExportError(f"{op_type} at opset {version} does not take {[a for a in inputs if a is not None]}: {error}") from error
    return [_read_type(types[f"o{k}"]) for k in range(count)]


def type_of(a: SymbolicArray) -> onnx.TypeProto:
    """The ONNX type of an array."""
    return helper.make_tensor_type_proto(helper.np_dtype_to_tensor_dtype(numpy.dtype(a.dtype)), list(a.dims))


def _read_type(proto: onnx.TypeProto) -> tuple[Any, tuple[int | str, ...]]:
    tensor = proto.tensor_type
    dims = tuple(d.dim_value if d.HasField("dim_value") else d.dim_param or f"unknown_{next(_serial)}" for d in tensor.shape.dim)
    return helper.tensor_dtype_to_np_dtype(tensor.elem_type), dims


def _as_array(value: Any, like: SymbolicArray) -> SymbolicArray:
    return value if isinstance(value, SymbolicArray) else constant(numpy.asarray(value, dtype=like.dtype))
