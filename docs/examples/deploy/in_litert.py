"""A stream in LiteRT: `python in_litert.py FOLDER`. Kotlin's Interpreter has the same calls.

The .tflite is made once, by `onnx2tf -i litert.onnx -o FOLDER -kat x h_0 c_0`, so that no input is transposed.
"""

import sys
from pathlib import Path

import numpy as np
from ai_edge_litert.interpreter import Interpreter

folder = Path(sys.argv[1])
interpreter = Interpreter(str(folder / "litert_float32.tflite"), num_threads=1)
interpreter.allocate_tensors()
taken = {d["name"].removesuffix(":0").removeprefix("serving_default_"): d["index"] for d in interpreter.get_input_details()}
given = sorted((d["name"], d["index"]) for d in interpreter.get_output_details())  # Identity, Identity_1, Identity_2: y, h_n, c_n
steps = np.fromfile(folder / "x.bin", np.float32).reshape(-1, 1, 16)

states = {"h_0": np.zeros((1, 1, 32), np.float32), "c_0": np.zeros((1, 1, 32), np.float32)}
ys = []
for x in steps:
    for name, a in {"x": x, **states}.items():
        interpreter.set_tensor(taken[name], a)
    interpreter.invoke()
    y, states["h_0"], states["c_0"] = (interpreter.get_tensor(index) for _, index in given)
    ys.append(y)

np.concatenate(ys).tofile(folder / "y.bin")
