"""How fast: one table of works, every engine in a process of its own, pinned to its cores, checked against float64 before it is timed.

`works` says what is computed, `engines` who computes it and how, `runner` starts the processes and gathers what they print.
"""

from portnorm.bench.engines import ENGINES
from portnorm.bench.runner import best_peer, laid_out, machine, measure, rate, ratio
from portnorm.bench.works import GROWTH, WORKS, Work

__all__ = ["ENGINES", "GROWTH", "WORKS", "Work", "best_peer", "laid_out", "machine", "measure", "rate", "ratio"]
