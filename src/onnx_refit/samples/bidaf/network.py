"""The BiDAF network as ONNX: a structural twin of the published ``bidaf-9.onnx``.

Four string inputs, each into a CategoryMapper; opset 9; outputs ``start_pos`` and ``end_pos``, chosen by Hardmax, Cast
and Compress; LSTM weights ``W [2, 400, in]``, ``R [2, 400, 100]``, ``B [2, 800]`` with the gates in the order i o f c.
The network is that of Seo et al. (arXiv 1611.01603), hidden size 100, as ``onnx_refit.samples.bidaf.training`` trains
it. Two things go beyond the published file: the outputs ``start_scores`` and ``end_scores`` (log-probabilities
``[1, c]``; left out on request), and that the positions are those of the best span, not of the best word each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from onnx_refit.samples.bidaf.convert import HIDDEN, LSTM_WEIGHTS
from onnx_refit.samples.bidaf.text import WORD_LENGTH
from onnx_refit.samples.bidaf.vocabulary import CONTEXT_CHAR, CONTEXT_WORD, QUERY_CHAR, QUERY_WORD, UNKNOWN, Vocabulary
from onnx_refit.tensors import Array

SPAN = 16
"""The longest answer, in words: end <= start + 15."""

START_POS, END_POS = "start_pos", "end_pos"
START_SCORES, END_SCORES = "start_scores", "end_scores"

_SMALLEST = 1e-30
"""Below this a probability counts as this, so that its logarithm is a number."""

_OUTSIDE = -1e30
"""The score of a word outside of the context."""

_MAPPERS = {CONTEXT_WORD: 4, CONTEXT_CHAR: 5, QUERY_WORD: 6, QUERY_CHAR: 7}


def build_network(vocabulary: Vocabulary, weights: Mapping[str, Array], *, scores: bool = True) -> ModelProto:
    """Write the network down as an ONNX model.

    Args:
        vocabulary: words and characters, for the CategoryMappers.
        weights: tensors as ``convert.onnx_weights`` gives them; they become the initializers, under their names.
        scores: declare ``start_scores`` and ``end_scores`` as outputs too.

    Returns:
        Inputs ``context_word [c, 1]``, ``context_char [c, 1, 1, 16]``, ``query_word [q, 1]``,
        ``query_char [q, 1, 1, 16]``, strings; outputs ``start_pos``, ``end_pos`` int32 ``[1]`` (inclusive), and
        ``start_scores``, ``end_scores`` float32 ``[1, c]``.
    """
    graph = _Graph(vocabulary)
    context = graph.embed("context", CONTEXT_WORD, CONTEXT_CHAR)
    question = graph.embed("query", QUERY_WORD, QUERY_CHAR)
    h = graph.lstm("context_lstm", "ctx_lstm", context)
    u = graph.lstm("query_lstm", "ctx_lstm", question)
    merged = graph.attend(h, u)
    modelled = graph.lstm("modelling_1", "mod1", merged)
    modelled = graph.lstm("modelling_2", "mod2", modelled)
    start_logits, start = graph.distribution("start", [merged, modelled])
    summary = graph.node("MatMul", [start, modelled], "start_summary")
    spread = graph.node("Mul", [modelled, summary], "start_product")
    # [c, 200] of the same row: the LSTM reads the expected start word beside every word
    shape = graph.node("Shape", [start_logits], "column_shape")
    one = helper.make_tensor("one", TensorProto.FLOAT, [1], [1.0])
    ones = graph.node("ConstantOfShape", [shape], "column_of_ones", value=one)
    repeated = graph.node("Mul", [ones, summary], "summary_rows")
    joined = graph.node("Concat", [merged, modelled, repeated, spread], "end_sequence", axis=1)
    last = graph.lstm("end_lstm", "end_lstm", joined)
    graph.distribution("end", [merged, last])
    graph.answer(start_logits)
    return graph.model(weights, scores)


class _Graph:
    """Nodes in the order they are made."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._nodes: list[NodeProto] = []
        self._constants: dict[str, TensorProto] = {}

    def node(
        self,
        op_type: str,
        inputs: Sequence[str],
        name: str,
        *,
        outputs: Sequence[str] | None = None,
        domain: str = "",
        **attributes: Any,
    ) -> str:
        """Add a node; the name of its first output."""
        made = list(outputs) if outputs is not None else [f"{name}_output"]
        self._nodes.append(helper.make_node(op_type, list(inputs), made, name=name, domain=domain, **attributes))
        return made[0]

    def constant(self, name: str, values: Sequence[int], dtype: object = np.int64) -> str:
        """Add a small constant; its name."""
        self._constants[name] = numpy_helper.from_array(np.asarray(values, dtype), name)  # type: ignore[call-overload]
        return name

    def embed(self, side: str, words: str, chars: str) -> str:
        """Strings [n, 1] and [n, 1, 1, 16] -> float32 [n, 150]: character CNN, word vector, two highway layers."""
        word_ids = self._mapped(words, *self._vocabulary.word_table)
        char_ids = self._mapped(chars, *self._vocabulary.char_table)
        rows = self.node("Reshape", [char_ids, self.constant("char_rows", [-1, WORD_LENGTH])], f"{side}_char_rows")
        letters = self.node("Gather", ["char_embedding", rows], f"{side}_char_vectors", axis=0)
        # one picture of n lines and 16 columns with 8 channels: one large convolution instead of n small ones
        letters = self.node("Transpose", [letters], f"{side}_char_channels", perm=[2, 0, 1])
        letters = self.node("Unsqueeze", [letters], f"{side}_char_picture", axes=[0])
        letters = self.node("Dropout", [letters], f"{side}_char_dropout", ratio=0.2)
        responses = self.node("Conv", [letters, "char_conv_W", "char_conv_B"], f"{side}_char_conv", kernel_shape=[1, 5])
        responses = self.node("Relu", [responses], f"{side}_char_relu")
        best = self.node("ReduceMax", [responses], f"{side}_char_max", axes=[3], keepdims=0)
        best = self.node("Squeeze", [best], f"{side}_char_plane", axes=[0])
        features = self.node("Transpose", [best], f"{side}_char_features", perm=[1, 0])
        flat = self.node("Squeeze", [word_ids], f"{side}_word_row", axes=[1])
        vectors = self.node("Gather", ["word_embedding", flat], f"{side}_word_vectors16", axis=0)
        vectors = self.node("Cast", [vectors], f"{side}_word_vectors", to=TensorProto.FLOAT)
        x = self.node("Concat", [features, vectors], f"{side}_vectors", axis=1)
        for layer in (0, 1):
            x = self._highway(f"{side}_highway_{layer}", layer, x)
        return x

    def _mapped(self, name: str, strings: Sequence[str], numbers: Sequence[int]) -> str:
        return self.node(
            "CategoryMapper",
            [name],
            f"CategoryMapper_{_MAPPERS[name]}",
            domain="ai.onnx.ml",
            cats_strings=list(strings),
            cats_int64s=list(numbers),
            default_int64=UNKNOWN,
        )

    def _highway(self, title: str, layer: int, x: str) -> str:
        """[n, 150] -> [n, 150]: x + gate * (transform - x)."""
        both = self.node("MatMul", [x, f"highway_{layer}_W"], f"{title}_product")
        both = self.node("Add", [both, f"highway_{layer}_B"], f"{title}_sum")
        transform = self.node("Slice", [both], f"{title}_transform", axes=[1], starts=[0], ends=[150])
        gate = self.node("Slice", [both], f"{title}_gate", axes=[1], starts=[150], ends=[300])
        transform = self.node("Relu", [transform], f"{title}_relu")
        gate = self.node("Sigmoid", [gate], f"{title}_sigmoid")
        change = self.node("Sub", [transform, x], f"{title}_difference")
        change = self.node("Mul", [gate, change], f"{title}_change")
        return self.node("Add", [x, change], f"{title}_out")

    def lstm(self, title: str, layer: str, x: str) -> str:
        """[n, in] -> [n, 200], both directions side by side."""
        x = self.node("Dropout", [x], f"{title}_dropout", ratio=0.2)
        sequence = self.node("Unsqueeze", [x], f"{title}_sequence", axes=[1])
        out = self.node("LSTM", [sequence, *LSTM_WEIGHTS[layer]], title, hidden_size=HIDDEN, direction="bidirectional")
        return self.node("Reshape", [out, self.constant("lstm_rows", [-1, 2 * HIDDEN])], f"{title}_rows")

    def attend(self, h: str, u: str) -> str:
        """Attention flow: context [c, 200] and question [q, 200] -> [c, 800]."""
        # similarity = w1.h + w2.u + w3.(h*u) = w1.h + (w2 + w3*h).u
        scaled = self.node("Mul", [h, "attention_product"], "attention_scaled")
        scaled = self.node("Add", [scaled, "attention_query"], "attention_key")
        columns = self.node("Transpose", [u], "attention_columns", perm=[1, 0])
        pairs = self.node("MatMul", [scaled, columns], "attention_pairs")
        own = self.node("MatMul", [h, "attention_context"], "attention_own")
        similarity = self.node("Add", [pairs, own], "similarity")
        weights = self.node("Softmax", [similarity], "attention_to_query", axis=1)
        to_question = self.node("MatMul", [weights, u], "query_of_word")
        best = self.node("ReduceMax", [similarity], "similarity_best", axes=[1], keepdims=1)
        best = self.node("Transpose", [best], "similarity_best_row", perm=[1, 0])
        best = self.node("Softmax", [best], "attention_to_context", axis=1)
        to_context = self.node("MatMul", [best, h], "context_of_query")
        left = self.node("Mul", [h, to_question], "attention_left")
        right = self.node("Mul", [h, to_context], "attention_right")
        return self.node("Concat", [h, to_question, left, right], "attention", axis=1)

    def distribution(self, side: str, parts: Sequence[str]) -> tuple[str, str]:
        """Features [c, 1000] in parts -> logits [c, 1] and probabilities [1, c]; adds the log-probabilities."""
        x = self.node("Concat", parts, f"{side}_features", axis=1)
        x = self.node("Dropout", [x], f"{side}_dropout", ratio=0.2)
        logits = self.node("MatMul", [x, f"{side}_W"], f"{side}_logits")
        row = self.node("Transpose", [logits], f"{side}_row", perm=[1, 0])
        probability = self.node("Softmax", [row], f"{side}_softmax", axis=1)
        clipped = self.node("Clip", [probability], f"{side}_clip", min=_SMALLEST, max=1.0)
        self.node("Log", [clipped], f"{side}_log", outputs=[f"{side}_scores"])
        return logits, probability

    def answer(self, sequence: str) -> None:
        """The best span's two words: the best pair by sum of scores with start <= end <= start + 15.

        Args:
            sequence: any float32 [c, 1], for its length.
        """
        counter = self._counter(sequence)
        positions = self.node("Transpose", [counter], "Transpose_21", perm=[1, 0])
        sides = (
            (START_SCORES, END_SCORES, [0, 0, 0, 0, 0, SPAN - 1], START_POS, (22, 23, 24, 27)),
            (END_SCORES, START_SCORES, [0, 0, SPAN - 1, 0, 0, 0], END_POS, (28, 29, 30, 33)),
        )
        for own, other, pads, result, (transpose, hardmax, cast, compress) in sides:
            mine = self.node("Unsqueeze", [own], f"{result}_own", axes=[0])
            theirs = self.node("Unsqueeze", [other], f"{result}_other", axes=[0])
            # padded in a node of its own: ONNX's reference evaluator does not take a window larger than the input
            theirs = self.node("Pad", [theirs], f"{result}_padded", pads=pads, value=_OUTSIDE)
            partner = self.node("MaxPool", [theirs], f"{result}_partner", kernel_shape=[SPAN])
            rank = self.node("Sum", [mine, partner], f"{result}_rank")
            column = self.node("Reshape", [rank, self.constant("column", [-1, 1])], f"{result}_column")
            row = self.node("Transpose", [column], f"Transpose_{transpose}", perm=[1, 0])
            mark = self.node("Hardmax", [row], f"Hardmax_{hardmax}", axis=1)
            mark = self.node("Cast", [mark], f"Cast_{cast}", to=TensorProto.BOOL)
            mark = self.node("Reshape", [mark, self.constant("flat", [-1])], f"Reshape_{cast + 1}")
            self.node("Compress", [positions, mark], f"Compress_{compress}", outputs=[result])

    def _counter(self, sequence: str) -> str:
        """[c, 1] -> int32 [c, 1]: 0, 1, 2, ..., step by step as recurrent frameworks export it."""
        one = numpy_helper.from_array(np.ones(1, np.int32), "counter_step")
        body = helper.make_graph(
            [
                helper.make_node("Add", ["counter_state", "counter_step"], ["counter_next"], name="counter_add"),
                helper.make_node("Identity", ["counter_state"], ["counter_now"], name="counter_now"),
            ],
            "counter",
            [_info("counter_state", TensorProto.INT32, [1]), _info("counter_element", TensorProto.FLOAT, [1])],
            [_info("counter_next", TensorProto.INT32, [1]), _info("counter_now", TensorProto.INT32, [1])],
            [one],
        )
        first = self.constant("counter_first", [0], np.int32)
        outputs = ["counter_last", "counter_positions"]
        self.node("Scan", [first, sequence], "Scan_20", outputs=outputs, body=body, num_scan_inputs=1)
        return outputs[1]

    def model(self, weights: Mapping[str, Array], scores: bool) -> ModelProto:
        """Put the model together and check it."""
        initializers = [numpy_helper.from_array(np.ascontiguousarray(array), name) for name, array in weights.items()]
        outputs = [_info(START_POS, TensorProto.INT32, [1]), _info(END_POS, TensorProto.INT32, [1])]
        if scores:
            outputs += [_info(name, TensorProto.FLOAT, [1, "c"]) for name in (START_SCORES, END_SCORES)]
        inputs = [
            _info(CONTEXT_WORD, TensorProto.STRING, ["c", 1]),
            _info(CONTEXT_CHAR, TensorProto.STRING, ["c", 1, 1, WORD_LENGTH]),
            _info(QUERY_WORD, TensorProto.STRING, ["q", 1]),
            _info(QUERY_CHAR, TensorProto.STRING, ["q", 1, 1, WORD_LENGTH]),
        ]
        graph = helper.make_graph(self._nodes, "bidaf", inputs, outputs, [*initializers, *self._constants.values()])
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", 9), helper.make_opsetid("ai.onnx.ml", 1)],
            ir_version=4,
            producer_name="onnx-refit",
        )
        onnx.checker.check_model(model)
        return model


def _info(name: str, element: int, shape: Sequence[int | str]) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, element, shape)
