#!/usr/bin/env bash
# onnxruntime-web 1.30.0 (WebAssembly, Node.js): ReduceMax, ReduceMin, ReduceSum, ReduceMean, ReduceL1, ReduceL2 and ReduceSumSquare of an
# array of shape (0, 7) over axis -1 with keepdims give shape (0, 7), which is not reduced. Over axis 1, the same axis counted from the
# front, the shape is (0, 1), and so it is for batches that are not empty. Nothing is said; what comes after the node has another width.
#
# Seen: "ReduceMax axis -1: (0, 7)" beside "axis 1: (0, 1)". Fails if that changes. It needs Node.js with npm.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check numpy==2.4.6 onnx==1.23.2
npm install --silent --ignore-scripts --prefix "$folder" onnxruntime-web@1.30.0
cd "$folder"
venv/bin/python - <<'PYTHON'
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

for operator in ("ReduceMax", "ReduceMin", "ReduceSum", "ReduceMean", "ReduceL1", "ReduceL2", "ReduceSumSquare"):
    for axis in (1, -1):
        graph = helper.make_graph(
            [helper.make_node(operator, ["x", "axes"], ["y"], keepdims=1)],
            "reduced",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 7])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 1])],
            [numpy_helper.from_array(np.array([axis]), "axes")],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
        onnx.checker.check_model(model, full_check=True)
        onnx.save(model, f"{operator}_{axis}.onnx")
PYTHON
cat > run.mjs <<'JAVASCRIPT'
import { readFileSync, readdirSync } from "node:fs";
import * as ort from "onnxruntime-web";

ort.env.wasm.numThreads = 1;
for (const name of readdirSync(".").filter((n) => n.endsWith(".onnx")).sort()) {
  const session = await ort.InferenceSession.create(new Uint8Array(readFileSync(name)), { executionProviders: ["wasm"], logSeverityLevel: 4 });
  for (const batch of [0, 2]) {
    const { y } = await session.run({ x: new ort.Tensor("float32", new Float32Array(batch * 7), [batch, 7]) });
    console.log(`${name.replace(".onnx", "").replace("_", " axis ")}: (${batch}, 7) gives (${y.dims.join(", ")})`);
    const expected = batch === 0 && name.includes("-1") ? 7 : 1;
    if (y.dims[0] !== batch || y.dims[1] !== expected) throw new Error("the behaviour has changed");
  }
}
JAVASCRIPT
node run.mjs
