"""The array libraries: one row for each, which says what is true of it without importing it.

Dispatch (`portnorm.arrays`), the tests, `portnorm conform` and the tables of the documents are all made of these rows. How a library does
what its row says is in `portnorm_backends.<name>`, which is loaded when the first array of that library is seen, never before.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from portnorm.errors import MissingExtraError, install

if TYPE_CHECKING:
    from portnorm.arrays import Library


@dataclass(frozen=True)
class Support:
    """One array library."""

    name: str
    """The root module of its arrays' types, by which `xp=` names it too."""
    module: str
    """The module of its functions."""
    package: str
    """What pip installs."""
    dtypes: tuple[str, ...] = ("float16", "float32", "float64")
    """The floating types in which every operation is tested, forward and backward; the last is the one that layers are tested in."""
    extra: str | None = None
    """The extra of portnorm that brings it; `None` where `package` has to be installed by itself."""
    kernels: tuple[str, ...] = ()
    """The Ops that it computes in its own way, where it takes the arguments."""
    autodiff: bool = False
    """Whether its automatic differentiation takes the vjps of portnorm."""
    lazy: bool = False
    """Whether nothing is computed before it is asked for."""
    out: bool = True
    """Whether its arrays can be written to, as `out=` needs."""
    gpu: bool = False
    """Whether it needs a GPU, so that a test without one says that it was skipped."""
    wide: str = ""
    """What makes its types of 64 bits, where that has to be asked for."""
    always: bool = False
    """Whether it is there wherever the tests are; else they take it with `--peers`."""

    def version(self) -> str:
        """The installed version; raises `MissingExtraError` where there is none, or no device that it needs."""
        try:
            module = importlib.import_module(self.module)
            if self.gpu and not module.cuda.runtime.getDeviceCount():
                raise MissingExtraError(f"{self.name} is installed but there is no CUDA device")
        except MissingExtraError:
            raise
        except Exception as error:
            raise MissingExtraError(f"{self.name} is not usable here: {error}") from None
        found = getattr(importlib.import_module(self.module.partition(".")[0]), "__version__", None)
        if found is None:
            from importlib.metadata import version  # slow to import

            return version(self.package)
        return str(found)

    def remedy(self) -> str:
        """What helps where it does not work."""
        needs = "it needs an NVIDIA GPU, its driver and " if self.gpu else ""
        what = f"pip install {self.package}" if self.extra is None else install(self.extra)
        return f"{needs}{what}; else use another library, such as numpy"


_EVERY = ("float16", "bfloat16", "float32", "float64")
_X64 = 'jax.config.update("jax_enable_x64", True) before the first array, or JAX_ENABLE_X64=1 in the environment, gives 64-bit types'

SUPPORT: dict[str, Support] = {
    row.name: row
    for row in (
        Support(
            "numpy",
            "numpy",
            "numpy",
            _EVERY,
            kernels=(
                "embedding",
                "rows_added",
                "normalize",
                "scan",
                "linear_scan",
                "linear",
                "input_cotangent",
                "weight_cotangent",
                "layer_norm",
                "batch_norm",
                "rms_norm",
                "fake_quantize",
                "integer_product",
                "sgd_step",
                "rmsprop_step",
                "adam_step",
            ),
            always=True,
        ),
        Support("array_api_strict", "array_api_strict", "array-api-strict", ("float32", "float64"), always=True),
        Support(
            "torch",
            "torch",
            "torch",
            _EVERY,
            "torch",
            ("loop", "normalize", "sigmoid", "steps_so_far", "times_transposed", "steps_at", "rows_added"),
            autodiff=True,
        ),
        Support("jax", "jax.numpy", "jax", _EVERY, kernels=("loop", "rows_added"), autodiff=True, out=False, wide=_X64),
        Support(
            "dask",
            "dask.array",
            "dask",
            ("float32", "float64"),
            kernels=("reverse_sequences", "pack_steps", "unpack_steps"),
            lazy=True,
        ),
        Support("mlx", "mlx.core", "mlx", ("float16", "bfloat16", "float32"), "mlx", autodiff=True),
        Support("paddle", "paddle", "paddlepaddle", ("float32", "float64"), "paddle", autodiff=True),
        Support("cupy", "cupy", "cupy-cuda12x", extra="cupy", kernels=("normalize", "scan"), gpu=True),
    )
}
"""Array libraries by name."""

LOADERS: dict[str, Callable[[], Library] | None] = {}
"""Root module of an array's type -> what gives its `LIBRARY`, or `None` where the definitions are all there is. `loaders.py` fills it; the
libraries that are not in it are found by the entry points of `portnorm.backends`."""
