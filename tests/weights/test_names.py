"""Which checkpoint tensor each weight is: found by bits alone, ties told apart."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from onnx_refit.plan.compiled import SourceWeight
from onnx_refit.refit.check import check
from onnx_refit.tensors import spec_of
from onnx_refit.weights.mapped_view import MappedView
from onnx_refit.weights.names import find_names
from onnx_refit.weights.open import open_weights
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
from tests.weights.names_support import RNG, A, B, C, find, r, sources_of

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
    report, arrays = check(sources, MappedView(open_weights({"a": B, "bias": np.zeros(4, np.float32)}), found.names))
    assert report.ok
    assert list(arrays) == ["w"]


def test_a_tied_tensor_is_found_under_either_of_its_names() -> None:
    weights = {"embedding": A, "head": A.T.copy()}
    found = find(weights, {"wte.weight": A, "lm_head.weight": A})
    assert found.ties == ()
    for name in ("wte.weight", "lm_head.weight"):
        report, arrays = check(sources_of(weights), MappedView(open_weights({name: B}), found.names))
        assert report.ok
        assert report.unused == ()
        np.testing.assert_array_equal(arrays["embedding"], B)
        np.testing.assert_array_equal(arrays["head"], B.T)
