"""CuPy: fused CUDA kernels (`cuda/`), compiled by NVRTC for the device of the arrays when a call first needs one.

Arrays stay on their device, kernels run on its current stream, and nothing here waits for the device.
"""

from __future__ import annotations

import importlib
from typing import Any

from portnorm.arrays import Kernel, Library, Namespace
from portnorm_backends.cuda import normalize, recurrent


class CuPyNamespace:
    """CuPy's functions of the Array API standard, with what its `isdtype` and `finfo` do not know of its arrays of ml_dtypes' bfloat16."""

    __name__ = "array_api_compat.cupy"

    def __init__(self) -> None:
        self.own: Namespace = importlib.import_module(self.__name__)

    def __getattr__(self, name: str) -> Any:
        if name == "own":
            raise AttributeError(name)
        found = getattr(self.own, name)
        setattr(self, name, found)
        return found

    def isdtype(self, dtype: Any, kind: Any) -> bool:
        """Whether `dtype` is of this kind, or of one of a tuple of kinds; bfloat16 is a real floating type."""
        kinds = kind if isinstance(kind, tuple) else (kind,)
        known = tuple(k for k in kinds if not _is_bfloat16(k))
        if not _is_bfloat16(dtype):
            return bool(self.own.isdtype(dtype, known))
        return len(known) < len(kinds) or any(isinstance(k, str) and k in ("real floating", "numeric") for k in known)

    def finfo(self, dtype: Any) -> Any:
        """The limits of a floating type."""
        return importlib.import_module("ml_dtypes").finfo(dtype) if _is_bfloat16(dtype) else self.own.finfo(dtype)


def _is_bfloat16(dtype: Any) -> bool:
    return getattr(dtype, "name", None) == "bfloat16"


LIBRARY = Library(
    "cupy",
    namespace=CuPyNamespace,
    to_numpy=lambda x: x.get(),
    kernels={
        "normalize": Kernel(
            call=lambda *args, **attrs: normalize.forward(*args, **attrs)[0],
            forward=normalize.forward,
            vjp=normalize.vjp,
            residuals=normalize.KernelResiduals,
            accepts=normalize.accepts,
        ),
        "scan": Kernel(
            call=lambda *args, **attrs: recurrent.forward(*args, **attrs)[0],
            forward=recurrent.forward,
            vjp=recurrent.vjp,
            residuals=recurrent.ScanKernelResiduals,
            accepts=recurrent.accepts,
        ),
    },
)
