"""Names are found by bits alone, ties are broken by structure, and what is not certain is refused."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnx_refit.errors import RefitRejectedError, WeightsFormatError
from onnx_refit.plan.compiled import SourceWeight
from onnx_refit.refit.check import CheckOptions, CheckReport, RejectReason, check
from onnx_refit.tensors import spec_of
from onnx_refit.weights.names import Discovery, NameMap, find_names
from onnx_refit.weights.open import open_weights
from onnx_refit.weights.provenance.clues import Clues
from onnx_refit.weights.provenance.expression import (
    BatchNormFold,
    Concat,
    Convert,
    Factor,
    Reshape,
    Scale,
    Slice,
    Stored,
    Take,
    Transpose,
    describe,
)
from onnx_refit.weights.unmerge import unmerge

RNG = np.random.default_rng(1)


def r(*shape: int) -> Any:
    return RNG.standard_normal(shape).astype(np.float32)


def find(weights: dict[str, Any], checkpoint: dict[str, Any], **uses: str) -> Discovery:
    clues = Clues.of_uses({name: [use] for name, use in uses.items()}) if uses else None
    found = find_names(weights, open_weights(checkpoint), clues)
    view = found.names.apply(open_weights(checkpoint))
    for name in found.names.entries:  # whatever was found gives the weight's own bits
        assert view.read(name).tobytes() == np.ascontiguousarray(weights[name]).tobytes()
    again = NameMap.from_json(json.loads(json.dumps(found.names.to_json())))
    assert again == found.names
    return found


A, B, C = r(4, 6), r(4, 6), r(4, 6)
K = r(2, 3, 4, 5)


@pytest.mark.parametrize(
    ("weight", "checkpoint", "expected"),
    [
        (A, {"a": A}, Stored("a")),
        (A.T, {"a": A, "b": B}, Transpose(Stored("a"), (1, 0))),
        (K.transpose(2, 3, 1, 0), {"k": K}, Transpose(Stored("k"), (2, 3, 1, 0))),
        (A.reshape(4, 2, 3), {"a": A}, Reshape(Stored("a"), (4, 2, 3))),
        (A.T.reshape(2, 3, 4), {"a": A}, Reshape(Transpose(Stored("a"), (1, 0)), (2, 3, 4))),
        (A.reshape(4, 2, 3).transpose(1, 0, 2), {"a": A}, Transpose(Reshape(Stored("a"), (4, 2, 3)), (1, 0, 2))),
        (A.astype(np.float16), {"a": A}, Convert(Stored("a"), "float16")),
        (A.T.astype(np.float16), {"a": A}, Transpose(Convert(Stored("a"), "float16"), (1, 0))),
        (np.concatenate([A, B, C]), {"c": C, "b": B, "a": A}, Concat((Stored("a"), Stored("b"), Stored("c")), 0)),
        (
            np.concatenate([A.T, B.T], 1),
            {"a": A, "b": B},
            Concat((Transpose(Stored("a"), (1, 0)), Transpose(Stored("b"), (1, 0))), 1),
        ),
        (A[:, 2:5], {"a": A}, Slice(Stored("a"), 1, 2, 5)),
        (A[1:3].T, {"a": A}, Transpose(Slice(Stored("a"), 0, 1, 3), (1, 0))),
        (A * np.float32(0.125), {"a": A, "b": B}, Scale(Stored("a"), 0.125, Factor.MULTIPLY)),
        (
            np.concatenate([A[2:], A[:2]])[None],
            {"a": A},
            Reshape(Concat((Slice(Stored("a"), 0, 2, 4), Slice(Stored("a"), 0, 0, 2)), 0), (1, 4, 6)),
        ),
    ],
)
def test_each_arrangement_is_found(weight: Any, checkpoint: dict[str, Any], expected: object) -> None:
    found = find({"12": np.ascontiguousarray(weight)}, checkpoint)
    assert found.names.entries["12"] == expected
    assert found.ties == ()
    assert describe(found.names.entries["12"])


def test_an_uneven_factor_is_found_in_the_order_it_was_applied() -> None:
    factor = np.float32(1 / np.sqrt(24))
    for weight, how in ((A * factor, Factor.MULTIPLY), (A.T / np.float32(3), Factor.DIVIDE)):
        entry = find({"w": np.ascontiguousarray(weight)}, {"a": A}).names.entries["w"]
        assert isinstance(entry, Scale)
        if how is Factor.MULTIPLY:
            assert entry.by == factor


def test_many_gathered_rows_become_one_take() -> None:
    table = r(50, 16)
    indices = RNG.permutation(50).repeat(2)
    entry = find({"w": table[indices]}, {"t": table}).names.entries["w"]
    assert isinstance(entry, Take)
    assert entry.indices == tuple(indices.tolist())


def test_nearly_equal_is_not_equal() -> None:
    close = A.copy()
    close.view(np.uint32)[2, 3] ^= 1
    found = find({"w": close}, {"a": A})
    assert found.unmatched == ("w",)
    assert found.names.unmatched == ("w",)
    assert found.unused == ("a",)


def test_folded_batch_norm() -> None:
    conv, bias = r(8, 3, 3, 3), r(8)
    gamma, beta, mean, var = r(8), r(8), r(8), np.abs(r(8)) + 1
    scale = gamma / np.sqrt(var + np.float32(1e-5))
    checkpoint = {
        "0.weight": conv,
        "0.bias": bias,
        "1.weight": gamma,
        "1.bias": beta,
        "1.running_mean": mean,
        "1.running_var": var,
    }
    weights = {"w": conv * scale.reshape(-1, 1, 1, 1), "b": (bias - mean) * scale + beta}
    found = find(weights, checkpoint)
    assert all(isinstance(e, BatchNormFold) for e in found.names.entries.values())
    assert found.unused == ()
    # A last bit that the exporter's square root rounded otherwise is recognised, one in a single element is not.
    other = scale.copy()
    other[3] = np.nextafter(other[3], np.float32(np.inf))
    off = find_names(
        {"w": conv * other.reshape(-1, 1, 1, 1), "b": (bias - mean) * other + beta}, open_weights(checkpoint)
    )
    assert set(off.names.entries) == {"w", "b"}
    wrong = weights["w"].copy()
    wrong.view(np.uint32)[0, 0, 0, 0] ^= 1
    assert find({"w": wrong}, checkpoint).unmatched == ("w",)


def test_equal_bits_are_told_apart_by_names() -> None:
    zero, one = np.zeros(4, np.float32), np.ones(4, np.float32)
    checkpoint = {
        f"enc.{i}.{part}": (one if part.endswith("weight") else zero).copy()
        for i in range(3)
        for part in ("ln.weight", "ln.bias", "fc.bias")
    }
    weights = {
        f"model.enc.{i}.{part}": checkpoint[f"enc.{i}.{part}"]
        for i in (2, 0, 1)
        for part in ("fc.bias", "ln.bias", "ln.weight")
    }
    found = find(weights, checkpoint)
    assert dict(found.names.entries.items()) == {w: Stored(w.removeprefix("model.")) for w in weights}
    assert len(found.ties) == 9
    assert all(tie.margin > 0 and tie.alternatives for tie in found.ties)
    assert "not " in str(found.ties[0])


def test_equal_bits_are_told_apart_by_the_weights_around_them() -> None:
    zero = np.zeros(4, np.float32)
    checkpoint: dict[str, Any] = {}
    weights: dict[str, Any] = {}
    uses: dict[str, str] = {}
    for i in range(4):
        checkpoint[f"h.{i}.fc.weight"], checkpoint[f"h.{i}.fc.bias"] = r(4, 4), zero
    for i in (3, 1, 0, 2):  # a graph that uses them in another order than the checkpoint has
        weights[f"{10 + i}"], weights[f"{20 + i}"] = checkpoint[f"h.{i}.fc.weight"].T.copy(), zero
        uses[f"{10 + i}"], uses[f"{20 + i}"] = f"n{i} (Gemm)[1]", f"n{i} (Gemm)[2]"
    found = find(weights, checkpoint, **uses)
    assert {f"{20 + i}": Stored(f"h.{i}.fc.bias") for i in range(4)}.items() <= found.names.entries.items()


def test_a_square_constant_follows_the_habit_of_its_operator() -> None:
    checkpoint = {"a.weight": r(4, 4), "b.weight": np.zeros((4, 4), np.float32), "c.weight": r(4, 4)}
    weights = {str(i): np.ascontiguousarray(array.T) for i, array in enumerate(checkpoint.values())}
    uses = {str(i): f"m{i} (MatMul)[1]" for i in range(3)}
    found = find(weights, checkpoint, **uses)
    assert found.names.entries["1"] == Transpose(Stored("b.weight"), (1, 0))


def test_zero_slices_follow_the_weight_beside_them() -> None:
    checkpoint = {
        "attn.qkv.weight": r(12, 4),
        "attn.qkv.bias": np.zeros(12, np.float32),
        "attn.out.bias": np.zeros(4, np.float32),
    }
    weights: dict[str, Any] = {}
    uses: dict[str, str] = {}
    for i in range(3):
        weights[f"w{i}"] = checkpoint["attn.qkv.weight"][4 * i : 4 * i + 4].T.copy()
        weights[f"b{i}"] = np.zeros(4, np.float32)
        uses[f"w{i}"], uses[f"b{i}"] = f"n{i} (Gemm)[1]", f"n{i} (Gemm)[2]"
    found = find(weights, checkpoint, **uses)
    for i in range(3):
        assert found.names.entries[f"b{i}"] == Slice(Stored("attn.qkv.bias"), 0, 4 * i, 4 * i + 4)


def test_initial_states_and_masks_are_no_parameters() -> None:
    mask = np.triu(np.full((5, 5), -np.inf, np.float32), 1)
    weights = {"h0": np.zeros((1, 1, 4), np.float32), "mask": mask, "w": A}
    found = find(
        weights, {"a": A, "bias": np.zeros(4, np.float32)}, h0="rnn (LSTM)[5]", mask="add (Add)[1]", w="m (MatMul)[1]"
    )
    assert set(found.names.entries) == {"w"}
    assert found.names.fixed == {"h0", "mask"}
    sources = [SourceWeight(spec_of(n, a), ()) for n, a in weights.items()]
    report, arrays = check(sources, found.names.apply(open_weights({"a": B, "bias": np.zeros(4, np.float32)})))
    assert report.ok
    assert list(arrays) == ["w"]


def test_a_tied_tensor_is_found_under_either_of_its_names() -> None:
    weights = {"embedding": A, "head": A.T.copy()}
    found = find(weights, {"wte.weight": A, "lm_head.weight": A})
    assert found.ties == ()
    for name in ("wte.weight", "lm_head.weight"):
        report, arrays = check(sources_of(weights), found.names.apply(open_weights({name: B})))
        assert report.ok
        assert report.unused == ()
        np.testing.assert_array_equal(arrays["embedding"], B)
        np.testing.assert_array_equal(arrays["head"], B.T)


# ---------------------------------------------------------------- applying a map


def sources_of(weights: dict[str, Any]) -> list[SourceWeight]:
    return [SourceWeight(spec_of(n, a), ()) for n, a in weights.items()]


def test_a_new_checkpoint_goes_through_the_map() -> None:
    weights = {"12": A.T.copy(), "13": B}
    names = find(weights, {"a": A, "b": B, "steps": np.array(3)}).names
    new = {"a": C, "b": A.astype(np.float64), "steps": np.array(9)}
    report, arrays = check(sources_of(weights), names.apply(open_weights(new)))
    assert report.ok
    assert report.unused == ()
    assert report.accepted[0].checkpoint_names == ("a",)
    np.testing.assert_array_equal(arrays["12"], C.T)
    assert arrays["12"].flags.c_contiguous


def test_the_models_own_names_still_work_but_are_never_mixed_in() -> None:
    weights = {"fc.weight": A.T.copy(), "fc.bias": B}
    names = find(weights, {"fc.weight": A, "bias": B}).names
    report, arrays = check(sources_of(weights), names.apply(open_weights({"fc.weight": C.T.copy(), "fc.bias": A})))
    assert report.ok
    np.testing.assert_array_equal(arrays["fc.weight"], C.T)
    report, _ = check(sources_of(weights), names.apply(open_weights({"fc.weight": C, "other": B})))
    assert [m.name for m in report.missing] == ["fc.bias"]


def test_an_unexplained_weight_never_takes_the_tensor_of_its_name() -> None:
    weights = {"w": A * np.float32(1.5) + 1, "v": B}
    names = find(weights, {"w": A, "v": B}).names
    report, _ = check(sources_of(weights), names.apply(open_weights({"w": A, "v": B})))
    assert [m.name for m in report.missing] == ["w"]


def test_a_checkpoint_of_other_shapes_is_refused() -> None:
    weights = {"q": A[:2], "k": A[2:]}
    names = find(weights, {"qk": A}).names
    report, _ = check(sources_of(weights), names.apply(open_weights({"qk": r(8, 6)})))
    assert {x.reason for x in report.rejected} == {RejectReason.SHAPE}
    assert "had the shape [4, 6] when the plan was built" in report.rejected[0].text


def test_a_bias_that_was_zero_and_dropped_by_the_exporter_cannot_return_unnoticed() -> None:
    weights = {"w": A}
    checkpoint = {
        "fc.weight": A,
        "fc.bias": np.zeros(4, np.float32),
        "dead.weight": B,
        "dead.bias": np.zeros(4, np.float32),
    }
    names = find(weights, checkpoint).names
    assert names.neutral == {"fc.bias": 0.0}
    assert check(sources_of(weights), names.apply(open_weights(checkpoint)))[0].ok
    trained = {**checkpoint, "fc.bias": np.ones(4, np.float32), "dead.bias": np.ones(4, np.float32)}
    report, _ = check(sources_of(weights), names.apply(open_weights(trained)))
    assert [(x.name, x.reason) for x in report.rejected] == [("fc.bias", RejectReason.DROPPED)]


def test_a_cast_of_the_exporter_is_repeated_but_overflow_is_refused() -> None:
    weights = {"w": A.astype(np.float16)}
    names = find(weights, {"a": A}).names
    assert check(sources_of(weights), names.apply(open_weights({"a": B})))[0].ok
    report, _ = check(sources_of(weights), names.apply(open_weights({"a": B * 1e9})))
    assert report.rejected[0].reason is RejectReason.UNREADABLE
    assert "does not fit into float16" in report.rejected[0].text


def test_partial_refits_through_a_map() -> None:
    weights = {"12": A.T.copy(), "13": B}
    names = find(weights, {"a": A, "b": B}).names
    report, arrays = check(sources_of(weights), names.apply(open_weights({"a": C})), options=CheckOptions(partial=True))
    assert report.ok
    assert list(arrays) == ["12"]


GOOD = find({"12": A.T.copy()}, {"a": A}).names.to_json()


@pytest.mark.parametrize(
    "change",
    [
        {"entries": 3},
        {"entries": {"12": {"op": "run", "of": "a"}}},
        {"entries": {"12": {"op": "transpose", "of": "a", "perm": [0, 0]}}},
        {"entries": {"12": {"op": "transpose", "of": "a"}}},
        {"entries": {"12": {"op": "reshape", "of": "a", "shape": [-1]}}},
        {"entries": {"12": {"op": "reshape", "of": None, "shape": [1]}}},
        {"entries": {"12": {"op": "scale", "of": "a", "by": float("nan"), "how": "multiply"}}},
        {"entries": {"12": {"op": "scale", "of": "a", "by": 1.0, "how": "eval"}}},
        {"entries": {"12": {"op": "convert", "of": "a", "dtype": "object"}}},
        {"entries": {"12": {"op": "convert", "of": "a", "dtype": "int8"}}},
        {"entries": {"12": {"op": "concat", "parts": [], "axis": 0}}},
        {"entries": {"12": "unknown tensor"}},
        {"entries": {"other weight": "a"}},
        {"shapes": {"a": [1.5]}},
        {"neutral": {"a": 2}},
        {"fixed": ["unknown"]},
        {"ignored": 3},
        {"weights": {"12": ["float32"]}},
    ],
)
def test_a_map_that_lies_is_refused(change: dict[str, Any]) -> None:
    assert NameMap.from_json(GOOD).entries
    with pytest.raises(WeightsFormatError):
        NameMap.from_json({**GOOD, **change})
    deep: Any = "a"
    for _ in range(100):
        deep = {"op": "reshape", "of": deep, "shape": [1]}
    with pytest.raises(WeightsFormatError):
        NameMap.from_json({**GOOD, "entries": {"12": deep}})


def test_a_map_whose_shapes_lie_gives_nothing() -> None:
    for entry in (
        {"op": "reshape", "of": "a", "shape": [24]},
        {"op": "transpose", "of": "a", "perm": [0, 1, 2]},
        {"op": "take", "of": "a", "axis": 0, "indices": [99]},
        {"op": "slice", "of": "a", "axis": 7, "start": 0, "stop": 1},
        {"op": "concat", "parts": ["a", {"op": "transpose", "of": "a", "perm": [1, 0]}], "axis": 0},
        {"op": "reshape", "of": "a", "shape": [1 << 40]},
    ):
        names = NameMap.from_json({**GOOD, "entries": {"12": entry}})
        report, arrays = check(sources_of({"12": A.T.copy()}), names.apply(open_weights({"a": A})))
        assert [x.reason for x in report.rejected] == [RejectReason.UNREADABLE], entry
        assert arrays == {}


# ---------------------------------------------------------------- merged tensors


def merged_model() -> onnx.ModelProto:
    zero = numpy_helper.from_array(np.zeros(4, np.float32), "zero")
    nodes = [
        helper.make_node("Identity", ["zero"], ["b.bias"]),
        helper.make_node("Add", ["x", "zero"], ["y"], name="first"),
        helper.make_node("Add", ["y", "b.bias"], ["z"], name="second"),
        helper.make_node("Add", ["z", "zero"], ["out"], name="third"),
    ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes, "g", [value("x", TensorProto.FLOAT, [4])], [value("out", TensorProto.FLOAT, [4])], [zero]
    )
    return helper.make_model(graph)


def test_merged_tensors_are_split_where_something_says_they_were_several() -> None:
    model = merged_model()
    before = model.SerializeToString()
    zeros = {name: np.zeros(4, np.float32) for name in ("a.bias", "b.bias", "c.bias")}
    split, splits = unmerge(model, open_weights(zeros))
    assert model.SerializeToString() == before
    assert [n.op_type for n in split.graph.node] == ["Add"] * 3
    assert len({n.input[1] for n in split.graph.node}) == 3
    assert {t.name for t in split.graph.initializer} == {"zero", "b.bias", "zero.2"}
    assert [s.copies for s in splits] == [("b.bias",), ("zero.2",)]
    onnx.checker.check_model(split)


def test_tensors_that_are_tied_for_good_stay_shared() -> None:
    model = merged_model()
    del model.graph.node[0]
    model.graph.node[1].input[1] = "zero"
    zero = np.zeros(4, np.float32)
    assert unmerge(model, open_weights({"a": zero})) == (model, ())
    assert unmerge(model, open_weights({"a": zero, "b": zero})) == (model, ())  # one storage under two names
    assert unmerge(model) == (model, ())
    assert len(unmerge(model, open_weights({"a": zero, "b": zero.copy()}))[1]) == 1


@pytest.mark.parametrize("count", [20, 150])
def test_a_bias_follows_its_weight_where_nothing_else_tells(count: int) -> None:
    checkpoint: dict[str, Any] = {f"m.{i}.weight": r(6, 4) for i in range(count)}
    checkpoint |= {f"m.{i}.bias": np.zeros(6, np.float32) for i in range(count)}
    weights: dict[str, Any] = {}
    for i in range(count):
        weights[f"mm_{i + 1000}"] = checkpoint[f"m.{i}.weight"].T.copy()
        weights[f"{i + 5000}"] = checkpoint[f"m.{i}.bias"]
    found = find(weights, checkpoint)
    assert all(found.names.entries[f"{i + 5000}"] == Stored(f"m.{i}.bias") for i in range(count))


# ---------------------------------------------------------------- tied weights, missing tensors, a wrong checkpoint


def outcome(names: NameMap, weights: dict[str, Any], checkpoint: dict[str, Any]) -> tuple[CheckReport, dict[str, Any]]:
    return check(sources_of(weights), names.apply(open_weights(checkpoint)))


@pytest.mark.parametrize("kept", ["wte.weight", "lm_head.weight"])
def test_tied_tensors_that_were_saved_twice_may_be_saved_once(kept: str) -> None:
    weights = {"embedding": A, "head": A.T.copy()}
    names = find(weights, {"wte.weight": A, "lm_head.weight": A.copy()}).names
    report, arrays = outcome(names, weights, {kept: B})
    assert report.ok
    assert report.unused == ()
    np.testing.assert_array_equal(arrays["embedding"], B)
    np.testing.assert_array_equal(arrays["head"], B.T)
    report, arrays = outcome(names, weights, {"wte.weight": B, "lm_head.weight": C})
    assert report.ok
    np.testing.assert_array_equal(arrays["embedding"], B)
    np.testing.assert_array_equal(arrays["head"], C.T)


def test_layers_that_were_made_by_copying_are_not_tied() -> None:
    weights = {"a": A, "b": A.copy()}
    names = find(weights, {"layers.0.weight": A, "layers.1.weight": A.copy()}).names
    report, _ = outcome(names, weights, {"layers.0.weight": B})
    assert [m.name for m in report.missing] == ["b"]


def test_tied_tensors_that_no_longer_are_one_need_two_weights() -> None:
    names = find({"embedding": A}, {"wte.weight": A, "lm_head.weight": A}).names
    report, _ = outcome(names, {"embedding": A}, {"wte.weight": B, "lm_head.weight": B.copy()})
    assert report.ok
    report, _ = outcome(names, {"embedding": A}, {"wte.weight": B, "lm_head.weight": C})
    assert "one weight for both, but now they differ" in report.rejected[0].text
    # Equal by accident, or by copying: the model never had the other.
    names = find({"embedding": A}, {"online.weight": A, "target.weight": A.copy()}).names
    report, _ = outcome(names, {"embedding": A}, {"online.weight": B, "target.weight": C})
    assert report.ok


def test_a_missing_tensor_is_called_by_the_checkpoints_name() -> None:
    weights = {"onnx::MatMul_411": A.T.copy(), "onnx::Gemm_412": B, "other": C}
    names = find(weights, {"h.weight": A, "h.bias": B, "norm": C}).names
    report, _ = outcome(names, weights, {"module.h.weight": A, "norm": C})
    first, second = report.problems()
    assert first == (
        "h.weight: float32[4, 6] is missing, for the weight onnx::MatMul_411 (meant: module.h.weight: float32[4, 6]?)"
    )
    assert second.startswith("h.bias: float32[4, 6] is missing, for the weight onnx::Gemm_412")
    with pytest.raises(RefitRejectedError, match="For other names give rules"):
        report.raise_if_rejected()
    assert report.to_json()["missing"][0]["checkpoint_names"] == ["h.weight"]
    json.dumps(report.to_json(), allow_nan=False)


def test_a_plan_of_a_wrong_checkpoint_still_takes_the_models_own_names() -> None:
    weights = {"embedding": A, "fc.weight": B, "fc.bias": C}
    # Another epoch's checkpoint, of which only the frozen part is the model's; all names are of both kinds.
    names = find(weights, {"embedding": A, "fc.weight": r(4, 6), "fc.bias": r(4, 6)}).names
    new = {"embedding": C, "fc.weight": A, "fc.bias": B}
    report, arrays = outcome(names, weights, new)
    assert report.ok
    for name, array in new.items():
        np.testing.assert_array_equal(arrays[name], array)
    report, _ = check(
        sources_of(weights), names.apply(open_weights({"fc.bias": B})), options=CheckOptions(partial=True)
    )
    assert report.ok


def test_a_weight_that_no_checkpoint_gives_says_so() -> None:
    weights = {"w": A * np.float32(1.5) + 1, "v": B, "u": C}
    names = find(weights, {"a": A, "v": B, "u": C}).names
    report, _ = outcome(names, weights, {"a": A, "v": B, "u": C})
    assert report.problems() == [
        "w: float32[4, 6] is missing: no tensor of the checkpoint that the plan was built with gives it"
    ]
    with pytest.raises(RefitRejectedError, match="the very checkpoint that the model was exported from"):
        report.raise_if_rejected()
