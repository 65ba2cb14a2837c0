"""Many arrays asked at once: native code and Python agree on what they are and on what is read of them."""

from __future__ import annotations

import sys
from array import array
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_refit.moves.library import Absent, Library, load
from onnx_refit.moves.roll import Form, Joined, Parts, Roll, Sampled, Sight

found = load()
native = pytest.mark.skipif(isinstance(found, Absent), reason="no native code was compiled")

FORMS: list[Form] = [
    ("a", np.dtype(np.float32), (3, 5)),
    ("b", np.dtype(np.int8), (7,)),
    ("c", np.dtype(np.float64), ()),
    ("d", np.dtype(np.float16), (0, 2)),
    ("e", np.dtype(np.float32), (40,)),
]


def fitting(form: Form, seed: int = 0) -> Any:
    _, dtype, shape = form
    return np.random.default_rng(seed).integers(-99, 99, shape).astype(dtype)


class Own(np.ndarray[Any, Any]):
    """Whatever it does to its elements, it is not asked."""


ODD = {
    "shape": lambda one: one.reshape(1, *one.shape),
    "dtype": lambda one: one.astype(np.complex64),
    "byte order": lambda one: one.astype(one.dtype.newbyteorder(">")) if one.dtype.itemsize > 1 else None,
    "strided": lambda one: np.repeat(one, 2, axis=0)[::2] if one.ndim and one.size > 1 else None,
    "fortran": lambda one: np.asfortranarray(one) if one.ndim > 1 and one.size > 1 else None,
    "subclass": lambda one: one.view(Own),
    "list": lambda one: one.tolist(),
    "nothing": lambda one: None,
    "kind": lambda one: np.ndarray,
    "scalar": lambda one: one.dtype.type(1),
}
ALIKE = {
    "read only": lambda one: np.frombuffer(one.tobytes(), one.dtype).reshape(one.shape) if one.size else one,
    "inside another": lambda one: np.concatenate([one.reshape(-1)] * 3)[one.size : 2 * one.size].reshape(one.shape),
    "at an odd byte": lambda one: (
        np.frombuffer(b"x" + one.tobytes(), one.dtype, offset=1).reshape(one.shape) if one.size else one
    ),
    "another dtype object": lambda one: one.view(np.dtype([("x", one.dtype)])["x"].newbyteorder("=")),
}


@settings(max_examples=200, deadline=None)
@given(st.permutations(range(len(FORMS))), st.data())
def test_both_ways_say_the_same(order: list[int], data: st.DataObject) -> None:
    values = {FORMS[k][0]: fitting(FORMS[k]) for k in order}
    changed = data.draw(st.sampled_from([None, *sorted(values)]))
    how = data.draw(st.sampled_from([*ODD, *ALIKE, "missing", "more"]))
    wrong = False
    if changed is not None:
        if how == "missing":
            del values[changed]
            wrong = True
        elif how == "more":
            values["other"] = values[changed]
            wrong = True
        else:
            made = {**ODD, **ALIKE}[how](values[changed])
            wrong = how in ODD and (made is not None or how == "nothing")
            if made is not None or how == "nothing":
                values[changed] = made
    plain = Roll(FORMS, Absent("the test does without")).call(values)
    called = Roll(FORMS, found).call(values)
    assert (plain is None) == (called is None) == wrong
    if called is not None and plain is not None:
        assert list(called) == list(plain) == [name for name, _, _ in FORMS]
        assert all(called[name] is plain[name] is values[name] for name in called)
        assert plain.addresses is None
        if called.addresses is not None:
            wanted = [values[name].__array_interface__["data"][0] for name, _, _ in FORMS]
            assert list(called.addresses) == wanted


@native
def test_it_is_native_where_it_was_compiled() -> None:
    called = Roll(FORMS, found).call({form[0]: fitting(form) for form in FORMS})
    assert called is not None
    assert called.addresses is not None


@native
@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from([form[0] for form in FORMS]), unique=True), st.integers(0, 5))
def test_joining_and_sampling_read_what_numpy_reads(names: list[str], seed: int) -> None:
    roll = Roll(FORMS, found)
    values = {form[0]: fitting(form, seed) for form in FORMS}
    called = roll.call(values)
    assert called is not None
    assert called.addresses is not None
    wanted = b"".join(values[name].tobytes() for name in names)
    memory = np.full(len(wanted) + 16, 7, np.uint8)
    Joined(roll, names).into(called.addresses, memory.ctypes.data)
    assert memory.tobytes() == wanted + b"\7" * 16
    rng = np.random.default_rng(seed)
    positions = {n: rng.integers(0, values[n].size, min(8, values[n].size)) for n in names}
    taken = Sampled(roll, positions).take(called.addresses)
    assert taken == {name: values[name].reshape(-1)[positions[name]].tobytes() for name in names}


