"""A normalizer in a slot of a recurrent cell: layer normalization, batch normalization of one step, or a shift alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from portnorm.arrays import Array, xp_of
from portnorm.cells.variants import Variant
from portnorm.norm.normalize import Axes, Normalized, normalize
from portnorm.scan import Params

Statistics = tuple[Array | None, Array | None]
NO_STATISTICS: Statistics = (None, None)


@dataclass(frozen=True)
class Slot:
    """Normalizes (batch, features).

    Layer: statistics of each row, apart for each part of the features; `partition` says how many gates each part has. Batch:
    statistics of each feature over the rows that are active when `training`, else given; over all steps too where the variant has them
    by sequence. A slot that does not normalize only shifts.
    """

    variant: Variant
    partition: tuple[int, ...] = (1,)
    training: bool = False
    shift: bool = True
    normalizes: bool = True

    def parameters(self) -> tuple[str, ...]:
        return (*(("weight",) if self.normalizes else ()), *(("bias",) if self.shift else ()))

    def __call__(
        self, params: Params, name: str, z: Array, active: Array | None, given: Statistics
    ) -> tuple[Array, tuple[Any, ...], tuple[Array, ...]]:
        """(normalized z, residuals of each part, the batch's mean and variance if running averages have to be kept of them)."""
        xp = xp_of(z)
        weight, bias = (params.get(f"{name}.{p}") if p in self.parameters() else None for p in ("weight", "bias"))
        if not self.normalizes:
            return z + bias, (), ()
        pieces, residuals = [], []
        mean, var = given
        for part in self._parts(z.shape[-1]):
            own_weight, own_bias = (None if p is None else self._grouped(_at(p, part)) for p in (weight, bias))
            y, kept = normalize.forward(
                self._grouped(_at(z, part)),
                own_weight,
                own_bias,
                eps=self.variant.eps,
                mean=mean,
                var=var,
                mask=self._mask(active),
                **self._axes(z.ndim),
            )
            pieces.append(y if y.ndim == z.ndim else xp.reshape(y, z.shape))
            residuals.append(kept)
        y = pieces[0] if len(pieces) == 1 else xp.concat(pieces, axis=-1)
        is_tracked = self._is_batch and self.training
        return y, tuple(residuals), tuple(self._row(s) for s in residuals[0].statistics()) if is_tracked else ()

    def vjp(self, residuals: tuple[Normalized, ...], dy: Array, active: Array | None) -> tuple[Array, Params]:
        """(cotangent of z, cotangents of weight and bias)"""
        xp = xp_of(dy)
        if not self.normalizes:
            return dy, {"bias": xp.sum(dy, axis=tuple(range(dy.ndim - 1)))}
        found = []
        for part, kept in zip(self._parts(dy.shape[-1]), residuals, strict=True):
            own = _at(dy, part)
            mean = kept.mean if self._is_batch and not self.training else None
            dz, *dparams = normalize.vjp(kept, self._grouped(own), mean=mean, mask=self._mask(active), **self._axes(dy.ndim))
            found.append((xp.reshape(dz, own.shape), *(None if d is None else xp.reshape(d, own.shape[-1:]) for d in dparams)))
        dz, dweight, dbias = (c[0] if len(c) == 1 or c[0] is None else xp.concat(c, axis=-1) for c in zip(*found, strict=True))
        return dz, {p: d for p, d in (("weight", dweight), ("bias", dbias)) if d is not None}

    @property
    def _is_batch(self) -> bool:
        return self.variant.norm == "batch"

    @property
    def _equal_groups(self) -> int:
        """How many groups one reshape can make: more than one if all parts are single gates."""
        return len(self.partition) if set(self.partition) == {1} else 1

    def _parts(self, features: int) -> list[slice | None]:
        """The slices of the features that are normalized by one call each; `None` for all of them."""
        if self._equal_groups > 1 or self._is_batch or len(self.partition) == 1:
            return [None]
        gate = features // sum(self.partition)
        ends = [gate * count for count in accumulate(self.partition)]
        return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]

    def _grouped(self, a: Array) -> Array:
        groups = self._equal_groups
        return a if groups == 1 else xp_of(a).reshape(a, (*a.shape[:-1], groups, a.shape[-1] // groups))

    def _row(self, statistic: Array) -> Array:
        """A batch statistic without the axes that it was taken over: (features,) for one step, (time, features) for all."""
        return statistic[..., 0, :] if self.variant.timed else statistic[0, 0, :]

    def _mask(self, active: Array | None) -> Array | None:
        return active if self._is_batch and self.training else None

    def _axes(self, ndim: int) -> Axes:
        """Axes for an array of `ndim` before grouping, with the batch second to last."""
        if self._is_batch:
            return {"axes": (ndim - 2,) if self.variant.timed else tuple(range(ndim - 1)), "param_axes": (ndim - 1,)}
        if self._equal_groups == 1:
            return {"axes": (ndim - 1,), "param_axes": (ndim - 1,)}
        return {"axes": (ndim,), "param_axes": (ndim - 1, ndim)}


def _at(a: Array, part: slice | None) -> Array:
    return a if part is None else a[..., part]


@dataclass
class Slots:
    """The filled slots of one forward step: call it with a slot's name; an empty slot gives its input back."""

    slots: dict[str, Slot]
    params: Params
    active: Array | None
    rows: tuple[Array, ...]  # per batch-norm slot its mean and variance, unless training
    residuals: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    statistics: list[Array] = field(default_factory=list)

    def __call__(self, name: str, z: Array) -> Array:
        if name not in self.slots:
            return z
        tracked = (slot for slot, row in self.slots.items() if row.normalizes)
        given = dict(zip(tracked, zip(self.rows[::2], self.rows[1::2], strict=True), strict=False)).get(name, NO_STATISTICS)
        y, self.residuals[name], statistics = self.slots[name](self.params, name, z, self.active, given)
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
