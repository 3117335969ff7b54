"""Sums of any number of terms, compiled by numba.

Each addition to a sum rounds by up to half a unit in its last place, and if the terms are alike, all do so in the same direction: one
accumulator that takes n equal terms ends up off by n / 4 units. So it takes `TERMS` of them at most (of rows `GROUP`); such parts are then
added up with what rounding loses carried along (Kahan 1965). The result is as good for a million terms as for a few, whatever the width of
a register.
"""

from __future__ import annotations

from typing import Any

from portnorm_backends.cpu.compiling import compiled

TERMS = 16
"""Terms that a lane of a register adds up before the sum is added to the others."""

GROUP = 32
"""Rows that are added up in the same way."""


@compiled(inner=True)
def carried(total: Any, lost: Any, term: Any) -> Any:
    """`total` with one more term, and what rounding has lost of it; nothing where the sum is not finite, which it then stays."""
    term -= lost
    more = total + term
    rest = (more - total) - term
    return more, rest if rest == rest else 0.0


@compiled(inner=True)
def carry(total: Any, lost: Any, part: Any) -> None:
    """`total` += `part`, value by value, and `part` = 0."""
    for i in range(total.size):
        total[i], lost[i] = carried(total[i], lost[i], total.dtype.type(part[i]))
        part[i] = 0
