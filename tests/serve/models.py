"""Small models whose answers say which weights gave them."""

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def affine(scale: float, width: int = 4, mix_rows: bool = False) -> onnx.ModelProto:
    """y = x * scale + scale: from an answer to ones, half of it is the scale."""
    weights = [
        numpy_helper.from_array(np.eye(width, dtype=np.float32) * np.float32(scale), "w"),
        numpy_helper.from_array(np.full(width, scale, np.float32), "b"),
    ]
    nodes = [helper.make_node("MatMul", ["x", "w"], ["xw"]), helper.make_node("Add", ["xw", "b"], ["y0"])]
    if mix_rows:
        nodes.append(helper.make_node("ReduceMean", ["y0"], ["mean"], keepdims=1))
        nodes.append(helper.make_node("Sub", ["y0", "mean"], ["y"]))
    else:
        nodes.append(helper.make_node("Identity", ["y0"], ["y"]))
    graph = helper.make_graph(
        nodes,
        "affine",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", width])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", width])],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def affine_weights(scale: float, width: int = 4) -> dict[str, np.ndarray]:
    return {"w": np.eye(width, dtype=np.float32) * np.float32(scale), "b": np.full(width, scale, np.float32)}


def every_type() -> onnx.ModelProto:
    """One input and one equal output of every type the protocol has, and a weight that only one output adds."""
    kinds = {
        "BOOL": TensorProto.BOOL, "UINT8": TensorProto.UINT8, "UINT16": TensorProto.UINT16,
        "UINT32": TensorProto.UINT32, "UINT64": TensorProto.UINT64, "INT8": TensorProto.INT8,
        "INT16": TensorProto.INT16, "INT32": TensorProto.INT32, "INT64": TensorProto.INT64,
        "FP16": TensorProto.FLOAT16, "FP64": TensorProto.DOUBLE, "BYTES": TensorProto.STRING,
    }  # fmt: skip
    nodes = [helper.make_node("Identity", [f"in_{name}"], [f"out_{name}"]) for name in kinds]
    nodes.append(helper.make_node("Add", ["in_FP32", "w"], ["out_FP32"]))
    kinds["FP32"] = TensorProto.FLOAT
    graph = helper.make_graph(
        nodes,
        "types",
        [helper.make_tensor_value_info(f"in_{name}", kind, ["n", 2]) for name, kind in kinds.items()],
        [helper.make_tensor_value_info(f"out_{name}", kind, ["n", 2]) for name, kind in kinds.items()],
        [numpy_helper.from_array(np.ones(2, np.float32), "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def slow(scale: float) -> onnx.ModelProto:
    """As ``affine``, but counts to the input ``n`` first: as slow as one asks for."""
    counter = helper.make_graph(
        [
            helper.make_node("Identity", ["go"], ["go_on"]),
            helper.make_node("Mul", ["so_far", "one"], ["next"]),
        ],
        "count",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("so_far", TensorProto.FLOAT, ["batch", 4]),
        ],
        [
            helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("next", TensorProto.FLOAT, ["batch", 4]),
        ],
    )
    nodes = [
        helper.make_node("Constant", [], ["one"], value=numpy_helper.from_array(np.array(1, np.float32), "one")),
        helper.make_node("Constant", [], ["go0"], value=numpy_helper.from_array(np.array(True), "go")),
        helper.make_node("Add", ["x", "b"], ["xb"]),
        helper.make_node("Loop", ["n", "go0", "xb"], ["y"], body=counter),
    ]
    graph = helper.make_graph(
        nodes,
        "slow",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4]),
            helper.make_tensor_value_info("n", TensorProto.INT64, []),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4])],
        [numpy_helper.from_array(np.full(4, scale, np.float32), "b")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
