"""A stream in ncnn: `python in_ncnn.py FOLDER`. C++ and Java have the same calls.

The net is made once, by `pnnx ncnn.onnx inputshape=[1,16]f32,[1,32]f32,[1,32]f32 fp16=0`; it has no batch, so states are vectors.
"""

import sys
from pathlib import Path

import ncnn
import numpy as np

folder = Path(sys.argv[1])
net = ncnn.Net()
net.opt.use_fp16_packed = net.opt.use_fp16_storage = net.opt.use_fp16_arithmetic = False
if net.load_param(str(folder / "ncnn.ncnn.param")) or net.load_model(str(folder / "ncnn.ncnn.bin")):
    sys.exit("ncnn does not load the net")
steps = np.fromfile(folder / "x.bin", np.float32).reshape(-1, 16)

h, c = np.zeros(32, np.float32), np.zeros(32, np.float32)
ys = []
for x in steps:
    extractor = net.create_extractor()
    for name, a in {"in0": x, "in1": h, "in2": c}.items():
        extractor.input(name, ncnn.Mat(a).clone())
    y, h, c = (np.array(extractor.extract(name)[1]) for name in ("out0", "out1", "out2"))
    ys.append(y)

np.stack(ys).tofile(folder / "y.bin")
