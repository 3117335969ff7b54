"""Where the libraries of `libraries.py` are loaded from: what the ground is told of what stands above it, when `portnorm` is imported.

Each is an import statement, which `torch.compile` can follow where the first array of all is in what it compiles.
"""

from __future__ import annotations

from portnorm.arrays import Library
from portnorm.libraries import LOADERS, SUPPORT


def _numpy() -> Library:
    from portnorm_backends.numpy import LIBRARY

    return LIBRARY


def _cupy() -> Library:
    from portnorm_backends.cupy import LIBRARY

    return LIBRARY


def _jax() -> Library:
    from portnorm_backends.jax import LIBRARY

    return LIBRARY


def _torch() -> Library:
    from portnorm_backends.torch import LIBRARY

    return LIBRARY


def _dask() -> Library:
    from portnorm_backends.dask import LIBRARY

    return LIBRARY


def _mlx() -> Library:
    from portnorm_backends.mlx import LIBRARY

    return LIBRARY


def _paddle() -> Library:
    from portnorm_backends.paddle import LIBRARY

    return LIBRARY


def _onnx() -> Library:
    from portnorm_onnx.library import LIBRARY

    return LIBRARY


def fill() -> None:
    """Tell the ground where each library is loaded from, by the root module of its arrays' types."""
    LOADERS.update(dict.fromkeys(SUPPORT))
    LOADERS.update(numpy=_numpy, torch=_torch, jax=_jax, dask=_dask, mlx=_mlx, paddle=_paddle, cupy=_cupy)
    # What an array of NumPy of one of ml_dtypes' types gives by an index is of that type.
    LOADERS.update(jaxlib=_jax, ml_dtypes=_numpy, portnorm_onnx=_onnx)
