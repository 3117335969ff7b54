"""Running statistics: one row in all (`BatchNorm`), or one row per time step (BN-LSTM, Cooijmans et al. 2016, section 3).

Buffers of a slot are `<slot>.running_mean` and `<slot>.running_var` (steps, features), with `num_batches_tracked` (steps,) for all of
them; or (features,) and () where all steps share them. Time is given as an array without axes, so that a chunk of a sequence reads and
updates the rows that belong to it; `None` where steps share their statistics.
"""

from __future__ import annotations

from portnorm.arrays import Array, device_of, xp_of
from portnorm.errors import UnsupportedError

Buffers = dict[str, Array]
Seen = dict[str, tuple[Array, Array]]


def moving_average(running: Array, batch: Array, momentum: float | None, tracked: Array) -> Array:
    """running + momentum · (batch − running); `momentum` is the weight of the new value, as in torch.

    `None` weighs all batches alike: 1/n for the n-th, with n from `tracked`, which counts this batch already.
    """
    if momentum is not None:
        return running + momentum * (batch - running)
    xp = xp_of(running)
    return running + (batch - running) / xp.astype(xp.where(tracked > 0, tracked, 1), running.dtype)


def check_momentum(momentum: float | None) -> None:
    """Raise `UnsupportedError` unless `momentum` is the weight of a new value, or `None`."""
    if momentum is not None and not 0 <= momentum <= 1:
        raise UnsupportedError(f"`momentum` is {momentum}; expected a number from 0 to 1, or None")


def at_steps(buffers: Buffers, time: Array | None, x: Array) -> Seen:
    """Per slot, mean and variance (time, features) for the steps of `x` (time, …), of which `time` steps have gone before.

    A step after the last one that has statistics uses the last that has (Cooijmans et al.: "t > T_max → the statistics of T_max").
    Without `time` all steps have the same statistics (1, features).
    """
    xp = xp_of(x)
    tables = {slot: (buffers[f"{slot}.running_mean"], buffers[f"{slot}.running_var"]) for slot in slots_of(buffers)}
    if time is None:
        return {slot: (mean[None, :], var[None, :]) for slot, (mean, var) in tables.items()}
    tracked = buffers["num_batches_tracked"]
    steps = time + xp.arange(x.shape[0], dtype=tracked.dtype, device=device_of(x))
    last = xp.max(xp.where(tracked > 0, xp.arange(tracked.shape[0], dtype=tracked.dtype, device=device_of(tracked)), 0))
    rows = xp.minimum(steps, last)
    return {slot: (xp.take(mean, rows, axis=0), xp.take(var, rows, axis=0)) for slot, (mean, var) in tables.items()}


def slots_of(buffers: Buffers) -> list[str]:
    """The slots that have running statistics."""
    return [name.removesuffix(".running_mean") for name in buffers if name.endswith(".running_mean")]


def update(buffers: Buffers, seen: Seen, time: Array | None, lengths: Array | None, momentum: float | None) -> Buffers:
    """New buffers after a batch with statistics `seen` (time, features) per slot, or (features,) without `time`.

    Steps at or after the number of rows, and steps at which no sequence was left, update nothing.
    """
    first = next(iter(seen.values()))[0]
    xp, tracked = xp_of(first), buffers["num_batches_tracked"]
    if time is None:
        hit = xp.max(lengths) > 0 if lengths is not None else xp.ones_like(tracked) > 0
    else:
        row = xp.arange(tracked.shape[0], dtype=tracked.dtype, device=device_of(tracked)) - time
        end = first.shape[0] if lengths is None else xp.minimum(xp.max(lengths), first.shape[0])
        hit = (row >= 0) & (row < end)
        step = xp.where(hit, row, 0)
    new = {**buffers, "num_batches_tracked": tracked + xp.astype(hit, tracked.dtype)}
    count = new["num_batches_tracked"]
    for slot, statistics in seen.items():
        for name, batch in zip(("running_mean", "running_var"), statistics, strict=True):
            running = buffers[f"{slot}.{name}"]
            if time is None:
                new[f"{slot}.{name}"] = xp.where(hit, moving_average(running, batch, momentum, count), running)
            else:
                average = moving_average(running, xp.take(batch, step, axis=0), momentum, count[:, None])
                new[f"{slot}.{name}"] = xp.where(hit[:, None], average, running)
    return new
