"""Running statistics: one row in all (`BatchNorm`), or one row per time step (BN-LSTM, Cooijmans et al. 2016, section 3).

Buffers of a slot are `<slot>.running_mean` and `<slot>.running_var` (steps, features), with `num_batches_tracked` (steps,) for all of
them; or (features,) and () where all steps share them. Time is given as an array without axes, so that a chunk of a sequence reads and
updates the rows that belong to it; `None` where steps share their statistics.

All are kept in at least float32. `num_values_tracked`, which is there while population statistics are taken, counts the values that have
entered (steps,): each batch then weighs as much as the values that it brings.
"""

from __future__ import annotations

from portnorm.arrays import Array, device_of, xp_of
from portnorm.scalars import real_number

Buffers = dict[str, Array]
Seen = dict[str, tuple[Array, Array]]

BATCHES, VALUES = "num_batches_tracked", "num_values_tracked"
"""Names of the buffers that count."""


def moved(running: Array, batch: Array, part: Array | float) -> Array:
    """(1 − part) · running + part · batch for `part` from 0 to 1: exactly `batch` where it is 1, and exactly `running` where it is 0.

    A small part is added as a difference, which drifts nowhere once both are alike; for a large one that would cancel.
    """
    xp = xp_of(running)
    if not isinstance(part, int | float):
        beside = xp.where(part < 0.5, running + part * (batch - running), (1.0 - part) * running + part * batch)
        return xp.where(part > 0, xp.where(part < 1, beside, batch), running)
    if part == 0 or part == 1:
        return batch if part else running
    return running + part * (batch - running) if part < 0.5 else (1.0 - part) * running + part * batch


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


def update(
    buffers: Buffers, seen: Seen, time: Array | None, lengths: Array | None, momentum: float | None, values: Array | None = None
) -> Buffers:
    """New buffers after a batch with statistics `seen` (time, features) per slot, or (features,) without `time`.

    Every step updates its row, the steps after the last row update that one, each in its turn, since they will use it (as Sonnet and
    jihunchoi's BN-LSTM do). Steps at which no sequence was left update nothing. `values` (time,), or () without `time`, counts those
    that each statistic was taken of; the average is over them where `num_values_tracked` is among the buffers.
    """
    first = next(iter(seen.values()))[0]
    xp, before, counted = xp_of(first), buffers[BATCHES], buffers.get(VALUES)
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
        if counted is not None:
            weights = taken * values
        else:
            weights = taken if momentum is None else xp.where(taken > 0, (1.0 - momentum) ** xp.where(taken > 0, left, 0.0), 0.0)
        total = xp.sum(weights)
        weights = weights / xp.where(total > 0, total, 1.0)
        if counted is not None:
            values = xp.concat([xp.take(values, step[:-1], axis=0), xp.reshape(total, (1,))])
    new = {**buffers, BATCHES: before + hits}
    amount = xp.astype(hits, first.dtype)
    if counted is not None:
        more = xp.where(hits > 0, values, 0.0)
        new[VALUES] = counted + more
        new_part = more / xp.where(new[VALUES] > 0, new[VALUES], 1.0)
    elif momentum is None:
        new_part = amount / xp.astype(xp.where(new[BATCHES] > 0, new[BATCHES], 1), first.dtype)
    else:
        new_part = xp.where(amount > 1, 1.0 - (1.0 - momentum) ** amount, momentum * amount)
    for slot, statistics in seen.items():
        for name, batch in zip(("running_mean", "running_var"), statistics, strict=True):
            running, part = buffers[f"{slot}.{name}"], new_part
            if time is not None:
                last = xp.sum(weights[:, None] * batch, axis=0, keepdims=True)
                batch, part = xp.concat([xp.take(batch, step[:-1], axis=0), last]), part[:, None]
            new[f"{slot}.{name}"] = moved(running, batch, part)
    return new
