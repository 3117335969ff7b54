"""Sums of as many terms as there are, compiled by numba. Each addition to a sum of like terms loses up to half a unit of its last place, all of
them the same way: of n equal terms the sum is off by up to n / 4 units.

So at most `TERMS` terms (of rows: `GROUP`) are added one after the other in the type of the values. Such parts are added up with what rounding
loses carried along (Kahan 1965), and the result is as good for a million terms as for a few, whatever the width of a register.
"""

from __future__ import annotations

from typing import Any

from portnorm_backends.cpu.compiling import compiled

TERMS = 16
"""Terms that a lane of a register adds up before the sum is added to the others."""

GROUP = 32
"""Rows that are added up in the same way."""


@compiled()
def carried(total: Any, lost: Any, term: Any) -> Any:
    """`total` with one more term, and what rounding has lost of it; nothing where the sum is not finite, which it then stays."""
    term -= lost
    more = total + term
    rest = (more - total) - term
    return more, rest if rest == rest else 0.0


@compiled()
def carry(total: Any, lost: Any, part: Any) -> None:
    """`total` += `part`, value by value, and `part` = 0."""
    for i in range(total.size):
        total[i], lost[i] = carried(total[i], lost[i], total.dtype.type(part[i]))
        part[i] = 0
