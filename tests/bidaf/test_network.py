from itertools import pairwise

import numpy as np
import onnx
import pytest

from onnx_refit.errors import ModelError, WeightsError
from onnx_refit.model.verify import Runner
from onnx_refit.samples.bidaf import bundle, checkpoints
from onnx_refit.samples.bidaf.answering import best_span
from onnx_refit.samples.bidaf.convert import LSTM_WEIGHTS, REFITTED, onnx_weights
from onnx_refit.samples.bidaf.network import build_network
from onnx_refit.samples.bidaf.prepare import CONTEXT, QUESTION
from onnx_refit.samples.bidaf.vocabulary import Passage, Vocabulary, feeds
from onnx_refit.tensors import spec_of_value_info
from tests.bidaf.reference import Reference

SMALL = Vocabulary(("", "<unk>", "fox", "the"), ("", "<unk>", "a", "f", "ü"))


def random_checkpoint(seed=0, words=4, chars=5):
    rng = np.random.default_rng(seed)
    shapes = {name: value.shape for name, value in checkpoints.load_checkpoint().items()}
    shapes |= {"word_emb": (words, 50), "char_emb": (chars, 8)}
    made = {name: (rng.standard_normal(shape) * 0.3).astype(np.float32) for name, shape in shapes.items()}
    made["word_emb"] = made["word_emb"].astype(np.float16).astype(np.float32)
    return made


def run(model, context, question):
    return Runner(model).run(feeds(Passage.of(context), Passage.of(question)))


def test_the_outside_is_that_of_the_published_file(original_model):
    graph = original_model.graph
    assert [str(spec_of_value_info(value)) for value in graph.input] == [
        "context_word: string[c, 1]",
        "context_char: string[c, 1, 1, 16]",
        "query_word: string[q, 1]",
        "query_char: string[q, 1, 1, 16]",
    ]
    assert [str(spec_of_value_info(value)) for value in graph.output][:2] == [
        "start_pos: int32[1]",
        "end_pos: int32[1]",
    ]
    assert {entry.domain: entry.version for entry in original_model.opset_import} == {"": 9, "ai.onnx.ml": 1}
    bare = build_network(SMALL, onnx_weights(random_checkpoint()), scores=False)
    assert [value.name for value in bare.graph.output] == ["start_pos", "end_pos"]


def test_the_inside_has_what_the_passes_will_meet(original_model):
    nodes = {node.name: node for node in original_model.graph.node}
    assert {"CategoryMapper", "Dropout", "Scan", "Hardmax", "Compress", "LSTM", "Clip"} <= {
        node.op_type for node in nodes.values()
    }
    for number, name in enumerate(("context_word", "context_char", "query_word", "query_char"), 4):
        readers = [node for node in nodes.values() if name in node.input]
        assert [node.name for node in readers] == [f"CategoryMapper_{number}"]
    tail = ["Transpose_22", "Hardmax_23", "Cast_24", "Reshape_25", "Compress_27"]
    for first, second in pairwise(tail):
        assert nodes[first].output[0] in nodes[second].input
    assert nodes["Compress_27"].output[0] == "start_pos"
    lstm = nodes["modelling_1"]
    sizes = {tensor.name: list(tensor.dims) for tensor in original_model.graph.initializer}
    assert [sizes[name] for name in lstm.input[1:4]] == [[2, 400, 800], [2, 400, 100], [2, 800]]
    assert set(REFITTED) <= set(sizes)


def test_padding_is_0_and_unknown_is_1(original_model):
    nodes = {node.name: node for node in original_model.graph.node}
    for number in range(4, 8):
        given = {one.name: onnx.helper.get_attribute_value(one) for one in nodes[f"CategoryMapper_{number}"].attribute}
        known = dict(zip(given["cats_strings"], given["cats_int64s"], strict=True))
        assert known[b""] == 0
        assert given["default_int64"] == 1
        assert 1 not in known.values()


@pytest.mark.parametrize("seed", range(3))
def test_random_weights_against_numpy(seed):
    """Random weights of ordinary size: a swapped gate, a lost bias or a wrong axis shows at once."""
    checkpoint = random_checkpoint(seed)
    model = build_network(SMALL, onnx_weights(checkpoint))
    reference = Reference(checkpoint, SMALL.words, SMALL.chars)
    for context, question in ((CONTEXT, QUESTION), ("Fuß", "aaaaaaaaaaaaaaaaaaaaaaaa the ?"), ("the fox " * 9, "fox")):
        got = run(model, context, question)
        start, end = reference.scores(context, question)
        np.testing.assert_allclose(got["start_scores"][0], start, atol=2e-4)
        np.testing.assert_allclose(got["end_scores"][0], end, atol=2e-4)
        assert (got["start_pos"][0], got["end_pos"][0]) == best_span(start, end)[:2]


def test_the_trained_weights_against_numpy(original_model, questions):
    vocabulary = bundle.bundled_vocabulary()
    reference = Reference(checkpoints.load_checkpoint(), vocabulary.words, vocabulary.chars)
    short = sorted(questions, key=lambda one: len(one.context))[:3]
    for context, question in ((CONTEXT, QUESTION), *((one.context, one.text) for one in short)):
        got = run(original_model, context, question)
        start, end = reference.scores(context, question)
        np.testing.assert_allclose(np.exp(got["start_scores"][0]), np.exp(start), atol=1e-4)
        np.testing.assert_allclose(np.exp(got["end_scores"][0]), np.exp(end), atol=1e-4)


def test_the_fox_is_brown(original_model):
    got = run(original_model, CONTEXT, QUESTION)
    assert (got["start_pos"].tolist(), got["end_pos"].tolist()) == ([2], [2])
    assert got["start_pos"].dtype == np.int32


def test_conversion_reorders_gates():
    checkpoint = random_checkpoint()
    gates = np.repeat(np.arange(4, dtype=np.float32), 100)  # i f g o
    checkpoint["mod1.bias_hh_l0_reverse"] = gates
    converted = onnx_weights(checkpoint)[LSTM_WEIGHTS["mod1"][2]]
    assert converted.shape == (2, 800)
    assert converted[1, 400::100].tolist() == [0, 3, 1, 2]  # i o f g


def test_conversion_does_not_change_its_argument_and_is_contiguous():
    checkpoint = random_checkpoint()
    before = {name: value.copy() for name, value in checkpoint.items()}
    for name, array in onnx_weights(checkpoint).items():
        assert array.flags.c_contiguous, name
        np.copyto(array, 1)
    for name, value in before.items():
        np.testing.assert_array_equal(checkpoint[name], value)


def test_conversion_says_what_is_wrong():
    checkpoint = random_checkpoint()
    del checkpoint["att"]
    with pytest.raises(WeightsError, match=r"att: the checkpoint has no such tensor"):
        onnx_weights(checkpoint)
    checkpoint["att"] = np.zeros((3, 100), np.float32)
    with pytest.raises(WeightsError, match=r"att: has shape \[3, 100\], not \[3, 200\]"):
        onnx_weights(checkpoint)


def test_a_vocabulary_must_begin_with_padding():
    with pytest.raises(ModelError, match="words"):
        Vocabulary(("a", "b"), ("", "b"))
    with pytest.raises(ModelError, match="characters"):
        Vocabulary(("", "b"), ("", "b", "b"))


def test_names_fit_all_bundled_checkpoints(original_model):
    declared = {tensor.name: list(tensor.dims) for tensor in original_model.graph.initializer}
    for name in bundle.checkpoint_names():
        for tensor, array in bundle.checkpoint_weights(name).items():
            assert declared[tensor] == list(array.shape)
