"""A normalizer in a slot of a recurrent cell: layer normalization, or batch normalization of one step."""

from __future__ import annotations

from dataclasses import dataclass

from portnorm.arrays import Array, xp_of
from portnorm.cells.variants import Variant
from portnorm.norm.normalize import Axes, Normalized, normalize
from portnorm.scan import Params

Statistics = tuple[Array | None, Array | None]
NO_STATISTICS: Statistics = (None, None)


@dataclass(frozen=True)
class Slot:
    """Normalizes (batch, features), in `groups` slices of the features.

    Layer: statistics of each row's slice. Batch: statistics of each feature over the rows that are active when `training`, else given.
    """

    variant: Variant
    groups: int = 1
    training: bool = False
    shift: bool = True

    def parameters(self) -> tuple[str, ...]:
        return ("weight", "bias") if self.shift else ("weight",)

    def __call__(
        self, params: Params, name: str, z: Array, active: Array | None, given: Statistics
    ) -> tuple[Array, Normalized, tuple[Array, ...]]:
        """(normalized z, residuals, the batch's mean, variance and count if a running average has to be kept of them)."""
        weight, bias = (params.get(f"{name}.{p}") if p in self.parameters() else None for p in ("weight", "bias"))
        mean, var = given
        xp = xp_of(z)
        grouped = z if self.groups == 1 else xp.reshape(z, (*z.shape[:-1], self.groups, z.shape[-1] // self.groups))
        if self.groups > 1:
            weight, bias = (None if p is None else xp.reshape(p, grouped.shape[-2:]) for p in (weight, bias))
        y, residuals = normalize.forward(
            grouped, weight, bias, eps=self.variant.eps, mean=mean, var=var, mask=self._mask(active), **self._axes(grouped.ndim)
        )
        statistics = tuple(s[0, :] for s in residuals.statistics()) if self._is_batch and self.training else ()
        return (y if self.groups == 1 else xp.reshape(y, z.shape)), residuals, statistics

    def vjp(self, residuals: Normalized, dy: Array, active: Array | None) -> tuple[Array, Params]:
        """(cotangent of z, cotangents of weight and bias)"""
        xp = xp_of(dy)
        mean = residuals.mean if self._is_batch and not self.training else None
        dz, *dparams = normalize.vjp(
            residuals, xp.reshape(dy, residuals.xhat.shape), mean=mean, mask=self._mask(active), **self._axes(residuals.xhat.ndim)
        )
        flat = {p: xp.reshape(d, (dy.shape[-1],)) for p, d in zip(("weight", "bias"), dparams, strict=True) if d is not None}
        return xp.reshape(dz, dy.shape), flat

    @property
    def _is_batch(self) -> bool:
        return self.variant.norm == "batch"

    def _mask(self, active: Array | None) -> Array | None:
        return active if self._is_batch and self.training else None

    def _axes(self, ndim: int) -> Axes:
        last = (ndim - 1,)
        if self._is_batch:
            return {"axes": (0,), "param_axes": last}
        return {"axes": last, "param_axes": last if self.groups == 1 else (ndim - 2, ndim - 1)}
