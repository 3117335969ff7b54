"""Running statistics: one row in all (`BatchNorm`), or one row per time step (BN-LSTM, Cooijmans et al. 2016, section 3).

Buffers of a slot are `<slot>.running_mean` and `<slot>.running_var` (steps, features), with `num_batches_tracked` (steps,) for all of
them; or (features,) and () where all steps share them. Time is given as an array without axes, so that a chunk of a sequence reads and
updates the rows that belong to it; `None` where steps share their statistics.
"""

from __future__ import annotations

from portnorm.arrays import Array, device_of, xp_of
from portnorm.scalars import real_number

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


def checked_momentum(momentum: float | None) -> float | None:
    """`momentum`, the weight of a new value, as a float, or `None`; raises `UnsupportedError` for what is neither."""
    return None if momentum is None else real_number("momentum", momentum, 0, 1, "a number from 0 to 1, or None")


def rows_of_steps(time: Array, x: Array, last: Array | int) -> Array:
    """The row of each step of `x` (time, …), of which `time` steps have gone before; steps after the `last` row have that row."""
    xp = xp_of(x)
    limit = xp.asarray(last - 1, dtype=time.dtype, device=device_of(x)) if isinstance(last, int) else last
    return xp.minimum(time + xp.arange(x.shape[0], dtype=time.dtype, device=device_of(x)), limit)


def at_steps(buffers: Buffers, time: Array | None, x: Array) -> dict[str, Array]:
    """`<slot>.mean` and `<slot>.var` (time, features) for the steps of `x` (time, …), of which `time` steps have gone before.

    A step after the last one that has statistics uses the last that has (Cooijmans et al.: "t > T_max → the statistics of T_max").
    Without `time` all steps have the same statistics (1, features).
    """
    xp = xp_of(x)
    tables = {f"{slot}.{s}": buffers[f"{slot}.running_{s}"] for slot in slots_of(buffers) for s in ("mean", "var")}
    if time is None:
        return {name: table[None, :] for name, table in tables.items()}
    tracked = buffers["num_batches_tracked"]
    last = xp.max(xp.where(tracked > 0, xp.arange(tracked.shape[0], dtype=tracked.dtype, device=device_of(tracked)), 0))
    rows = rows_of_steps(time, x, last)
    return {name: xp.take(table, rows, axis=0) for name, table in tables.items()}


def slots_of(buffers: Buffers) -> list[str]:
    """The slots that have running statistics."""
    return [name.removesuffix(".running_mean") for name in buffers if name.endswith(".running_mean")]


def update(buffers: Buffers, seen: Seen, time: Array | None, lengths: Array | None, momentum: float | None) -> Buffers:
    """New buffers after a batch with statistics `seen` (time, features) per slot, or (features,) without `time`.

    Every step updates its row, the steps after the last row update that one, each in its turn, since they will use it (as Sonnet and
    jihunchoi's BN-LSTM do). Steps at which no sequence was left update nothing.
    """
    first = next(iter(seen.values()))[0]
    xp, before = xp_of(first), buffers["num_batches_tracked"]
    if time is None:
        hits = xp.astype(xp.max(lengths) > 0, before.dtype) if lengths is not None else xp.ones_like(before)
    else:
        row = xp.arange(before.shape[0], dtype=before.dtype, device=device_of(before)) - time
        end = xp.asarray(first.shape[0], dtype=before.dtype, device=device_of(before))
        if lengths is not None:
            end = xp.minimum(xp.astype(xp.max(lengths), before.dtype, copy=False), end)
        hits = xp.astype((row >= 0) & (row < end), before.dtype)
        step = xp.where(hits > 0, row, 0)
        # The last row: its steps are those from `start` to `end`, and a later one weighs more, as a moving average has it.
        start = xp.maximum(row[-1], xp.zeros_like(row[-1]))
        many = xp.where(start < end, end - start, 0)
        hits = xp.concat([hits[:-1], xp.reshape(many, (1,))])
        steps = xp.arange(first.shape[0], dtype=before.dtype, device=device_of(first))
        taken, left = xp.astype((steps >= start) & (steps < end), first.dtype), xp.astype(end - 1 - steps, first.dtype)
        weights = taken if momentum is None else xp.where(taken > 0, (1.0 - momentum) ** xp.where(taken > 0, left, 0.0), 0.0)
        total = xp.sum(weights)
        weights = weights / xp.where(total > 0, total, 1.0)
    after = before + hits
    amount = xp.astype(hits, first.dtype)
    new_part = amount / xp.astype(xp.where(after > 0, after, 1), first.dtype) if momentum is None else 1.0 - (1.0 - momentum) ** amount
    new = {**buffers, "num_batches_tracked": after}
    for slot, statistics in seen.items():
        for name, batch in zip(("running_mean", "running_var"), statistics, strict=True):
            running, part = buffers[f"{slot}.{name}"], new_part
            if time is not None:
                last = xp.sum(weights[:, None] * batch, axis=0, keepdims=True)
                batch, part = xp.concat([xp.take(batch, step[:-1], axis=0), last]), part[:, None]
            new[f"{slot}.{name}"] = xp.where(part > 0, running + part * (batch - running), running)
    return new
