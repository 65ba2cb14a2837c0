"""What the graph tells about its weights besides their bits: where they stand and which modules use them."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

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


# What the inputs of operators are called in checkpoints, by the last word of the name.
_SCALES = frozenset({"weight", "gamma", "scale", "kernel", "w"})
_BIASES = frozenset({"bias", "beta", "b"})
_ROLES: dict[tuple[str, int], frozenset[str]] = {
    ("BatchNormalization", 1): _SCALES,
    ("BatchNormalization", 2): _BIASES,
    ("BatchNormalization", 3): frozenset({"mean"}),
    ("BatchNormalization", 4): frozenset({"var", "variance"}),
    ("MatMul", 1): _SCALES,
} | {
    (op, index): role
    for op in ("Conv", "ConvTranspose", "Gemm", "LayerNormalization", "InstanceNormalization", "GroupNormalization")
    for index, role in ((1, _SCALES), (2, _BIASES))
}

# Initial states of recurrent operators: by operator, the inputs that hold them.
_STATES = {"LSTM": {5, 6}, "GRU": {5}, "RNN": {5}}


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

    def is_state(self, name: str) -> bool:
        """Whether a weight is only ever the initial state of a recurrent operator."""
        uses = self.uses.get(name, ())
        return bool(uses) and all(use.index in _STATES.get(use.op, ()) for use in uses)

    def fits_role(self, name: str, last_word: str) -> bool:
        """Whether a tensor whose name ends so is what some operator reads at the place of this weight."""
        return any(last_word in _ROLES.get((use.op, use.index), ()) for use in self.uses.get(name, ()))

    def partner(self, name: str) -> str | None:
        """The weight that the node which adds this bias multiplies with, None where the graph does not say."""
        for use in self.uses.get(name, ()):
            if use.index == 2 and (use.node, use.op) in self._factors:
                return self._factors[use.node, use.op]
        return None

    @cached_property
    def _factors(self) -> dict[tuple[str, str], str]:
        """The weight at input 1 of each node that also adds a bias."""
        return {
            (use.node, use.op): name
            for name, uses in self.uses.items()
            for use in uses
            if use.index == 1 and use.op in ("Conv", "ConvTranspose", "Gemm")
        }

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
