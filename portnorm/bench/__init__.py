"""How fast: one table of works, every engine in a process of its own, pinned to its cores, checked against float64 before it is timed.

`works` says what is computed, `engines` who computes it and how, `runner` starts the processes and gathers what they print.
"""

from portnorm.bench.engines import ENGINES
from portnorm.bench.runner import best_peer, engine, laid_out, machine, measure, packages_of, rate, ratio
from portnorm.bench.works import GROWTH, WORKS, Work

__all__ = ["ENGINES", "GROWTH", "WORKS", "Work", "best_peer", "engine", "laid_out", "machine", "measure", "packages_of", "rate", "ratio"]
