import math
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from onnx_refit.errors import InputError
from onnx_refit.samples.bidaf.answering import MAX_CONTEXT, answer, best_span, read_answer
from onnx_refit.samples.bidaf.prepare import CONTEXT, QUESTION
from onnx_refit.samples.bidaf.text import WORD_LENGTH
from onnx_refit.samples.bidaf.vocabulary import Passage, feeds

scores = st.integers(1, 40).flatmap(
    lambda n: st.tuples(*[arrays(np.float32, n, elements=st.integers(-5, 0).map(float))] * 2)
)


@settings(deadline=None)
@given(scores, st.integers(1, 20))
def test_best_span_is_the_best_of_all(pair, longest):
    start, end = pair
    n = len(start)
    spans = [(i, j) for i in range(n) for j in range(i, min(n, i + longest))]
    best = max(float(start[i]) + float(end[j]) for i, j in spans)
    first, last, score = best_span(start, end, longest)
    assert (first, last) == next((i, j) for i, j in spans if float(start[i]) + float(end[j]) == best)
    assert score == best


def test_the_place_of_the_answer(shared_engine):
    found = answer(shared_engine, CONTEXT, QUESTION)
    assert found.text == "brown"
    assert (found.first, found.last) == (2, 2)
    assert CONTEXT[found.start : found.end] == "brown"
    assert found.probability is not None
    assert 0.5 < found.probability <= 1


@pytest.mark.parametrize(
    ("context", "question"),
    [
        ("Zzyzx qwrtpl Xyzzy blorf.", "Where is Zzyzx?"),
        ("東京は日本の首都です。", "日本の首都は?"),
        ("القاهرة هي عاصمة مصر", "ما هي عاصمة مصر؟"),
        ("Москва — столица России.", "Столица?"),
        ("🦊 is 🟤", "🦊?"),
        ("a\u0300\u0301 x\x00y \ufeffz", "\u202e?"),
        ("word", "?"),
        ("x" * 5000, "y" * 5000),
    ],
    ids=["unknown words", "japanese", "arabic", "russian", "emoji", "combining", "one word", "long words"],
)
def test_any_text_gives_a_span_of_the_context(shared_engine, context, question):
    found = answer(shared_engine, context, question)
    assert found.text
    assert context[found.start : found.end] == found.text
    assert found.probability is not None
    assert math.isfinite(found.probability)
    assert 0 <= found.probability <= 1


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(context=st.text(max_size=60), question=st.text(max_size=20))
def test_random_text(shared_engine, context, question):
    try:
        found = answer(shared_engine, context, question)
    except InputError:
        assert not context.split() or not question.split()
    else:
        assert context[found.start : found.end] == found.text != ""


@pytest.mark.parametrize("text", ["", " ", "\n\t\u00a0"])
def test_empty_texts_are_refused(shared_engine, text):
    with pytest.raises(InputError, match="the context holds no words"):
        answer(shared_engine, text, QUESTION)
    with pytest.raises(InputError, match="the question holds no words"):
        answer(shared_engine, CONTEXT, text)


def test_long_texts(shared_engine):
    filler = "The weather was mild and nobody in the village had anything to say about it. "
    context = filler * 30 + "The secret code is 4711. " + filler * 30
    assert len(Passage.of(context).tokens) > 900
    assert answer(shared_engine, context, "What is the secret code?").text == "4711"
    question = " ".join(["please"] * 990) + " what is the code?"
    assert answer(shared_engine, context, question).text


def test_ten_thousand_words(shared_engine):
    found = answer(shared_engine, "word " * 10_000, "What?")
    assert found.text


def test_too_many_words_are_refused(shared_engine):
    with pytest.raises(InputError, match=f"more than the {MAX_CONTEXT}"):
        answer(shared_engine, "word " * (MAX_CONTEXT + 1), "What?")
    with pytest.raises(InputError, match="the question has 1001 words"):
        answer(shared_engine, CONTEXT, "word " * 1001)


def test_the_string_tensors():
    passage = Passage.of("Ab " + "C" * 20)
    given = feeds(passage, Passage.of("D"))
    assert {name: array.shape for name, array in given.items()} == {
        "context_word": (2, 1),
        "context_char": (2, 1, 1, 16),
        "query_word": (1, 1),
        "query_char": (1, 1, 1, 16),
    }
    assert given["context_word"].ravel().tolist() == ["ab", "c" * 20]
    assert given["context_char"][0].ravel().tolist() == ["A", "b", *[""] * (WORD_LENGTH - 2)]
    assert given["context_char"][1].ravel().tolist() == ["C"] * WORD_LENGTH


class TestPublishedOutputs:
    passage: ClassVar[Passage] = Passage.of(CONTEXT)

    def test_positions_alone_are_enough(self):
        found = read_answer(self.passage, {"start_pos": np.array([1], np.int32), "end_pos": np.array([3], np.int32)})
        assert (found.text, found.probability) == ("quick brown fox", None)

    def test_an_end_before_its_start_is_no_answer(self):
        found = read_answer(self.passage, {"start_pos": np.array([3]), "end_pos": np.array([1])})
        assert found.text == ""

    def test_another_model_is_refused(self):
        with pytest.raises(InputError, match="the model gives y, not start_pos"):
            read_answer(self.passage, {"y": np.zeros(1)})
