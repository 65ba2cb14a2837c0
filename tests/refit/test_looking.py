"""Weights looked at, sampled and kept while they are derived: what is refused, and that a refusal reads the same."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import onnx_refit
from onnx_refit.errors import RefitRejectedError
from onnx_refit.refit.check import CheckOptions, check
from onnx_refit.refit.check_report import CheckReport
from onnx_refit.refit.inspection import Inspection
from onnx_refit.refit.packet import SMALL, Packet
from onnx_refit.refit.unchanged import Sampler, unchanged
from onnx_refit.tensors import Array, TensorSpec
from onnx_refit.weights.sources.arrays import ArraysSource
from tests.support.interrupts import Interrupt, at_line, interrupt

# Large ones that are looked at in parts, one of which only arithmetic reads, and small ones that are joined.
SHAPES: dict[str, tuple[int, ...]] = {
    "w": (128, 128),
    "conv": (64, 64, 3, 3),
    "gamma": (64,),
    "beta": (64,),
    "mean": (64,),
    "var": (64,),
    "bias": (128,),
}


def weights(seed: int) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    made: dict[str, Array] = {n: rng.uniform(0.5, 1.5, s).astype(np.float32) for n, s in SHAPES.items()}
    return {**made, "conv": made["conv"] / 576, "w": made["w"] / 128}


def model() -> onnx.ModelProto:
    nodes = [
        helper.make_node("Conv", ["x", "conv"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("BatchNormalization", ["c", "gamma", "beta", "mean", "var"], ["n"]),
        helper.make_node("Flatten", ["n"], ["f"]),
        helper.make_node("Slice", ["f", "zero", "end", "one"], ["s"]),
        helper.make_node("Gemm", ["s", "w", "bias"], ["y"]),
    ]
    numbers = [numpy_helper.from_array(np.array([k]), name) for name, k in (("zero", 0), ("end", 128), ("one", 1))]
    tensors = [numpy_helper.from_array(array, name) for name, array in weights(0).items()]
    graph = helper.make_graph(
        nodes,
        "both",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 64, 4, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 128])],
        [*tensors, *numbers],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


X = np.random.default_rng(5).standard_normal((1, 64, 4, 4)).astype(np.float32)


@pytest.fixture(scope="module", params=[1, 2])
def engine(request: pytest.FixtureRequest) -> Iterator[onnx_refit.Engine]:
    options = onnx_refit.EngineOptions(threads=request.param)
    plan = onnx_refit.build(model(), options=onnx_refit.BuildOptions(engine=options))
    with onnx_refit.load(plan, options=options) as loaded:
        yield loaded


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_one_bad_element_anywhere_is_refused_as_a_check_beforehand_refuses_it(
    engine: onnx_refit.Engine, name: str, value: float
) -> None:
    engine.refit(weights(1))
    before, version = engine.run({"x": X})["y"], engine.version
    given = weights(2)
    given[name].reshape(-1)[-1] = value
    wanted, arrays = check(engine.plan.compiled.sources, ArraysSource(given))
    assert not arrays
    with pytest.raises(RefitRejectedError) as refused:
        engine.refit(given)
    report = refused.value.report
    assert isinstance(report, CheckReport)
    assert report.problems() == wanted.problems()
    assert len(report.accepted) == len(SHAPES) - 1
    assert engine.version == version
    np.testing.assert_array_equal(engine.run({"x": X})["y"], before)
    for key, array in weights(1).items():
        np.testing.assert_array_equal(engine.weights().read(key), array)


def test_bad_elements_are_named_beside_other_problems(engine: onnx_refit.Engine) -> None:
    given = weights(2)
    given["conv"][3, 2, 1, 0] = np.nan
    given["bias"] = given["bias"][:-1]
    with pytest.raises(RefitRejectedError, match=r"2 problems.*shape") as refused:
        engine.refit(given)
    report = refused.value.report
    assert isinstance(report, CheckReport)
    assert {one.name for one in report.rejected} == {"conv", "bias"}


def test_what_is_not_finite_can_be_allowed_and_is_then_refused_again_although_unchanged(
    engine: onnx_refit.Engine,
) -> None:
    given = weights(3)
    given["w"][5, 5] = np.inf
    engine.refit(given, CheckOptions(allow_nonfinite=True))
    assert np.isinf(engine.weights().read("w")[5, 5])
    with pytest.raises(RefitRejectedError, match=r"not finite|inf"):
        engine.refit(given)
    engine.refit(weights(1))


def test_huge_elements_are_finite_although_their_squares_are_not(engine: onnx_refit.Engine) -> None:
    given = weights(3)
    given["conv"][0, 0, 0, 0] = given["beta"][1] = 3e38
    engine.refit(given)
    assert engine.weights().read("conv")[0, 0, 0, 0] == np.float32(3e38)
    engine.refit(weights(1))


def test_full_and_partial_refits_in_turn_give_the_bits_that_were_given(engine: onnx_refit.Engine) -> None:
    rng = np.random.default_rng(0)
    held = weights(10)
    engine.refit(held)
    for seed in range(11, 31):
        other = weights(seed)
        names = list(SHAPES) if seed % 3 == 0 else list(rng.choice(list(SHAPES), 3, replace=False))
        held = {name: other[name] if name in names else array for name, array in held.items()}
        given = held if seed % 2 else {name: held[name] for name in names}
        report = engine.refit({name: array.copy() for name, array in given.items()}, partial=True)
        assert set(report.changed) == set(names)
        for name, array in held.items():
            np.testing.assert_array_equal(engine.weights().read(name), array)
    with onnx_refit.load(engine.plan) as fresh:
        fresh.refit(held)
        np.testing.assert_allclose(engine.run({"x": X})["y"], fresh.run({"x": X})["y"], rtol=1e-5)


# ---------------------------------------------------------------- the parts


def test_a_packet_joins_the_small_ones_in_the_same_memory_each_time() -> None:
    specs = [
        TensorSpec("a", "float32", (3, 2)),
        TensorSpec("half", "float16", (4,)),
        TensorSpec("large", "float32", (SMALL + 1,)),
        TensorSpec("none", "float32", (0,)),
        TensorSpec("b", "float32", ()),
    ]
    packet = Packet(specs)
    assert packet.names == ("a", "b")
    first, finite = packet.join({"a": np.arange(6, dtype=np.float32).reshape(3, 2), "b": np.array(7, np.float32)})
    assert finite
    views = packet.views
    assert first.tolist() == [0, 1, 2, 3, 4, 5, 7]
    assert views["a"].shape == (3, 2)
    assert views["b"].shape == ()
    again, finite = packet.join({"a": np.ones((3, 2), np.float32), "b": np.array(-np.inf, np.float32)})
    assert again is first
    assert not finite
    assert packet.views["a"] is views["a"]
    assert views["a"].tolist() == [[1, 1]] * 3


@pytest.mark.parametrize("cleared", range(1, 13))
def test_what_a_packet_joins_is_what_its_views_show_whoever_clears_or_interrupts_it(cleared: int) -> None:
    for interrupted in range(1, 13):
        packet = Packet([TensorSpec("a", "float32", (3, 2)), TensorSpec("b", "float32", ())])
        for number in range(3):
            given = {"a": np.full((3, 2), number, np.float32), "b": np.array(number, np.float32)}
            step, act = [(cleared, packet.clear), (interrupted, interrupt), (0, interrupt)][number]
            joined = None
            with at_line(Packet.join.__code__, step, act), contextlib.suppress(Interrupt):
                joined, _ = packet.join(given)
            if joined is not None:
                assert joined.tolist() == [number] * 7
                views = packet.views
                assert all(np.shares_memory(joined, view) for view in views.values())
                assert number == 0 or views


def test_samples_tell_small_and_large_weights_that_changed() -> None:
    rng = np.random.default_rng(0)
    specs = [TensorSpec(f"s{k}", "float32", (k + 1,)) for k in range(40)] + [TensorSpec("l", "float32", (20_000,))]
    packet = Packet(specs)
    sampler = Sampler(packet, {spec.name: spec for spec in specs})
    current = {spec.name: rng.standard_normal(spec.static_shape).astype(np.float32) for spec in specs}
    before = sampler.take(current, None, None)
    given = {name: array.copy() for name, array in current.items()}
    given["s3"] += 1
    given["s30"][-1] = -given["s30"][-1]
    given["l"][7] += 1
    for joined in (None, packet.join(given)[0]):
        equal, taken = unchanged(sampler, given, joined, before, current.__getitem__)
        assert equal == current.keys() - {"s3", "s30", "l"}
        np.testing.assert_array_equal(taken.small, sampler.take(given, None, None).small)
    some, taken = unchanged(sampler, {"s5": given["s5"], "s3": given["s3"]}, None, before, current.__getitem__)
    assert some == {"s5"}
    assert (taken.small == before.small).all(axis=1).sum() == 39


def test_an_inspection_copies_and_looks_at_each_part_once_and_at_what_nobody_claims() -> None:
    big, other = np.ones(SMALL * 3, np.float32), np.ones((SMALL, 2), np.float32)
    targets = {"big": np.zeros_like(big), "tiny": np.zeros(2, np.float32)}
    given = {"big": big, "other": other, "tiny": np.full(2, 5, np.float32)}
    inspection = Inspection(given, targets, look=True)
    assert inspection.claim("tiny") is None  # with others, at the end
    look = inspection.claim("big")
    assert look is not None
    assert inspection.claim("big") is None
    look(0, SMALL)
    look(SMALL, SMALL * 3)
    np.testing.assert_array_equal(targets["big"], big)
    assert inspection.finish()
    np.testing.assert_array_equal(targets["tiny"], given["tiny"])
    other[-1, -1] = np.nan
    inspection = Inspection(given, {}, look=True)
    assert not inspection.finish()
    inspection = Inspection(given, {}, look=False)
    assert inspection.finish()
