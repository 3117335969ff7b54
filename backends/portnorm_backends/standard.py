"""What the namespaces that are made here, of functions with other names and keywords than the Array API standard's, have in common."""

from __future__ import annotations

from typing import Any, ClassVar

from portnorm.arrays import Array, DType


class Namespace:
    """Types by their names; `kinds` has those of "bool", "signed integer", "unsigned integer" and "real floating"."""

    kinds: ClassVar[dict[str, tuple[str, ...]]]

    def __init_subclass__(cls) -> None:
        integral = (*cls.kinds["signed integer"], *cls.kinds["unsigned integer"])
        cls.kinds = cls.kinds | {"integral": integral, "numeric": (*integral, *cls.kinds["real floating"])}

    def isdtype(self, dtype: DType, kind: Any) -> bool:
        """Whether `dtype` is of this kind, or of one of a tuple of kinds."""
        kinds = kind if isinstance(kind, tuple) else (kind,)
        name = str(dtype).rpartition(".")[2]
        return any(name in self.kinds[k] if isinstance(k, str) else k == dtype for k in kinds)


def axes_of(x: Array, axis: Any) -> tuple[int, ...]:
    """All axes that `axis` of a reduction means, counted from the front."""
    given = range(x.ndim) if axis is None else axis if isinstance(axis, tuple) else (axis,)
    return tuple(a % x.ndim for a in given)
