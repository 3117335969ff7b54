"""What a graph may use so that a runtime runs it, and runs it right: one row per target.

Each reason was measured with the versions named in docs/runtimes.md, or is the runtime's documentation where that is said.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import onnx

from portnorm.errors import UnsupportedError


@dataclass(frozen=True)
class Target:
    """Who runs the graph, and what it must not meet."""

    name: str
    runtimes: tuple[str, ...]
    """Adapters of `portnorm verify` that stand for this target."""
    opset: int = 18
    """The one that is written unless another is asked for: the first in which everything needed has its present form."""
    last_opset: int = 26
    """The last that is known to be read; above 26 the installed onnxruntime, in which graphs are checked, has to load it too."""
    fused: bool = True
    """Plain cells are the operators LSTM, GRU and RNN, not a loop."""
    fused_lengths: bool = False
    """These operators may take `sequence_lens`."""
    fused_start: bool = False
    """These operators may leave out a first state of zeros."""
    captures: bool = False
    """The body of a loop may read what is computed outside of it."""
    late_terms: bool = False
    """What is pointwise in an input term, or a product of few inputs, is made in the loop, where it stays in the cache; else before."""
    functions: bool = False
    """These operators may have other functions than their own, HardSigmoid among them; else only GRU and RNN may, ReLU for tanh."""
    peepholes: bool = False
    """The LSTM operator may have peepholes."""
    loops: bool = True
    """There is a loop; else every step of a known number is written out."""
    as_loop: bool = False
    """Where the number of steps is open the loop is a Loop that takes its steps by Gather; else it is a Scan."""
    open_shapes: bool = True
    """Lengths may be open."""
    sequences: bool = True
    """Recurrent layers may take sequences; else there is a graph of one step."""
    batches: bool = True
    """There may be more sequences than one."""
    flat_states: bool = False
    """The states of a step are (batch, features), without an axis for the layers in front."""
    flat_steps: bool = False
    """A step has no axis for time inside of the graph."""
    scalars: bool = True
    """An input may have no axes; else a count has the shape (1,)."""
    resets_before: bool = True
    """The GRU operator may reset before the product (linear_before_reset=0)."""
    biased_norms: bool = False
    """LayerNormalization needs a bias."""
    one_axis: bool = False
    """LayerNormalization is of one axis."""
    broadcasts_to_maps: bool = False
    """What has a value for each row is only known to be such in images, where a constant of each channel is not: two BatchNormalizations
    stand for given statistics of images."""
    where_broadcasts: bool = True
    """The last input of Where may have fewer values than the result."""
    backward_slices: bool = True
    """A slice may go backward."""
    length_outputs: bool = True
    """A length may be an output of the graph."""
    identities: bool = True
    """An Identity may give an output; else what gives one may be read inside too."""
    wide_gains: bool = False
    """LayerNormalization may have a gain over more axes than it normalizes."""
    centred_weights: bool = False
    """The runtime takes LayerNormalization apart: of a product with weights these are centred, and the mean of its squares is enough."""
    output_rows: bool = False
    """Products with weights are Gemm, with a row of the weight for each output, as it is stored."""
    sums_in_order: frozenset[str] = frozenset()
    """Operators that add up a row one value after the other, which is not exact in `LONG` rows: what they normalize is centred before."""
    one_pass: frozenset[str] = frozenset()
    """Operators that take the variance as E[x²] − E[x]²: what they normalize is centred before."""
    narrow_statistics: frozenset[str] = frozenset()
    """Operators that take statistics in the type of the values, float16 too: these are converted before and after."""
    without: frozenset[str] = frozenset()
    """Operators that are traced instead."""
    lacks: frozenset[str] = frozenset()
    """Operators that a graph may not have, where no other can stand for them."""
    integers: tuple[str, ...] = ("int8",)
    """The products of integers that it has."""
    dtypes: tuple[str, ...] = ("float16", "float32")
    """Types that every runtime of the target computes in."""
    only: Mapping[str, frozenset[str]] = field(default_factory=dict)
    """By type: the operators that there are in it, where it is not all."""
    further: bool = False
    """Its runtime has an environment of its own, and is measured by `make runtimes-more`."""
    reason: str = ""


LONG = 1000
"""Values of a row from which on such a sum is no longer as good as two passes over pairs of values."""

_NARROW = frozenset({"InstanceNormalization"})
_OWN = frozenset({"LayerNormalization", "InstanceNormalization"})
_LENGTHS = "sequence_lens gives wrong values in OpenVINO, and tract does not take it"

TargetName = Literal[
    "portable",
    "onnxruntime",
    "openvino",
    "tract",
    "web",
    "tensorrt",
    "litert",
    "mnn",
    "ncnn",
    "iree",
    "tvm",
    "tinygrad",
    "c",
    "opencv",
    "onnx2pytorch",
]
"""The names that `target=` takes."""


def _further(name: str, **fields: Any) -> Target:
    """A runtime with an environment of its own, measured at opset 18 and in float32."""
    fields = {"last_opset": 18, "length_outputs": False, "integers": (), "dtypes": ("float32",), "further": True, **fields}
    return Target(name, (name,), **fields)


TARGETS: dict[str, Target] = {
    row.name: row
    for row in (
        Target(
            "portable",
            ("onnxruntime", "openvino", "tract", "web"),
            backward_slices=False,
            length_outputs=False,
            narrow_statistics=_NARROW,
            dtypes=("float16", "float32", "float64"),
            reason=f"what all runtimes here do alike; {_LENGTHS}; OpenVINO's peepholes are off by 5e-3, and its "
            "LayerNormalization takes no gain over more axes than it normalizes",
        ),
        Target(
            "onnxruntime",
            ("onnxruntime",),
            opset=23,
            last_opset=28,
            fused_lengths=True,
            fused_start=True,
            captures=True,
            late_terms=True,
            functions=True,
            peepholes=True,
            wide_gains=True,
            integers=("int8", "int4"),
            dtypes=("float16", "bfloat16", "float32", "float64"),
            only={"bfloat16": frozenset({"LayerNormalization"})},
            reason="has every operator used here, RMSNormalization from opset 23 on; 1.31 loads opsets up to 26, 1.32 up to 28",
        ),
        Target(
            "openvino",
            ("openvino",),
            last_opset=28,
            late_terms=True,
            fused_start=True,
            dtypes=("float16", "bfloat16", "float32"),
            reason="sequence_lens gives wrong values, peepholes are off by 5e-3, float64 is computed in float32; "
            "LayerNormalization takes no gain over more axes than it normalizes",
        ),
        Target(
            "tract",
            ("tract",),
            last_opset=28,
            backward_slices=False,
            length_outputs=False,
            wide_gains=True,
            sums_in_order=_OWN,
            narrow_statistics=_NARROW,
            reason="takes no sequence_lens that is not constant, and no backward slice of unknown length; one form of an "
            "operator ended its process and is never written; its Python interface gives out no lengths; no Sigmoid in float64; "
            "adds up the values of a row one after the other, and in float16 those of InstanceNormalization",
        ),
        Target(
            "web",
            ("web",),
            fused_lengths=True,
            fused_start=True,
            functions=True,
            peepholes=True,
            wide_gains=True,
            sums_in_order=_OWN,
            dtypes=("float16", "float32", "float64"),
            reason="onnxruntime's CPU kernels, compiled to WebAssembly; 1.30 loads no opset above 26, and its MatMulNBits rounds no "
            "input to integers; adds up the values of a row one after the other",
        ),
        Target(
            "tensorrt",
            ("onnxruntime",),
            last_opset=22,
            without=frozenset({"RMSNormalization", "InstanceNormalization"}),
            integers=(),
            dtypes=("float16", "bfloat16", "float32"),
            reason="by its documentation (10.x), not run here; RMSNormalization only from 10.15 on, no MatMulInteger",
        ),
        _further(
            "litert",
            loops=False,
            one_axis=True,
            open_shapes=False,
            scalars=False,
            backward_slices=False,
            sums_in_order=frozenset({"InstanceNormalization"}),
            flat_steps=True,
            centred_weights=True,
            without=frozenset({"BatchNormalization"}),
            reason="onnx2tf makes a file that cannot be loaded of what it does not have, and takes open lengths for 1; a backward slice "
            "is 1 to 2 off without an error; BatchNormalization is x·s + t, 1e-3 off at a mean of 10,000; InstanceNormalization "
            "adds up the values of a row one after the other",
        ),
        _further(
            "mnn",
            loops=False,
            fused_start=True,
            resets_before=False,
            where_broadcasts=False,
            backward_slices=False,
            sums_in_order=frozenset({"LayerNormalization"}),
            without=frozenset({"BatchNormalization"}),
            reason="without an error: sequence_lens and direction=reverse are ignored, linear_before_reset=0 is computed as 1, Where takes "
            "wrong values for a last input with fewer values; BatchNormalization is x·s + t, 1e-3 off at a mean of 10,000; "
            "LayerNormalization adds up the values of a row one after the other; no loop",
        ),
        _further(
            "ncnn",
            open_shapes=False,
            sequences=False,
            batches=False,
            flat_states=True,
            flat_steps=True,
            identities=False,
            biased_norms=True,
            one_axis=True,
            broadcasts_to_maps=True,
            fused=False,
            opset=23,
            last_opset=23,
            lacks=frozenset({"Gather", "Where"}),
            reason="has no batch, and no axis that stands for it but the first; LayerNormalization of one axis, with a bias; no Gather, "
            "which tables of statistics need; without an error: a mean of each row is subtracted from the wrong values but in images, a "
            "constant of each channel in images; BatchNormalization is x·s + t, 6e-4 off at a mean of 10,000; pnnx ends with exit status 0 "
            "and a file that cannot be loaded where an operator is lacking",
        ),
        _further(
            "iree",
            open_shapes=False,
            backward_slices=False,
            output_rows=True,
            sums_in_order=_OWN,
            reason="without an error: an open length comes out of a loop as 1, InstanceNormalization over an open axis is NaN, a backward "
            "slice is 1 to 6 off, sequence_lens is ignored; adds up the values of a row one after the other",
        ),
        _further(
            "tvm",
            fused=False,
            loops=False,
            sums_in_order=_OWN,
            reason="has neither loops nor LSTM, GRU and RNN; adds up the values of a row one after the other",
        ),
        _further(
            "tinygrad",
            fused=False,
            loops=False,
            scalars=False,
            sums_in_order=_OWN,
            reason="has neither loops nor LSTM, GRU and RNN; adds up the values of a row one after the other",
        ),
        _further(
            "c",
            open_shapes=False,
            backward_slices=False,
            flat_steps=True,
            output_rows=True,
            reason="emx-onnx-cgen takes fixed shapes, no slice that goes backward, and computes direction=reverse 0.5 off without an "
            "error; its MatMul goes along columns of the weight, which makes a step forty times as long when compiled by clang",
        ),
        _further(
            "opencv",
            as_loop=True,
            without=frozenset({"BatchNormalization", "RNN"}),
            one_pass=frozenset({"LayerNormalization", "InstanceNormalization"}),
            reason="takes variances in one pass, 4e-3 off at a mean of 100 standard deviations; BatchNormalization is x·s + t; without an "
            "error: sequence_lens, clip, direction=reverse and peepholes are ignored or wrong, and two states of a Loop that begin as one "
            "value are one; no Scan, no RNN",
        ),
        _further(
            "onnx2pytorch",
            fused_start=True,
            without=frozenset({"BatchNormalization"}),
            reason="a torch module, with gradients; takes no first state of an operator that is constant, and no peepholes",
        ),
    )
}


def target_of(name: str) -> Target:
    """The row of a target; raises `UnsupportedError`."""
    if not isinstance(name, str) or name not in TARGETS:
        raise UnsupportedError(f"`target` is {name!r}; expected one of {', '.join(TARGETS)}")
    return TARGETS[name]


def check_dtype(target: Target, dtype: str, where: str = "") -> None:
    """Raise `UnsupportedError` where the target does not compute in this type; `where` says what is of it."""
    if dtype not in target.dtypes:
        others = [repr(row.name) for row in TARGETS.values() if dtype in row.dtypes]
        raise UnsupportedError(
            f"`target` {target.name!r} does not compute in {dtype}{where} ({target.reason}); target={' or '.join(others)} does"
        )


def check_dims(target: Target, dims: Sequence[int | str], *, batch: int, time: int | None, streaming: bool) -> None:
    """Raise `UnsupportedError` where the target does not take an `x` of this shape, in which `batch` and `time` are axes."""
    given = [d for axis, d in enumerate(dims) if not (streaming and axis == time)]
    asked = ", ".join(str(d) if isinstance(d, int) else {"batch": "1", "time": "20"}.get(d, "16") for d in given)
    if time is not None and not (target.sequences or streaming):
        raise UnsupportedError(f"target {target.name!r} takes one step at a time; export with `streaming=True`, and feed the states back")
    if not target.open_shapes and any(isinstance(d, str) for d in given):
        names = ", ".join(repr(d) for d in given if isinstance(d, str))
        raise UnsupportedError(
            f"target {target.name!r} takes fixed shapes only; {names} of `x` is open: give numbers by `input_shape`, as ({asked})"
        )
    if not target.batches and time is not None and dims[batch] != 1:
        raise UnsupportedError(f"target {target.name!r} takes one sequence; `input_shape` has a batch of {dims[batch]!r}, expected 1")


def check_integers(target: Target, dtype: str, quantize: str) -> None:
    """Raise `UnsupportedError` where the target has no such products of integers, or the model is not float32 around them."""
    if quantize not in target.integers:
        others = [repr(row.name) for row in TARGETS.values() if quantize in row.integers]
        raise UnsupportedError(
            f"`quantize` is {quantize!r}: target {target.name!r} has no {_PRODUCTS[quantize]}; target={' or '.join(others)} has it"
        )
    if dtype != "float32":
        raise UnsupportedError(f"`quantize` of a graph in {dtype}; expected float32: convert with `dtype='float32'`")


_PRODUCTS = {"int8": "MatMulInteger", "int4": "MatMulNBits"}


def check_types(proto: onnx.ModelProto, target: Target, dtype: str) -> None:
    """Raise `UnsupportedError` for an operator that the target does not have in the graph's type, naming the node."""
    lacking = next((n for n in proto.graph.node if n.op_type in target.lacks), None)
    if lacking is not None:
        raise UnsupportedError(
            f"target {target.name!r} has no {lacking.op_type} (node {lacking.name!r}), which this model needs ({target.reason})"
        )
    allowed = target.only.get(dtype)
    for n in proto.graph.node if allowed is not None else ():
        if n.op_type not in allowed:  # type: ignore[operator]
            others = [repr(row.name) for row in TARGETS.values() if dtype in row.dtypes and dtype not in row.only]
            raise UnsupportedError(
                f"target {target.name!r} has no {n.op_type} in {dtype} (node {n.name!r}); target={' or '.join(others)} has it"
            )


def checker(proto: onnx.ModelProto, dtype: str) -> str:
    """The runtime that checks a graph: onnxruntime, or its stand-in for a type in which its CPU lacks operators."""
    only = TARGETS["onnxruntime"].only.get(dtype)
    return "onnxruntime" if only is None or all(n.op_type in only for n in proto.graph.node) else "rounded"
