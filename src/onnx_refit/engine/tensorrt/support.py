"""What NVIDIA's own parser says about a model, node by node, and which of our rewrites make it acceptable.

Needs the bindings but no GPU: this was run with TensorRT-RTX.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from onnx import ModelProto, NodeProto, TensorProto

from onnx_refit.engine.tensorrt.bindings import Bindings, last_errors
from onnx_refit.engine.tensorrt.build import build_plan
from onnx_refit.engine.tensorrt.network import Network
from onnx_refit.engine.tensorrt.options import TensorRtOptions
from onnx_refit.engine.tensorrt.profiles import plan_profile
from onnx_refit.errors import EngineError, UnsupportedModelError
from onnx_refit.model.passes import Change
from onnx_refit.model.prepare import prepare
from onnx_refit.tensors import spec_of_value_info

_STRINGS = (TensorProto.STRING,)


@dataclass(frozen=True)
class NodeVerdict:
    """What the parser says about one node.

    Attributes:
        name: the node's name, or that of its first output.
        op_type: its operator.
        accepted: whether the parser takes it.
        reason: why not; empty for an accepted one.
    """

    name: str
    op_type: str
    accepted: bool
    reason: str = ""


@dataclass(frozen=True)
class ModelVerdict:
    """What the parser says about one model.

    Attributes:
        nodes: every node of the main graph.
        parses: whether the model as a whole can be parsed.
        problems: what the parser said beyond single nodes.
    """

    nodes: tuple[NodeVerdict, ...]
    parses: bool
    problems: tuple[str, ...] = ()

    @property
    def refused(self) -> tuple[NodeVerdict, ...]:
        """The nodes that the parser does not take."""
        return tuple(node for node in self.nodes if not node.accepted)


@dataclass(frozen=True)
class Support:
    """Whether TensorRT can take a model, as it is and as we prepare it.

    Attributes:
        package: which TensorRT was asked.
        before: the model as it is.
        after: the prepared model.
        changes: the rewrites that were made, with the reason of each.
        blockers: what preparation knows to be in the way though the parser takes it (a Hardmax along a dynamic axis
            parses and fails in the build), as (node, operator, reason).
        built: whether an ahead-of-time build of the prepared model succeeded; None if it was not tried.
        build_error: TensorRT's words where it did not.
    """

    package: str
    before: ModelVerdict
    after: ModelVerdict
    changes: tuple[Change, ...]
    blockers: tuple[tuple[str, str, str], ...]
    built: bool | None = None
    build_error: str = ""

    @property
    def acceptable(self) -> bool:
        """Whether the prepared model can be used, as far as was asked."""
        return self.after.parses and not self.blockers and self.built is not False


def check_support(
    bindings: Bindings, model: ModelProto, options: TensorRtOptions | None = None, *, build: bool = False
) -> Support:
    """Ask the parser about a model and about what our preparation makes of it.

    Args:
        bindings: TensorRT.
        model: the model, weights included; it is not changed.
        options: profiles and limits of the build.
        build: also build the prepared model ahead of time, without refittable weights. Full TensorRT needs a GPU for
            that, TensorRT-RTX does not.

    Raises:
        ModelError: the model cannot be prepared at all.
    """
    prepared = prepare(model, for_engine="tensorrt")
    after = parser_verdict(bindings, prepared.model)
    built, error = None, ""
    if build and after.parses:
        built, error = _try_build(bindings, prepared.model, options or TensorRtOptions())
    return Support(
        package=bindings.label,
        before=parser_verdict(bindings, model),
        after=after,
        changes=prepared.changes,
        blockers=tuple((one.node, one.op_type, one.reason) for one in prepared.blockers),
        built=built,
        build_error=error,
    )


def parser_verdict(bindings: Bindings, model: ModelProto) -> ModelVerdict:
    """What the parser says about a model as it is."""
    strings = [value.name for value in model.graph.input if value.type.tensor_type.elem_type in _STRINGS]
    logger, _network, parser, parses = _asked(bindings, model)
    accepted = _accepted_nodes(parser) if not parses else set(range(len(model.graph.node)))
    reasons, problems = _reasons(parser)
    nodes = []
    for index, node in enumerate(model.graph.node):
        reason = reasons.get(index, "") or ("" if index in accepted else _general_reason(parser, node))
        nodes.append(NodeVerdict(_title(node), node.op_type, index in accepted, "" if index in accepted else reason))
    problems.extend(f"input {name}: a tensor of strings" for name in strings)
    if not parses and not problems and all(node.accepted for node in nodes):
        problems.append(last_errors(logger))
    return ModelVerdict(tuple(nodes), parses, tuple(problems))


def _asked(bindings: Bindings, model: ModelProto) -> tuple[Any, Any, Any, bool]:
    trt = bindings.module
    logger = bindings.logger()
    # The parser must not outlive the builder and the network, so they travel together.
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    if not hasattr(parser, "supports_model_v2"):
        raise EngineError(f"the parser of {bindings.label} does not answer node by node", hint="Use 10.7 or newer")
    parses = bool(parser.supports_model_v2(model.SerializeToString()))
    return logger, (builder, network), parser, parses


def _accepted_nodes(parser: Any) -> set[int]:
    return {int(node) for index in range(parser.num_subgraphs) for node in parser.get_subgraph_nodes(index)}


def _reasons(parser: Any) -> tuple[dict[int, str], list[str]]:
    nodes: dict[int, str] = {}
    problems = []
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        words = " ".join(error.desc().split())
        code = str(error.code()).rpartition(".")[2].lower().replace("_", " ")
        reason = f"{words} ({code})" if words and words != error.node_operator() else code
        if error.node() >= 0:
            nodes[error.node()] = reason
        else:
            problems.append(reason)
    return nodes, problems


def _general_reason(parser: Any, node: NodeProto) -> str:
    if node.domain not in ("", "ai.onnx"):
        return f"it is of the domain {node.domain}"
    if not parser.supports_operator(node.op_type):
        return "the parser has no such operator"
    return "the parser takes the operator, but not here"


def _title(node: NodeProto) -> str:
    return node.name or next((output for output in node.output if output), "(unnamed)")


def _try_build(bindings: Bindings, model: ModelProto, options: TensorRtOptions) -> tuple[bool, str]:
    logger, (builder, network), parser, _ = _asked(bindings, model)
    network = builder.create_network(0)
    parser = bindings.module.OnnxParser(network, logger)
    try:
        if not parser.parse(model.SerializeToString()):
            raise UnsupportedModelError(last_errors(logger))
        inputs = [spec_of_value_info(value) for value in model.graph.input]
        profile = plan_profile(inputs, options.shapes, options.dimensions, options.fallback)
        build_plan(bindings, logger, Network(builder, network, parser, {}), profile, options, refit=False)
    except (EngineError, UnsupportedModelError) as error:
        return False, str(error)
    return True, ""
