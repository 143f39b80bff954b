#!/usr/bin/env bash
# onnxruntime 1.32.0 on a processor, the operator Cast from float: one guesses that a cast to INT4 does what one to INT8 does, cut off what is
# behind the point. To INT4 and UINT4 it rounds, and halves away from zero (0.5 becomes 1, 2.5 becomes 3), which neither Cast to INT8
# does (0 and 2) nor QuantizeLinear (0 and 2: halves to even). What rounds out of range comes around: 7.5, which is 7 in eight bits and
# within INT4 when cut off, becomes -8. So a graph that makes codes of 4 bits by Round, Clip and Cast is right, and one that adds 0.5 and
# relies on the cast, as for 8 bits, is off by one step in half of its codes. onnx's own reference cuts off in both.
#
# Needs a network for the installation only. Exits non-zero if the behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --no-compile onnxruntime==1.32.0 onnx==1.23.2 numpy==2.4.6 ml_dtypes==0.6.0
cat > "$folder/try.py" <<'PYTHON'
from importlib.metadata import version

import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

ROW = [None]
for name in ("onnxruntime", "onnx"):
    print(name, version(name))


def model(first, kind):
    """x -> `first`, which makes numbers of a type of whole numbers -> float."""
    last = "DequantizeLinear" if first == "QuantizeLinear" else "Cast"
    if first == "Cast":
        nodes = [helper.make_node("Cast", ["x"], ["codes"], to=kind), helper.make_node("Cast", ["codes"], ["y"], to=TensorProto.FLOAT)]
    else:
        nodes = [helper.make_node(first, ["x", "one"], ["codes"], output_dtype=kind), helper.make_node(last, ["codes", "one"], ["y"])]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ROW) for name in "xy"]
    one = [numpy_helper.from_array(np.float32(1), "one")]
    graph = helper.make_graph(nodes, "graph", ends[:1], ends[1:], one)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def run(made, x):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(made.SerializeToString(), options).run(None, {"x": x})[0].tolist()


x = np.array([0.4, 0.5, 0.6, 1.5, 2.5, 6.4, 6.6, 7.5, -0.5, -0.6, -2.5], np.float32)
print("of", [round(float(each), 1) for each in x])
seen = {}
for first in ("Cast", "QuantizeLinear"):
    for name in ("INT8", "INT4"):
        made = model(first, getattr(TensorProto, name))
        seen[first, name] = [int(each) for each in run(made, x)]
        print(f"{first} to {name}:", seen[first, name])
reference = [int(each) for each in ReferenceEvaluator(model("Cast", TensorProto.INT4)).run(None, {"x": x})[0]]
print("Cast to INT4, onnx's reference:", reference)
cut = [int(each) for each in np.trunc(x)]
even = [int(each) for each in np.clip(np.rint(x), -8, 7)]
away = [int(each) for each in np.trunc(x + np.copysign(0.5, x))]
assert seen["Cast", "INT8"] == cut == reference, "the behaviour has changed"
assert seen["QuantizeLinear", "INT4"] == even, "the behaviour has changed"
assert seen["Cast", "INT4"] == [-8 if each == 8 else each for each in away], "the behaviour has changed"
PYTHON
"$folder/venv/bin/python" "$folder/try.py"
