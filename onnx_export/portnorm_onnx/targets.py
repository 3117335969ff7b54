"""What a graph may use so that a runtime runs it, and runs it right: one row per target.

Each reason was measured with the versions named in docs/runtimes.md, or is the runtime's documentation where that is said.
"""

from __future__ import annotations

from dataclasses import dataclass

from portnorm.errors import UnsupportedError


@dataclass(frozen=True)
class Target:
    """Who runs the graph, and what it must not meet."""

    name: str
    runtimes: tuple[str, ...]
    """Adapters of `portnorm verify` that stand for this target."""
    last_opset: int = 26
    fused: bool = True
    """Plain cells are the operators LSTM, GRU and RNN, not a loop."""
    fused_lengths: bool = False
    """These operators may take `sequence_lens`."""
    peepholes: bool = False
    """The LSTM operator may have peepholes."""
    without: frozenset[str] = frozenset()
    """Operators that are traced instead."""
    dtypes: tuple[str, ...] = ("float16", "float32")
    """Types that every runtime of the target computes in."""
    reason: str = ""


_LENGTHS = "sequence_lens gives wrong values in OpenVINO, and tract does not take it"

TARGETS: dict[str, Target] = {
    row.name: row
    for row in (
        Target(
            "portable",
            ("onnxruntime", "openvino", "tract", "web"),
            dtypes=("float16", "float32", "float64"),
            reason=f"what all runtimes here do alike; {_LENGTHS}; OpenVINO's peepholes are off by 5e-3",
        ),
        Target(
            "onnxruntime",
            ("onnxruntime",),
            fused_lengths=True,
            peepholes=True,
            dtypes=("float16", "float32", "float64"),
            reason="has every operator used here; the last opset that it loads is 26",
        ),
        Target(
            "openvino",
            ("openvino",),
            dtypes=("float16", "bfloat16", "float32"),
            reason="sequence_lens gives wrong values, peepholes are off by 5e-3, float64 is computed in float32",
        ),
        Target(
            "tract", ("tract",), dtypes=("float16", "float32"), reason="aborts on sequence_lens; norms in float64 are computed in float32"
        ),
        Target(
            "web",
            ("web",),
            fused_lengths=True,
            peepholes=True,
            dtypes=("float16", "float32", "float64"),
            reason="onnxruntime's CPU kernels, compiled to WebAssembly",
        ),
        Target(
            "tensorrt",
            ("onnxruntime",),
            last_opset=22,
            without=frozenset({"RMSNormalization", "InstanceNormalization"}),
            dtypes=("float16", "bfloat16", "float32"),
            reason="by its documentation (10.x), not run here; RMSNormalization only from 10.15 on",
        ),
    )
}


def target_of(name: str) -> Target:
    """The row of a target; raises `UnsupportedError`."""
    if name not in TARGETS:
        raise UnsupportedError(f"`target` is {name!r}; expected one of {', '.join(TARGETS)}")
    return TARGETS[name]
