#!/usr/bin/env bash
# onnxruntime 1.32.0 (CPU, onnx 1.23.2): the ONNX operators LSTM and RNN on a sequence of no steps (seq_length 0, as a stream gives at a
# pause) answer without an error, but the last states, Y_h and Y_c, are 0 instead of the initial_h and initial_c that were given. A stream
# that carries its state from call to call has lost it then.
#
# Seen: LSTM Y_h [0.0, 0.0, 0.0] and Y_c [0.0, 0.0, 0.0], RNN Y_h [0.0, 0.0, 0.0], where every state came as 0.5.
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
from onnx import TensorProto, helper, numpy_helper

HIDDEN, INPUTS = 3, 2


def last_states(operator, gates, states):
    """What the operator gives as its last states for no steps of one sequence, from states of 0.5."""
    draw = np.random.default_rng(0)
    weights = {
        "W": draw.standard_normal((1, gates * HIDDEN, INPUTS)).astype("float32"),
        "R": draw.standard_normal((1, gates * HIDDEN, HIDDEN)).astype("float32"),
    }
    first, last = [f"initial_{s}" for s in states], [f"Y_{s}" for s in states]
    node = helper.make_node(operator, ["X", "W", "R", "", "", *first], ["Y", *last], hidden_size=HIDDEN)
    graph = helper.make_graph(
        [node],
        "no_steps",
        [helper.make_tensor_value_info("X", TensorProto.FLOAT, ["steps", 1, INPUTS])]
        + [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 1, HIDDEN]) for name in first],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 1, HIDDEN]) for name in last],
        [numpy_helper.from_array(a, name) for name, a in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    feed = {"X": np.zeros((0, 1, INPUTS), "float32"), **{name: np.full((1, 1, HIDDEN), 0.5, "float32") for name in first}}
    found = {name: a.ravel().tolist() for name, a in zip(last, session.run(None, feed))}
    print(onnxruntime.__version__, operator, found)
    return found


zeros = [0.0] * HIDDEN
assert last_states("LSTM", 4, ["h", "c"]) == {"Y_h": zeros, "Y_c": zeros}, "the behaviour has changed"
assert last_states("RNN", 1, ["h"]) == {"Y_h": zeros}, "the behaviour has changed"
PYTHON
