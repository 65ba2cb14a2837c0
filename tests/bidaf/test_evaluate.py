import json
import lzma

import pytest

import onnx_refit
from onnx_refit.errors import InputError
from onnx_refit.samples.bidaf import checkpoints
from onnx_refit.samples.bidaf.demo import dev_questions
from onnx_refit.samples.bidaf.evaluate import Question, evaluate, read_questions

ROWS = [
    {"id": "1", "context": "A b c.", "question": "b?", "answer": "b", "answer_start": 2, "answers": ["b", "A b"]},
    {"id": "2", "context": "A b c.", "question": "c?", "answer": "c", "answer_start": 4},
]
LINES = "\n".join(json.dumps(row) for row in ROWS).encode() + b"\n"


def test_json_lines_compressed_or_not(tmp_path):
    plain, packed = tmp_path / "q.jsonl", tmp_path / "q.jsonl.xz"
    plain.write_bytes(LINES)
    packed.write_bytes(lzma.compress(LINES))
    expected = [Question("1", "A b c.", "b?", ("b", "A b")), Question("2", "A b c.", "c?", ("c",))]
    assert read_questions(plain) == read_questions(packed) == expected


def test_a_text_may_hold_what_unicode_calls_a_line_separator(tmp_path):
    row = {**ROWS[0], "context": "A b\u2028c\x85d."}
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps(row, ensure_ascii=False) + "\r\n" + json.dumps(ROWS[1]) + "\n", newline="")
    assert [question.context for question in read_questions(path)] == ["A b\u2028c\x85d.", "A b c."]


def test_the_data_sets_own_format(tmp_path):
    rows = [{"id": "x", "question": "b?", "answers": [{"text": "b", "answer_start": 2}] * 2}]
    path = tmp_path / "dev.json"
    article = {"title": "t", "paragraphs": [{"context": "A b c.", "qas": rows}]}
    path.write_text(json.dumps({"version": "1.1", "data": [article]}))
    assert read_questions(path) == [Question("x", "A b c.", "b?", ("b",))]


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[1]", b'{"id": 1}\n', lzma.compress(LINES)[:-10], b"\xff\xfe"], ids=range(6)
)
def test_damaged_data_sets(tmp_path, content):
    path = tmp_path / "q"
    path.write_bytes(content)
    with pytest.raises(InputError, match="data set"):
        read_questions(path)


def test_a_missing_data_set(tmp_path):
    with pytest.raises(InputError, match="there is no data set here"):
        read_questions(tmp_path / "none")


def test_the_bundled_dev_set():
    questions = dev_questions()
    assert len(questions) == 10_570
    assert len({question.id for question in questions}) == 10_570
    some = dev_questions(100)
    assert len(some) == 100
    assert len({question.context for question in some}) > 50, "a sample should be spread over the data set"


class Echo:
    """Answers with the first word of the question's place in the context: enough to test the counting."""

    def run(self, inputs):
        import numpy as np

        words = inputs["context_word"].ravel().tolist()
        wanted = inputs["query_word"].ravel().tolist()[0]
        place = np.array([words.index(wanted) if wanted in words else 0], np.int32)
        return {"start_pos": place, "end_pos": place}


@pytest.mark.parametrize("threads", [1, 3])
def test_counting(threads):
    questions = [Question(str(n), "a b c", word, ("b",)) for n, word in enumerate(["b", "c", "b", "", "b"] * 10)]
    seen: list[tuple[int, int]] = []
    found = evaluate(Echo(), questions, threads=threads, progress=lambda done, total: seen.append((done, total)))
    assert found.score.exact_match == 60.0
    assert found.score.questions == 50
    assert found.predictions["1"] == "c"
    assert found.predictions["3"] == "", "a question without words is answered with nothing"
    assert seen[-1] == (50, 50)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_a_failing_engine_is_not_hidden():
    class Failing:
        def run(self, inputs):
            raise RuntimeError("no power")

    with pytest.raises(RuntimeError, match="no power"):
        evaluate(Failing(), [Question("1", "a", "b", ("a",))] * 9, threads=2)


@pytest.mark.slow
def test_the_whole_dev_set_through_the_engine(sample):
    """The score the project states is that of the ONNX model in the engine, from strings to spans."""
    with onnx_refit.load(sample.plan, options=onnx_refit.EngineOptions(threads=1)) as engine:
        found = evaluate(engine, dev_questions(), threads=2)
    exact, overlap = checkpoints.scores()
    assert found.score.exact_match == pytest.approx(exact, abs=0.05)
    assert found.score.f1 == pytest.approx(overlap, abs=0.05)
    assert found.score.exact_match > 68.1
    assert found.score.f1 > 76.5


def test_the_trained_model_answers_most_questions(shared_engine, questions):
    found = evaluate(shared_engine, questions, threads=2)
    assert found.score.exact_match > 55
    assert found.score.f1 > 65
    again = evaluate(shared_engine, questions)
    assert again.predictions == found.predictions
