"""A small ONNX file is not allowed large memory."""

import subprocess
import sys
from pathlib import Path

import pytest

from diffusion.common.onnx_network import MAX_THREAD_BYTES
from diffusion.common.threads import cores

OPEN = """
import resource, sys
from pathlib import Path
import numpy as np
from diffusion.common.errors import UserError
from diffusion.common.onnx_network import OnnxNetwork

path = Path(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    OnnxNetwork(path, path.read_bytes()).run(None, {"x": np.ones((1, 3), np.float32)})
except UserError:
    print("refused", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("operator", ["ConstantOfShape", "Expand"])
def test_constants_larger_than_the_limit_are_refused_unallocated(tmp_path: Path, operator: str) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    x, y = (helper.make_tensor_value_info(name, kind, shape) for name, shape in (("x", ["n", 3]), ("y", [])))
    count = (MAX_THREAD_BYTES * (cores() + 1) + 2**31) // 4
    shape = helper.make_tensor("shape", onnx.TensorProto.INT64, [1], [count])
    mean = helper.make_node("ReduceMean", ["x"], ["mean"], keepdims=0)
    inputs = ["shape"] if operator == "ConstantOfShape" else ["mean", "shape"]
    sum_node = helper.make_node("ReduceMean", ["large"], ["y"], keepdims=0)
    graph = helper.make_graph([mean, helper.make_node(operator, inputs, ["large"]), sum_node], "g", [x], [y], [shape])
    path = tmp_path / "bomb.onnx"
    onnx.save(helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 13)]), path)
    assert path.stat().st_size < 1000
    process = subprocess.run([sys.executable, "-c", OPEN, str(path)], capture_output=True, text=True, check=True)
    verdict, kib = process.stdout.split()
    assert verdict == "refused"
    assert int(kib) < 512 * 2**10
