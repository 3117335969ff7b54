"""A stream in MNN: `python in_mnn.py FOLDER`. Its C++ Module has the same calls.

The .mnn is made once, by `MNNConvert -f ONNX --modelFile mnn.onnx --MNNModel mnn.mnn --useOriginRNNImpl`.
"""

import sys
from pathlib import Path

import MNN.expr
import MNN.nn
import MNN.numpy
import numpy as np

folder = Path(sys.argv[1])
net = MNN.nn.load_module_from_file(str(folder / "mnn.mnn"), ["x", "h_0", "c_0"], ["y", "h_n", "c_n"])
steps = np.fromfile(folder / "x.bin", np.float32).reshape(-1, 1, 16)


def placed(a):
    laid = MNN.expr.placeholder([*a.shape], MNN.expr.NCHW, MNN.numpy.float32)
    laid.write(a)
    return laid


h = placed(np.zeros((1, 1, 32), np.float32))  # (layers, batch, features)
c = placed(np.zeros((1, 1, 32), np.float32))
ys = []
for x in steps:
    y, h, c = net.onForward([placed(x), h, c])
    ys.append(np.array(y.read()))

np.concatenate(ys).tofile(folder / "y.bin")