@native
@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=6), st.data())
def test_what_is_not_finite_is_seen_when_it_is_joined(sizes: list[int], data: st.DataObject) -> None:
    forms: list[Form] = [(f"w{k}", np.dtype(np.float32), (size,)) for k, size in enumerate(sizes)]
    roll = Roll(forms, found)
    values = {name: np.full(shape, np.finfo(np.float32).max, np.float32) for name, _, shape in forms}
    memory = np.full(sum(sizes) + 4, np.nan, np.float32)  # what lies behind is not looked at

    def finite() -> bool:
        called = roll.call(values)
        assert called is not None
        assert called.addresses is not None
        return Joined(roll, roll.names).into(called.addresses, memory.ctypes.data)

    assert finite()
    if sum(sizes):
        name = data.draw(st.sampled_from([name for name, _, (size,) in forms if size]))
        at = data.draw(st.integers(0, values[name].size - 1))
        values[name][at] = data.draw(st.sampled_from([np.nan, np.inf, -np.inf]))
        assert not finite()


@native
@settings(max_examples=200, deadline=None)
@given(st.permutations([form[0] for form in FORMS if form[0] != "d"]), st.integers(0, 3), st.data())
def test_one_look_sees_what_several_see(names: list[str], joined: int, data: st.DataObject) -> None:
    forms = [form for form in FORMS if form[0] != "d"]  # what has no elements is always alike
    roll = Roll(forms, found)
    before, values = ({form[0]: fitting(form, seed) for form in forms} for seed in (0, 1))
    for name, one in values.items():
        one[...] = before[name] + 100 + one % 2  # other than before
    together = [name for name in names if name in {"a", "e"}][:joined]
    rng = np.random.default_rng(joined)
    positions = {name: rng.integers(0, values[name].size, 8) for name in names}
    sight = Sight(roll, together, positions)
    assert list(sight.parts) == names
    samples = {name: before[name].reshape(-1)[positions[name]].tobytes() for name in names}
    old = array_of_bytes(b"".join(samples.values()))
    fault = data.draw(st.sampled_from(["none", "other", "infinite", "alike"]))
    name = data.draw(st.sampled_from(names))
    if fault == "other":
        values[name] = values[name].astype(np.complex64)
    elif fault == "alike":
        values[name].reshape(-1)[positions[name]] = before[name].reshape(-1)[positions[name]]
    elif fault == "infinite" and name in together:
        values[name].reshape(-1)[-1] = -np.inf
    memory = np.full(sum(values[name].size for name in together) + 4, 7, np.float32)
    objects = [values[form[0]] for form in forms]
    seen = sight.see(objects, memory.ctypes.data, old.buffer_info()[0])
    refused = fault in {"other", "alike"} or (fault == "infinite" and name in together)
    assert (seen is None) == refused
    if fault == "other":
        assert (memory == 7).all(), "nothing is touched"
    if seen is not None:
        addresses, taken, place = seen
        assert place == taken.buffer_info()[0]
        assert list(addresses) == [one.__array_interface__["data"][0] for one in objects]
        wanted = b"".join(values[name].reshape(-1)[positions[name]].tobytes() for name in names)
        assert taken.tobytes() == wanted
        assert all(taken[sight.parts[n]].tobytes() == values[n].reshape(-1)[positions[n]].tobytes() for n in names)
        plain = b"".join(values[name].tobytes() for name in together)
        assert memory.tobytes() == plain + np.full(4, 7, np.float32).tobytes()


def array_of_bytes(content: bytes) -> array[int]:
    return array("B", content)


def test_parts_are_alike_where_their_bytes_are() -> None:
    places = {"a": slice(0, 2), "b": slice(2, 5), "none": slice(5, 5)}
    one = Parts(b"abcde", places)
    assert one.alike(Parts(b"abcdE", places)) == ["a", "none"]
    assert one.alike({"b": b"cde", "a": b"xx"}) == ["b"]
    assert dict(one) == {"a": b"ab", "b": b"cde", "none": b""}


@native
def test_an_interpreter_whose_arrays_look_otherwise_is_asked_in_python(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {form[0]: fitting(form) for form in FORMS}
    assert isinstance(found, Library)
    blind = replace(found, call=lambda *arguments: arguments[1])
    roll = Roll(FORMS, blind)  # it says yes to everything and gives no address
    assert roll.native is None
    assert roll.call(values) is not None
    monkeypatch.setattr(sys.implementation, "name", "another")
    assert Roll(FORMS, found).native is None


def test_no_forms_at_all() -> None:
    assert Roll([], found).call({}) == {}
    assert Roll([], found).call({"a": fitting(FORMS[0])}) is None
