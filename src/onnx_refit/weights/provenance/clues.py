"""What the graph tells about its weights besides their bits: where they stand and which modules use them."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import onnx

from onnx_refit.weights.nearest import tokens

_USE = re.compile(r"^(?P<node>.*) \((?P<op>[\w.]+)\)\[(?P<index>\d+)\]$", re.DOTALL)
# Words that exporters make up; they name no module.
_GENERIC = frozenset(
    {"onnx", "val", "value", "tmp", "temp", "weight", "initializer", "init", "constant", "const", "node", "param"}
    | {"parameter", "t", "tensor", "output", "input", "matmul", "gemm", "conv", "add", "mul", "div", "sub", "linear"}
    | {"transpose", "reshape", "concat", "slice", "split", "cast", "gather", "unsqueeze"}
)


@dataclass(frozen=True)
class Use:
    """One use of a weight.

    Attributes:
        node: the node's name, or the path of the module that it belongs to.
        op: the operator.
        index: which input.
    """

    node: str
    op: str
    index: int


@dataclass(frozen=True)
class Clues:
    """The surroundings of weights.

    Attributes:
        order: weight names in the order in which the graph first uses them.
        uses: weight name -> its uses.
    """

    order: Sequence[str]
    uses: Mapping[str, tuple[Use, ...]] = field(default_factory=dict)

    @classmethod
    def of_uses(cls, uses: Mapping[str, Iterable[str]]) -> Clues:
        """Clues from texts ``"node_name (OpType)[input_index]"``, weights in the order of their uses."""
        parsed: dict[str, tuple[Use, ...]] = {}
        for name, texts in uses.items():
            matches = [match for text in texts if (match := _USE.match(text))]
            parsed[name] = tuple(Use(m["node"], m["op"], int(m["index"])) for m in matches)
        return cls(tuple(uses), parsed)

    @classmethod
    def of_model(cls, model: onnx.ModelProto) -> Clues:
        """Clues from a graph in topological order, sub-graphs where they are used."""
        uses: dict[str, list[Use]] = {}

        def walk(graph: onnx.GraphProto) -> None:
            for node in graph.node:
                path = _module_path(node)
                for index, name in enumerate(node.input):
                    uses.setdefault(name, []).append(Use(path, node.op_type, index))
                for attribute in node.attribute:
                    if attribute.type == onnx.AttributeProto.GRAPH:
                        walk(attribute.g)

        walk(model.graph)
        return cls(tuple(uses), {name: tuple(found) for name, found in uses.items()})

    def sorted(self, names: Iterable[str]) -> list[str]:
        """Weights in graph order; those without a use come last, in the order given."""
        rank = {name: i for i, name in enumerate(self.order)}
        return sorted(names, key=lambda name: rank.get(name, len(rank)))


def _module_path(node: onnx.NodeProto) -> str:
    """The path of the module a node was exported from, with the node's name."""
    for entry in node.metadata_props:
        if entry.key == "pkg.torch.onnx.name_scopes":
            try:
                scopes = ast.literal_eval(entry.value)
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                break
            if isinstance(scopes, list) and len(scopes) > 1:
                return f"{scopes[-2]} {node.name}"
    return str(node.name)


def telling(name: str) -> tuple[str, ...]:
    """The words of a name, or nothing where an exporter made the whole of it up (``onnx::MatMul_214``)."""
    words = tokens(name)
    return words if any(w.isalpha() and w not in _GENERIC and len(w) > 1 for w in words) else ()


def name_agreement(weight: tuple[str, ...], tensor: tuple[str, ...]) -> float:
    """How far the words of a weight's name agree with those of a tensor's, 0 to 1; the ends count most."""
    if not weight or not tensor:
        return 0.0
    suffix = 0
    while suffix < min(len(weight), len(tensor)) and weight[-1 - suffix] == tensor[-1 - suffix]:
        suffix += 1
    shared = len(set(weight) & set(tensor)) / len(set(weight) | set(tensor))
    return 0.6 * suffix / min(len(weight), len(tensor)) + 0.4 * shared


def path_agreement(path: tuple[str, ...], tensor: tuple[str, ...]) -> float:
    """How much of a tensor's module path occurs, in order, in the path of a node, 0 to 1."""
    module = tensor[:-1]
    if not path or not module:
        return 0.0
    at = found = 0
    for word in module:
        try:
            at = path.index(word, at) + 1
        except ValueError:
            continue
        found += 1
    return found / len(module)


def shared_prefix(left: tuple[str, ...], right: tuple[str, ...]) -> float:
    """The length of the common beginning of two names over the longer of their module paths, 0 to 1."""
    common = 0
    for a, b in zip(left, right, strict=False):
        if a != b:
            break
        common += 1
    return min(1.0, common / max(1, max(len(left), len(right)) - 1))
