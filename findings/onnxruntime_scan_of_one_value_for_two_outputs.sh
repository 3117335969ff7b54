#!/usr/bin/env bash
# onnxruntime 1.32.0 (CPU, onnx 1.23.2): a Scan whose body gives one value both as the next state and as the step's output, by listing its
# name twice among the body's outputs. onnx.checker takes the model, with full_check, and onnx's ReferenceEvaluator computes it. onnxruntime
# answers without an error, but the state is never carried: every step starts from the first one, and the last state is that too. With an
# Identity between the two outputs all three agree.
#
# Seen, for the running sums of (1, 2), (3, 4), (5, 6) from (0, 0):
#   with Identity     last (9, 12), all (1, 2), (4, 6), (9, 12)
#   the value twice   last (0, 0),  all (1, 2), (3, 4), (5, 6)
# Fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check numpy==2.4.6 onnx==1.23.2 onnxruntime==1.32.0
"$folder/venv/bin/python" - <<'PYTHON'
import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator


def typed(name, *dims):
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, dims)


def running_sums(twice):
    """The last sum and all of them, as a Scan."""
    step, outputs = [helper.make_node("Add", ["sum", "x"], ["next"])], [typed("next", 2), typed("next", 2)]
    if not twice:
        step.append(helper.make_node("Identity", ["next"], ["copy"]))
        outputs[1] = typed("copy", 2)
    body = helper.make_graph(step, "step", [typed("sum", 2), typed("x", 2)], outputs)
    scan = helper.make_node("Scan", ["start", "xs"], ["last", "all"], num_scan_inputs=1, body=body)
    graph = helper.make_graph([scan], "sums", [typed("start", 2), typed("xs", "time", 2)], [typed("last", 2), typed("all", "time", 2)])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model


feed = {"start": np.zeros(2, "float32"), "xs": np.arange(1, 7, dtype="float32").reshape(3, 2)}
right, wrong = [[9.0, 12.0], [[1.0, 2.0], [4.0, 6.0], [9.0, 12.0]]], [[0.0, 0.0], [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]]
for twice in (False, True):
    model = running_sums(twice)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found = [a.tolist() for a in session.run(None, feed)]
    print(onnxruntime.__version__, "the value twice" if twice else "with Identity", found)
    assert [np.asarray(a).tolist() for a in ReferenceEvaluator(model).run(None, feed)] == right
    assert found == (wrong if twice else right), "the behaviour has changed"
PYTHON
