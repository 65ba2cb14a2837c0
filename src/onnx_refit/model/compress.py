"""The pass that replaces Compress by Gather: few engines know Compress, all know Gather."""

from __future__ import annotations

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto

from onnx_refit.model.edit import Builder, constant_of, is_onnx, label, replace_node
from onnx_refit.model.graph import all_graphs, attribute
from onnx_refit.model.nodewise import NodeRewrite, Site
from onnx_refit.model.passes import Change
from onnx_refit.model.shapes import Shapes


class ReplaceCompress(NodeRewrite):
    """Compress by a constant condition becomes Gather of constant places; by any other, NonZero -> Gather."""

    name = "replace-compress"
    operator = "Compress"

    def ensures(self, model: ModelProto) -> str | None:
        """No Compress is left."""
        left = [label(n) for graph in all_graphs(model.graph) for n in graph.node if is_onnx(n, "Compress")]
        return f"{left[0]} is still a Compress" if left else None

    def rewrite(self, site: Site) -> list[Change]:
        """Replace one Compress."""
        return [_replace(site.model, site.graph, site.node, site.facts.shapes)]


def data_and_axis(build: Builder, compress: NodeProto, shapes: Shapes) -> tuple[str, object]:
    """What a Gather in the place of a Compress reads, and along which axis: without one, the flattened data."""
    data, axis = compress.input[0], attribute(compress, "axis")
    if axis is not None:
        return data, axis
    known = shapes.dims(data)
    if known is None or len(known) != 1:
        data = build.node("Reshape", [data, build.constant([-1], wish="flat")], name=f"{label(compress)}_flat")
    return data, 0


def _replace(model: ModelProto, graph: GraphProto, node: NodeProto, shapes: Shapes) -> Change:
    build = Builder(model, graph)
    data, axis = data_and_axis(build, node, shapes)
    condition = constant_of((graph, model.graph), node.input[1])
    if condition is not None:
        places = build.constant(np.flatnonzero(condition), wish=f"{label(node)}_places")
        what = f"replaced by Gather of {int(np.count_nonzero(condition))} constant places"
    else:
        found = build.node("NonZero", [node.input[1]], name=f"{label(node)}_NonZero")
        places = build.node("Reshape", [found, build.constant([-1], wish="flat")], name=f"{label(node)}_places")
        what = "replaced by NonZero -> Gather"
    build.node("Gather", [data, places], name=f"{label(node)}_Gather", output=node.output[0], axis=axis)
    replace_node(graph, node, build.nodes)
    return Change(label(node), "Compress", what, "few engines run Compress")
