"""Floors: the memory of a normalization is moved, the matrix products of a recurrent layer are made, and nothing else."""

from __future__ import annotations

import numpy

from portnorm.bench.works import Arrays, Run, Work


def copy(work: Work, data: Arrays) -> Run | None:
    """Of the input, into memory that is there: the floor of a normalization."""
    if work.room != "norm" or work.backward:
        return None
    out = numpy.empty_like(data["x"])

    def run() -> tuple[()]:
        numpy.copyto(out, data["x"])
        return ()

    return run


def matmuls(work: Work, data: Arrays) -> Run | None:
    """The matrix products of a recurrent layer by NumPy, and nothing else."""
    if not work.recurrent:
        return None
    x, w, v, (time, batch, inputs, hidden) = data["x"], data["weight_ih_l0"], data["weight_hh_l0"], work.sizes
    rows, h = x.reshape(-1, inputs), numpy.zeros((batch, hidden), x.dtype)
    a, all_a, all_h = (numpy.zeros(shape, x.dtype) for shape in ((batch, len(v)), (len(rows), len(v)), (len(rows), hidden)))

    def run() -> tuple[()]:
        numpy.matmul(rows, w.T)
        for _ in range(time):
            numpy.matmul(h, v.T, out=a)
        if work.backward:
            for _ in range(time):
                numpy.matmul(a, v, out=h)
            numpy.matmul(all_a.T, all_h)
            numpy.matmul(all_a.T, rows)
            numpy.matmul(all_a, w)
        return ()

    return run
