"""NumPy: kernels compiled by numba where it is installed (extra `fast`), else the definitions alone.

numba itself is imported when the first array comes that a kernel takes.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy

from portnorm.arrays import Library
from portnorm.norm.layer import layer_norm
from portnorm.norm.rms import rms_norm
from portnorm_backends import bfloat16
from portnorm_backends.cpu import affine, channels, descent, integers, memory, normalize, recurrent, rows

_KERNELS = {
    "normalize": normalize.KERNEL,
    "layer_norm": rows.last_axis(layer_norm, center=True),
    "batch_norm": channels.BATCH_NORM,
    "rms_norm": rows.last_axis(rms_norm, center=False),
    **affine.KERNELS,
    "fake_quantize": integers.ROUNDED,
    "integer_product": integers.PRODUCT,
    "scan": recurrent.KERNEL,
    "linear_scan": recurrent.FROM_INPUTS,
    **descent.KERNELS,
}


def _fixed(x: numpy.ndarray[Any, Any]) -> numpy.ndarray[Any, Any]:
    """A copy that can only be read."""
    copy = numpy.array(x, order="C")
    copy.flags.writeable = False
    return copy


# 16 MB in float32: enough rows for what is done once for them all, and little enough for a cache.
LIBRARY = Library(
    "numpy",
    kernels=_KERNELS if importlib.util.find_spec("numba") is not None else {},
    at_once=2**22,
    fixed=_fixed,
    narrow=bfloat16.NARROW,
    more_dtypes={"bfloat16": bfloat16.dtype},
    release=memory.release,
)
