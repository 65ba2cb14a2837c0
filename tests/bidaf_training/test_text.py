"""The tokeniser: whole coverage of any text, the Treebank's cuts, and agreement with NLTK on the dev questions."""

import json
import lzma
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import onnx_refit.samples.bidaf as sample
from onnx_refit.samples.bidaf.text import tokenize

DEV = Path(sample.__file__).parent / "questions" / "squad11_dev.jsonl.xz"


def words(text):
    return [token.text for token in tokenize(text)]


@given(st.text())
def test_every_character_but_white_space_is_in_exactly_one_token(text):
    place = 0
    for token in tokenize(text):
        assert token.start >= place
        assert text[place : token.start].strip() == ""
        assert token.end > token.start
        assert token.text in (text[token.start : token.end], "``", "''")
        place = token.end
    assert text[place:].strip() == ""


@given(st.text(alphabet="ab.'\"`-, s", max_size=30))
def test_marks_in_any_order_are_cut(text):
    assert sum(token.end - token.start for token in tokenize(text)) == sum(not char.isspace() for char in text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("  \n\t ", []),
        ("A quick brown fox.", ["A", "quick", "brown", "fox", "."]),
        ("Don't cannot they'll!", ["Do", "n't", "can", "not", "they", "'ll", "!"]),
        ('He said "no".', ["He", "said", "``", "no", "''", "."]),
        (
            "Mr. Smith of the U.S. Army left. Why?",
            ["Mr.", "Smith", "of", "the", "U.S.", "Army", "left", ".", "Why", "?"],
        ),
        ("1,234.5 items, at 10:30", ["1,234.5", "items", ",", "at", "10:30"]),
        ("well-known -- state...", ["well-known", "--", "state", "..."]),
        ("'tis the dogs' bone", ["'", "tis", "the", "dogs", "'", "bone"]),
        ("should've's", ["should", "'ve", "'s"]),
        ("(Beyoncé–Jay)", ["(", "Beyoncé", "–", "Jay", ")"]),
        ("日本 \U0001f600", ["日本", "\U0001f600"]),
        ("\ud800 x", ["\ud800", "x"]),
    ],
)
def test_cuts(text, expected):
    assert words(text) == expected


def test_a_long_chunk_is_cut_in_reasonable_time():
    assert len(tokenize("'s" * 2000)) >= 1
    assert len(tokenize("." * 100_000)) == 1


def test_it_agrees_with_nltk_on_nearly_all_dev_questions():
    tokenizer = pytest.importorskip("nltk.tokenize").NLTKWordTokenizer()
    with lzma.open(DEV, "rt", encoding="utf8") as lines:
        questions = [json.loads(line)["question"].strip() for line in lines][::5]
    equal = sum(words(question) == tokenizer.tokenize(question) for question in questions)
    assert equal >= 0.99 * len(questions)
