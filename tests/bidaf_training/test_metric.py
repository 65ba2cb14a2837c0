"""The metric against values worked out by hand from the official script's definition."""

import pytest

from onnx_refit.samples.bidaf.metric import exact_match, f1, normalize_answer, score


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        ("The Fox!", "fox"),
        ("  a  an the ", ""),
        ("Anthem", "anthem"),
        ("U.S. $5–10", "us 5–10"),
        ("the-cat", "thecat"),
    ],
)
def test_answers_are_normalised_as_in_the_official_script(answer, normal):
    assert normalize_answer(answer) == normal


def test_exact_match_takes_any_reference():
    assert exact_match("the Denver Broncos", ["Carolina Panthers", "Denver Broncos."])
    assert not exact_match("Denver", ["Denver Broncos"])


def test_f1_counts_shared_words_with_their_number():
    assert f1("a brown brown fox", ["brown fox jumps"]) == pytest.approx(2 / 3)
    assert f1("cat", ["dog", "the cat"]) == 1.0
    assert f1("cat", ["dog"]) == 0.0
    assert f1("the", ["a"]) == 0.0
    assert f1("cat", []) == 0.0


def test_the_score_counts_missing_predictions_as_wrong():
    references = {"1": ["brown"], "2": ["lazy dog"], "3": ["fox"], "4": ["x"]}
    result = score({"1": "Brown", "2": "dog", "3": "cat", "5": "ignored"}, references)
    assert result.exact_match == pytest.approx(25.0)
    assert result.f1 == pytest.approx(100 * (1 + 2 / 3) / 4)
    assert result.questions == 4
    assert score({}, {}).exact_match == 0.0
