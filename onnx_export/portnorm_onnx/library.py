"""How portnorm's seam sees symbolic arrays: as one more array library, whose kernels are the rows of the lowering table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from portnorm.arrays import Kernel, Library, leaves
from portnorm.op import OPS
from portnorm_onnx.lowering import CONSTANTS, OPSETS, RESIDUALS, VJPS, Looked
from portnorm_onnx.symbolic import SymbolicArray, opset_of


class _Rows(Mapping[str, Kernel]):
    """Ops with a row at any opset; the row used is that of the arrays' own opset, and the definition is traced where it has none."""

    def __init__(self) -> None:
        self._kernels = {name: _kernel(name) for rows in OPSETS.values() for name in rows}

    def __getitem__(self, name: str) -> Kernel:
        return self._kernels[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._kernels)

    def __len__(self) -> int:
        return len(self._kernels)


def _kernel(name: str) -> Kernel:
    def row(args: Any) -> Any:
        opset = opset_of(*leaves(args))
        return CONSTANTS.get(name) if opset is None else opset.rows.get(name)

    def accepts(*args: Any, **attrs: Any) -> bool:
        found = row(args)
        return found is not None and getattr(found, "accepts", lambda *a, **k: True)(*args, **attrs)

    def call(*args: Any, **attrs: Any) -> Any:
        return row(args)(*args, **attrs)

    def forward(*args: Any, **attrs: Any) -> tuple[Any, Any]:
        # The residuals are those of the definition, or what the row says. Where nothing needs them, they vanish.
        y, own = call(*args, **attrs), RESIDUALS.get(name)
        return y, own(y, *args) if own is not None else OPS[name].definition(*args, **attrs)[1]

    return Kernel(call=call, forward=forward, accepts=accepts, vjp=VJPS.get(name), residuals=Looked if name == "embedding" else None)


def _is_concrete(x: Any) -> bool:
    return not isinstance(x, SymbolicArray) or x.constant is not None


LIBRARY = Library("portnorm_onnx", kernels=_Rows(), is_concrete=_is_concrete)
