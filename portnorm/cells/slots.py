"""A normalizer in a slot of a recurrent cell: layer, RMS or batch normalization of one step, or a shift alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from portnorm.arrays import Array, xp_of
from portnorm.cells.variants import Variant
from portnorm.norm.normalize import Normalized, Reduce, bessel, normalize
from portnorm.pointwise import split
from portnorm.scan import Params
from portnorm.sums import total_like


@dataclass(frozen=True)
class Slot:
    """Normalizes (batch, features).

    Layer and RMS: statistics of each row, apart for each part of the features; `partition` says how many gates each part has. Batch:
    statistics of each feature over the rows that are active when `training`, else given; over all steps too where the variant has them
    by sequence. A slot that does not normalize only shifts. `reduce` sums over all processes that have a part of the batch.
    """

    variant: Variant
    partition: tuple[int, ...] = (1,)
    training: bool = False
    scale: bool = True
    shift: bool = True
    normalizes: bool = True
    reduce: Reduce | None = None

    def parameters(self) -> tuple[str, ...]:
        return (*(("weight",) if self.scale and self.normalizes else ()), *(("bias",) if self.shift else ()))

    def __call__(
        self, params: Mapping[str, Array], name: str, z: Array, active: Array | None
    ) -> tuple[Array, tuple[Any, ...], tuple[Array, ...]]:
        """(normalized z, residuals of each part, the batch's mean and variance if running averages have to be kept of them).

        `params` has `<name>.weight` and `.bias`, (features,) or one row per step, and `.mean` and `.var` where they are given.
        """
        xp = xp_of(z)
        weight, bias = (params[f"{name}.{p}"] if p in self.parameters() else None for p in ("weight", "bias"))
        if not self.normalizes:
            return (z if bias is None else z + bias), (), ()
        by_step = any(p is not None and p.ndim == 2 for p in (weight, bias))
        pieces, residuals = [], []
        parts = self._parts(z.shape[-1])
        for own, part in zip(split(z, self.partition) if len(parts) > 1 else (z,), parts, strict=True):
            own_weight, own_bias = (None if p is None else self._grouped(_at(p, part)) for p in (weight, bias))
            y, kept = normalize.forward(
                self._grouped(own),
                own_weight,
                own_bias,
                eps=self.variant.eps,
                mean=params.get(f"{name}.mean"),
                var=params.get(f"{name}.var"),
                mask=self._mask(active),
                **self._attributes(z.ndim, by_step),
            )
            pieces.append(y if y.ndim == z.ndim else xp.reshape(y, z.shape))
            residuals.append(kept)
        y = pieces[0] if len(pieces) == 1 else xp.concat(pieces, axis=-1)
        return y, tuple(residuals), self._statistics(residuals[0]) if self.is_batch and self.training else ()

    def vjp(self, residuals: tuple[Normalized, ...], dy: Array, active: Array | None) -> tuple[Array, Params]:
        """(cotangent of z, cotangents of weight and bias)"""
        xp = xp_of(dy)
        if not self.normalizes:
            return dy, {"bias": total_like(dy, tuple(range(dy.ndim - 1)))} if self.shift else {}
        given = residuals[0]
        by_step = any(p is not None and p.ndim == 2 for p in (given.weight, given.bias)) and self.is_batch
        found = []
        for part, kept in zip(self._parts(dy.shape[-1]), residuals, strict=True):
            own = _at(dy, part)
            mean = kept.mean if self.is_batch and not self.training else None
            attributes = self._attributes(dy.ndim, by_step)
            dz, *dparams = normalize.vjp(kept, self._grouped(own), mean=mean, mask=self._mask(active), **attributes)
            flat = own.shape[-1:] if not by_step else own.shape[:1] + own.shape[-1:]
            found.append((xp.reshape(dz, own.shape), *(None if d is None else xp.reshape(d, flat) for d in dparams)))
        dz, dweight, dbias = (c[0] if len(c) == 1 or c[0] is None else xp.concat(c, axis=-1) for c in zip(*found, strict=True))
        return dz, {p: d for p, d in (("weight", dweight), ("bias", dbias)) if d is not None}

    @property
    def is_batch(self) -> bool:
        return self.variant.norm == "batch"

    @property
    def _equal_groups(self) -> int:
        """How many groups one reshape can make: more than one if all parts are single gates."""
        return len(self.partition) if set(self.partition) == {1} else 1

    def _parts(self, features: int) -> list[slice | None]:
        """The slices of the features that are normalized by one call each; `None` for all of them."""
        if self._equal_groups > 1 or self.is_batch or len(self.partition) == 1:
            return [None]
        gate = features // sum(self.partition)
        ends = [gate * count for count in accumulate(self.partition)]
        return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]

    def _grouped(self, a: Array) -> Array:
        groups = 1 if self.is_batch else self._equal_groups
        return a if groups == 1 else xp_of(a).reshape(a, (*a.shape[:-1], groups, a.shape[-1] // groups))

    def _statistics(self, kept: Normalized) -> tuple[Array, Array]:
        """Mean and variance without the axes that they were taken over: (features,) for one step, (time, features) for all."""
        mean, var = kept.statistics(int(self.variant.variance == "unbiased"))
        if self.variant.variance == "running":
            var = var * bessel(var, kept.counted, kept.shape, self._batch_axes(len(kept.shape)))
        at = (..., 0, slice(None)) if self.variant.timed else (0, 0, slice(None))
        return mean[at], var[at]

    def _mask(self, active: Array | None) -> Array | None:
        return active if self.is_batch and self.training else None

    def _batch_axes(self, ndim: int) -> tuple[int, ...]:
        return (ndim - 2,) if self.variant.timed else tuple(range(ndim - 1))

    def _attributes(self, ndim: int, by_step: bool) -> dict[str, Any]:
        """What the core is told, for an array of `ndim` before grouping, with the batch second to last."""
        v = self.variant
        how: dict[str, Any] = {"center": v.norm != "rms", "eps_place": v.eps_place, "correction": int(v.variance == "unbiased")}
        if self.is_batch:
            if self.training and self.reduce is not None:
                how["reduce"] = self.reduce
            return {"axes": self._batch_axes(ndim), "param_axes": (0, ndim - 1) if by_step else (ndim - 1,), **how}
        if self._equal_groups == 1:
            return {"axes": (ndim - 1,), "param_axes": (ndim - 1,), **how}
        return {"axes": (ndim,), "param_axes": (ndim - 1, ndim), **how}


def _at(a: Array, part: slice | None) -> Array:
    return a if part is None else a[..., part]


@dataclass
class Slots:
    """The filled slots of one forward step: call it with a slot's name; an empty slot gives its input back."""

    slots: dict[str, Slot]
    params: Mapping[str, Array]  # with what this step alone has
    active: Array | None
    residuals: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    statistics: list[Array] = field(default_factory=list)

    def __call__(self, name: str, z: Array) -> Array:
        if name not in self.slots:
            return z
        y, self.residuals[name], statistics = self.slots[name](self.params, name, z, self.active)
        self.statistics.extend(statistics)
        return y


@dataclass
class SlotsVjp:
    """The same backward: call it with a slot's name and a cotangent; collects the parameters' cotangents in `shares`."""

    slots: dict[str, Slot]
    residuals: dict[str, tuple[Any, ...]]
    active: Array | None
    shares: Params = field(default_factory=dict)

    def __call__(self, name: str, dy: Array) -> Array:
        if name not in self.slots:
            return dy
        dz, cotangents = self.slots[name].vjp(self.residuals[name], dy, self.active)
        self.shares.update({f"{name}.{p}": d for p, d in cotangents.items()})
        return dz
