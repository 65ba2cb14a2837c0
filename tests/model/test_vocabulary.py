import json
import math

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from onnx_refit.errors import InputError, ModelError
from onnx_refit.files import WriteError
from onnx_refit.model.vocabulary import VocabularyMap, apply_maps
from tests.model.builders import strings


def make(keys, values, default, key="string", value="int64", source="x", target="y"):
    return VocabularyMap(source, target, "node", "LabelEncoder", tuple(keys), tuple(values), default, key, value)


WORDS = make(("", "the", "fox"), (0, 2, 3), 1)


def test_apply_keeps_the_shape_and_uses_the_default():
    got = WORDS.apply(strings("fox", "", "cat", "the", shape=(2, 1, 2)))
    assert got.dtype == np.int64
    assert got.tolist() == [[[3, 0]], [[1, 2]]]


@pytest.mark.parametrize(
    "array",
    [np.array(["fox", "cat"]), np.array([b"fox", b"cat"]), np.array(["fox", b"cat"], object)],
    ids=["unicode", "bytes", "mixed"],
)
def test_apply_takes_strings_in_every_form(array):
    assert WORDS.apply(array).tolist() == [3, 1]


def test_apply_of_nothing_is_nothing():
    assert WORDS.apply(np.empty((0, 4), object)).shape == (0, 4)


@pytest.mark.parametrize(
    "array",
    [np.zeros(2, np.int64), np.array([1, "a"], object), np.array([None], object), np.array([b"\xff"], object)],
    ids=["numbers", "mixed", "none", "not utf-8"],
)
def test_apply_refuses_what_is_no_text(array):
    with pytest.raises(InputError, match="x"):
        WORDS.apply(array)


def test_apply_refuses_other_numbers():
    table = make((1, 2), ("a", "b"), "?", "int64", "string")
    assert table.apply(np.array([2, 3])).tolist() == ["b", "?"]
    with pytest.raises(InputError, match="expected int64, got int32"):
        table.apply(np.array([2], np.int32))
    with pytest.raises(InputError, match="expected int64"):
        table.apply(strings("a"))


def test_floating_point_keys_are_compared_in_the_dtype_of_the_tensor():
    table = make((0.1, math.nan, -0.0), (1.5, 2.5, 3.5), 9.0, "float32", "float64")
    got = table.apply(np.array([0.1, np.nan, 0.0, 0.2], np.float32))
    assert got.dtype == np.float64
    assert got.tolist() == [1.5, 2.5, 3.5, 9.0]


@pytest.mark.parametrize(
    ("keys", "values", "default", "kinds", "message"),
    [
        (("a", "a"), (1, 2), 0, ("string", "int64"), "more than once"),
        (("a",), (1, 2), 0, ("string", "int64"), "1 keys but 2 values"),
        (("a",), ("b",), 0, ("string", "int64"), "is not int64"),
        ((1,), (1,), 0, ("string", "int64"), "is not string"),
        ((2**40,), (1,), 0, ("int32", "int64"), "does not fit int32"),
        ((True,), (1,), 0, ("int64", "int64"), "is not int64"),
        ((1,), (1,), 0, ("uint8", "int64"), "cannot hold uint8"),
    ],
)
def test_nonsense_is_refused(keys, values, default, kinds, message):
    with pytest.raises(ModelError, match=message):
        make(keys, values, default, *kinds)


texts = st.text(max_size=8)
columns = {
    "string": texts,
    "int64": st.integers(-(2**63), 2**63 - 1),
    "float64": st.floats(width=64),
    "float32": st.floats(width=32),
}


@st.composite
def maps(draw):
    key, value = draw(st.sampled_from(sorted(columns))), draw(st.sampled_from(sorted(columns)))
    keys = draw(st.lists(columns[key], unique_by=lambda x: "nan" if x != x else x, max_size=6))
    values = draw(st.lists(columns[value], min_size=len(keys), max_size=len(keys)))
    return make(keys, values, draw(columns[value]), key, value)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # reads Unicode's tables at first
@given(maps())
def test_json_gives_the_same_map_again(table):
    again = VocabularyMap.from_json(table.to_json())
    assert repr(again) == repr(table)  # repr, as NaN equals nothing
    json.loads(table.to_json(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not valid JSON"),
        ("[]", "not a vocabulary map"),
        ("{}", "not a vocabulary map"),
        (WORDS.to_json().replace('"version": 1', '"version": 2'), "format version 2"),
        (WORDS.to_json().replace('"keys"', '"keyz"'), "not complete"),
        (WORDS.to_json().replace('"default": 1', '"default": "one"'), "not complete"),
        (WORDS.to_json().replace('"values": [0, 2, 3]', '"values": [0, 2]'), "3 keys but 2 values"),
    ],
)
def test_damaged_json_is_refused(text, message):
    with pytest.raises(ModelError, match=message):
        VocabularyMap.from_json(text)


def test_files(tmp_path):
    path = tmp_path / "CategoryMapper_4.json"
    WORDS.save(path)
    assert VocabularyMap.load(path) == WORDS
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    with pytest.raises(ModelError, match="cannot be read"):
        VocabularyMap.load(tmp_path / "none.json")
    with pytest.raises(WriteError):
        WORDS.save(tmp_path / "none" / "x.json")


def test_maps_follow_one_another():
    second = make((0, 3), ("empty", "animal"), "?", "int64", "string", "y", "z")
    got = apply_maps((WORDS, second), {"x": strings("fox", "", "the"), "other": np.ones(1)})
    assert got["z"].tolist() == ["animal", "empty", "?"]
    assert set(got) == {"x", "y", "z", "other"}


def test_a_mapped_tensor_may_be_given_instead():
    assert apply_maps((WORDS,), {"y": np.array([7])})["y"].tolist() == [7]
    assert apply_maps((WORDS,), {"x": strings("fox"), "y": np.array([7])})["y"].tolist() == [7]
