"""CuPy: fused CUDA kernels (`cuda/`), compiled by NVRTC for the device of the arrays when a call first needs one.

Arrays stay on their device, kernels run on its current stream, and nothing here waits for the device.
"""

from __future__ import annotations

from portnorm.arrays import Kernel, Library
from portnorm_backends.cuda import normalize, recurrent

LIBRARY = Library(
    "cupy",
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
