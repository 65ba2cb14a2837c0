"""What is taken for granted about ONNX's operators."""

from __future__ import annotations

import onnx
from onnx import AttributeProto, TensorProto, helper

from onnx_refit.model.graph import NESTING, all_graphs


def test_the_operators_that_hold_graphs_are_these() -> None:
    graphs = {onnx.defs.OpSchema.AttrType.GRAPH, onnx.defs.OpSchema.AttrType.GRAPHS}
    found = {
        schema.name
        for schema in onnx.defs.get_all_schemas_with_history()
        if schema.domain == "" and any(a.type in graphs for a in schema.attributes.values())
    }
    assert found == NESTING


def test_graphs_of_other_domains_are_found() -> None:
    inner = helper.make_graph([], "inner", [], [helper.make_tensor_value_info("v", TensorProto.FLOAT, [1])])
    one = helper.make_node("Own", ["x"], ["y"], domain="somewhere", body=inner)
    two = helper.make_node("Own", ["x"], ["z"], domain="somewhere")
    two.attribute.append(AttributeProto(name="bodies", type=AttributeProto.GRAPHS, graphs=[inner, inner]))
    graph = helper.make_graph([one, two], "outer", [], [])
    assert [each.name for each in all_graphs(graph)] == ["outer", "inner", "inner", "inner"]
