"""A stream in Python: `python in_python.py FOLDER`. Needs onnxruntime and NumPy, not portnorm."""

import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort

folder = Path(sys.argv[1])
session = ort.InferenceSession(folder / "portable.onnx", providers=["CPUExecutionProvider"])
steps = np.fromfile(folder / "x.bin", np.float32).reshape(-1, 1, 16)

h = np.zeros((1, 1, 32), np.float32)  # (layers, batch, features)
c = np.zeros((1, 1, 32), np.float32)
ys = []
for x in steps:
    y, h, c = session.run(["y", "h_n", "c_n"], {"x": x, "h_0": h, "c_0": c})
    ys.append(y)

np.concatenate(ys).tofile(folder / "y.bin")
