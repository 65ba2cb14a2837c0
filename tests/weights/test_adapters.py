"""LoRA adapters, deltas and interpolation give the right bits, always the same ones, or refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

import onnx_refit
from onnx_refit.errors import WeightsError, WeightsFormatError
from onnx_refit.weights.delta import DeltaSource, write_delta
from onnx_refit.weights.fingerprint import combine, fingerprint, tensor_digest
from onnx_refit.weights.lerp import LerpSource
from onnx_refit.weights.lora import LoraSource, load_adapter
from onnx_refit.weights.open import open_weights
from onnx_refit.weights.source import read_all
from onnx_refit.weights.write import write_safetensors
from tests.support.models import mlp, mlp_input

RNG = np.random.default_rng(7)


def r(*shape: int) -> Any:
    return RNG.standard_normal(shape).astype(np.float32)


BASE: dict[str, Any] = {
    "net.fc.weight": r(6, 4),
    "net.fc.bias": r(6),
    "net.conv1d.weight": r(4, 6),  # [in, out], as GPT-2 has it
    "net.conv.weight": r(6, 4, 3, 3),
    "net.point.weight": r(6, 4, 1, 1),
    "net.table.weight": r(10, 4),
    "net.half.weight": r(6, 4).astype(ml_dtypes.bfloat16),
    "net.head.weight": r(2, 6),
}


def adapter(path: Path, tensors: dict[str, Any], **config: Any) -> Path:
    path.mkdir()
    save_file(
        {f"base_model.model.{name}": array for name, array in tensors.items()}, path / "adapter_model.safetensors"
    )
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "fan_in_fan_out": False} | config
    (path / "adapter_config.json").write_text(json.dumps(settings))
    return path


def pair(module: str, out: int, inner: int, rank: int = 2, kernel: tuple[int, ...] = ()) -> dict[str, Any]:
    ones = (1,) * len(kernel)
    return {f"{module}.lora_A.weight": r(rank, inner, *kernel), f"{module}.lora_B.weight": r(out, rank, *ones)}


def merged(*adapters: tuple[Path, float]) -> dict[str, Any]:
    source = LoraSource(open_weights(BASE), [(load_adapter(path), scale) for path, scale in adapters])
    return dict(read_all(source))


def test_linear_is_merged_in_float32(tmp_path: Path) -> None:
    tensors = pair("net.fc", 6, 4)
    path = adapter(tmp_path / "a", tensors)
    a, b = tensors["net.fc.lora_A.weight"], tensors["net.fc.lora_B.weight"]
    got = merged((path, 1.0))
    np.testing.assert_array_equal(got["net.fc.weight"], BASE["net.fc.weight"] + (b @ a) * np.float32(2))
    for name in BASE:
        if name != "net.fc.weight":
            assert got[name] is BASE[name]
    source = LoraSource(open_weights(BASE), [(load_adapter(path / "adapter_model.safetensors"), 1.0)])
    assert source.changed == {"net.fc.weight"}


def test_a_then_b_then_a_gives_the_bits_of_a(tmp_path: Path) -> None:
    first = adapter(tmp_path / "a", pair("net.fc", 6, 4) | pair("net.half", 6, 4))
    second = adapter(tmp_path / "b", pair("net.fc", 6, 4))
    once = merged((first, 1.0))
    merged((second, 1.0))
    again = merged((first, 1.0))
    assert all(once[n].tobytes() == again[n].tobytes() for n in BASE)
    assert once["net.half.weight"].dtype == ml_dtypes.bfloat16


def test_several_adapters_add_up_with_their_scales(tmp_path: Path) -> None:
    x, y = pair("net.fc", 6, 4), pair("net.fc", 6, 4)
    first, second = adapter(tmp_path / "a", x), adapter(tmp_path / "b", y)
    expected = BASE["net.fc.weight"].astype(np.float64)
    for tensors, scale in ((x, 0.5), (y, -2.0)):
        expected = expected + scale * 2 * (
            tensors["net.fc.lora_B.weight"].astype(np.float64) @ tensors["net.fc.lora_A.weight"]
        )
    np.testing.assert_allclose(merged((first, 0.5), (second, -2.0))["net.fc.weight"], expected, rtol=1e-5, atol=1e-6)


def test_convolutions_embeddings_and_transposed_weights(tmp_path: Path) -> None:
    tensors = pair("net.conv", 6, 4, kernel=(3, 3)) | pair("net.point", 6, 4, kernel=(1, 1))
    tensors |= {"net.table.lora_embedding_A": r(2, 10), "net.table.lora_embedding_B": r(4, 2)}
    got = merged((adapter(tmp_path / "a", tensors), 1.0))
    for module in ("net.conv", "net.point"):
        a, b = tensors[f"{module}.lora_A.weight"], tensors[f"{module}.lora_B.weight"]
        delta = np.einsum("or,rihw->oihw", b[:, :, 0, 0], a)
        np.testing.assert_allclose(got[f"{module}.weight"], BASE[f"{module}.weight"] + 2 * delta, rtol=1e-5, atol=1e-6)
    table = (tensors["net.table.lora_embedding_B"] @ tensors["net.table.lora_embedding_A"]).T
    np.testing.assert_allclose(got["net.table.weight"], BASE["net.table.weight"] + 2 * table, rtol=1e-5, atol=1e-6)
    flipped = pair("net.conv1d", 6, 4)
    got = merged((adapter(tmp_path / "b", flipped, fan_in_fan_out=True), 1.0))
    delta = flipped["net.conv1d.lora_B.weight"] @ flipped["net.conv1d.lora_A.weight"]
    np.testing.assert_allclose(got["net.conv1d.weight"], BASE["net.conv1d.weight"] + 2 * delta.T, rtol=1e-5, atol=1e-6)


def test_ranks_alphas_and_stabilisation(tmp_path: Path) -> None:
    tensors = pair("net.fc", 6, 4, rank=3) | pair("net.half", 6, 4)
    config = {"rank_pattern": {"fc": 3}, "alpha_pattern": {r"net\.fc": 9}, "use_rslora": True}
    loaded = load_adapter(adapter(tmp_path / "a", tensors, **config))
    assert loaded.factors["net.fc"].scaling == pytest.approx(9 / 3**0.5)
    assert loaded.factors["net.half"].scaling == pytest.approx(4 / 2**0.5)


def test_tensors_trained_whole_replace_those_of_the_base(tmp_path: Path) -> None:
    new = {"net.fc.bias": r(6), "net.head.weight": r(2, 6)}
    got = merged((adapter(tmp_path / "a", pair("net.fc", 6, 4) | new), 1.0))
    np.testing.assert_array_equal(got["net.fc.bias"], new["net.fc.bias"])
    np.testing.assert_array_equal(got["net.head.weight"], new["net.head.weight"])


def test_a_prefix_on_either_side_is_seen_through(tmp_path: Path) -> None:
    path = adapter(tmp_path / "a", pair("wrapped.net.fc", 6, 4))
    assert LoraSource(open_weights(BASE), [(load_adapter(path), 1.0)]).changed == {"net.fc.weight"}
    path = adapter(tmp_path / "b", pair("fc", 6, 4))
    assert LoraSource(open_weights(BASE), [(load_adapter(path), 1.0)]).changed == {"net.fc.weight"}


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        (pair("net.fc", 6, 4), {"peft_type": "IA3"}, "of type 'IA3'"),
        (pair("net.fc", 6, 4), {"use_dora": True}, "use_dora"),
        (pair("net.fc", 6, 4), {"r": 3}, "not of rank 3"),
        (pair("net.fc", 6, 4), {"r": 0}, "no valid 'r'"),
        (pair("net.fc", 6, 4), {"lora_alpha": "4"}, "no valid 'lora_alpha'"),
        (pair("net.fc", 6, 4), {"alpha_pattern": {"(": 3}}, "no valid pattern"),
        (pair("net.fc", 6, 4), {"rank_pattern": [1]}, "no valid 'rank_pattern'"),
        ({"net.fc.lora_A.weight": r(2, 4)}, {}, "one lora_A and one lora_B"),
        (pair("net.fc", 6, 5), {}, r"shape \[6, 5\], the model has \[6, 4\]"),
        (pair("net.fx", 6, 4), {}, "Near are net.fc.weight"),
        ({"net.fc.bias": r(7)}, {}, "replaces net.fc.bias"),
    ],
)
def test_adapters_that_do_not_fit_are_refused(tmp_path: Path, tensors: Any, config: Any, message: str) -> None:
    with pytest.raises(WeightsError, match=message):
        merged((adapter(tmp_path / "a", tensors, **config), 1.0))


def test_overflow_in_the_dtype_of_the_base_is_refused(tmp_path: Path) -> None:
    base = {"fc.weight": np.full((2, 2), 6e4, np.float16)}
    tensors = {
        "fc.lora_A.weight": np.full((2, 2), 100, np.float32),
        "fc.lora_B.weight": np.full((2, 2), 100, np.float32),
    }
    source = LoraSource(open_weights(base), [(load_adapter(adapter(tmp_path / "a", tensors)), 1.0)])
    with pytest.raises(WeightsError, match="overflow float16"):
        source.read("fc.weight")
    with pytest.raises(WeightsError, match="no scale"):
        LoraSource(open_weights(base), [(load_adapter(tmp_path / "a"), float("nan"))])
    (tmp_path / "a" / "adapter_config.json").unlink()
    with pytest.raises(WeightsError, match=r"has no adapter_config\.json"):
        load_adapter(tmp_path / "a")


# ---------------------------------------------------------------- fingerprints


def test_fingerprints_depend_on_everything_but_order(tmp_path: Path) -> None:
    first = fingerprint(open_weights(BASE))
    assert fingerprint(open_weights(dict(reversed(BASE.items())))).value == first.value
    write_safetensors(tmp_path / "a.safetensors", open_weights(BASE))
    assert fingerprint(open_weights(tmp_path / "a.safetensors")).value == first.value
    w = BASE["net.fc.weight"]
    flipped = w.copy()
    flipped.view(np.uint8)[-1, -1] ^= 1
    values = {first.value}
    for change in (w.T, w.reshape(4, 6), flipped, w.view(np.int32), -w):
        values.add(fingerprint(open_weights({**BASE, "net.fc.weight": change})).value)
    values.add(fingerprint(open_weights({**{k: v for k, v in BASE.items() if k != "net.fc.weight"}, "w": w})).value)
    assert len(values) == 7
    assert combine({"a": "x", "b": "y"}).value != combine({"a": "y", "b": "x"}).value


def test_known_digests_are_not_computed_again() -> None:
    first = fingerprint(open_weights(BASE))
    known = {name: digest for name, digest in first.digests.items() if name != "net.fc.bias"}
    seen: list[int] = []
    assert fingerprint(open_weights(BASE), known, seen.append) == first
    assert seen == [24]
    assert tensor_digest(np.asfortranarray(BASE["net.fc.weight"])) == first.digests["net.fc.weight"]


# ---------------------------------------------------------------- deltas


def changed() -> dict[str, Any]:
    new = dict(BASE)
    new["net.fc.weight"] = r(6, 4)
    sparse = BASE["net.conv.weight"].copy()
    sparse[1, 2, 0, 0] = np.nan
    sparse[5, 3, 2, 2] = -0.0
    new["net.conv.weight"] = sparse
    del new["net.head.weight"]
    new["net.new"] = np.array(3)
    return new


def test_a_delta_turns_its_base_into_the_result(tmp_path: Path) -> None:
    path, new = tmp_path / "d.safetensors", changed()
    summary = write_delta(open_weights(BASE), open_weights(new), path)
    assert set(summary.changed) == {"net.fc.weight", "net.conv.weight", "net.new"}
    assert summary.removed == ("net.head.weight",)
    assert summary.nbytes == 96 + 2 * 8 + 8
    got = DeltaSource(open_weights(BASE), path)
    assert got.changed == set(summary.changed)
    assert got.fingerprint.value == summary.result == fingerprint(open_weights(new)).value
    assert {n: a.tobytes() for n, a in read_all(got)} == {n: a.tobytes() for n, a in new.items()}
    assert got.specs.keys() == new.keys()


def test_a_delta_is_not_taken_for_a_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "d.safetensors"
    write_delta(open_weights(BASE), open_weights(changed()), path)
    with pytest.raises(WeightsFormatError, match=r"a delta, not a checkpoint.*--delta"):
        open_weights(path)


def test_a_delta_applies_to_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "d.safetensors"
    write_delta(open_weights(BASE), open_weights(changed()), path)
    with pytest.raises(WeightsError, match="applies to the checkpoint"):
        DeltaSource(open_weights(changed()), path)
    write_safetensors(tmp_path / "x.safetensors", open_weights(BASE))
    with pytest.raises(WeightsFormatError, match="no delta"):
        DeltaSource(open_weights(BASE), tmp_path / "x.safetensors")
    with pytest.raises(WeightsError, match="holds no tensor"):
        DeltaSource(open_weights(BASE), path).read("net.head.weight")


def test_a_damaged_delta_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "d.safetensors"
    write_delta(open_weights(BASE), open_weights(changed()), path)
    good = path.read_bytes()
    header = int.from_bytes(good[:8], "little") + 8
    for at in range(header, len(good)):  # every byte of every index and value
        bad = bytearray(good)
        bad[at] ^= 0x10
        path.write_bytes(bad)
        with pytest.raises(WeightsFormatError):
            DeltaSource(open_weights(BASE), path)
    for old, new in (
        (b"at:net.conv", b"at:net.cOnv"),
        (b"whole:net.new", b"other:net.new"),
        (b'"removed":"[', b'"removed":"{'),
    ):
        path.write_bytes(good.replace(old, new))
        with pytest.raises(WeightsFormatError):
            DeltaSource(open_weights(BASE), path)


# ---------------------------------------------------------------- interpolation


def test_interpolation() -> None:
    rng = np.random.default_rng(7)  # of its own: the same numbers whichever tests ran before
    a: dict[str, Any] = {
        "w": rng.standard_normal((3, 3)).astype(np.float32),
        "h": rng.standard_normal(4).astype(np.float16),
        "n": np.arange(3),
        "d": rng.standard_normal(2),
    }
    b = {n: (v + 1).astype(v.dtype) if n != "n" else v for n, v in a.items()}
    for t, expected in ((0, a), (1, b)):
        assert {n: x.tobytes() for n, x in read_all(LerpSource(open_weights(a), open_weights(b), t))} == {
            n: x.tobytes() for n, x in expected.items()
        }
    middle = dict(read_all(LerpSource(open_weights(a), open_weights(b), 0.25)))
    np.testing.assert_array_equal(middle["w"], a["w"] * np.float32(0.75) + b["w"] * np.float32(0.25))
    # b is rounded to half precision before: relative to a sum near zero that is any error.
    np.testing.assert_allclose(middle["h"].astype(np.float32), a["h"].astype(np.float32) + 0.25, rtol=2e-3, atol=1e-3)
    assert {n: x.dtype for n, x in middle.items()} == {n: x.dtype for n, x in a.items()}


def test_interpolation_needs_two_of_a_kind() -> None:
    a: dict[str, Any] = {"w": r(3), "n": np.arange(3)}
    with pytest.raises(WeightsError, match="'w' differs"):
        LerpSource(open_weights(a), open_weights({**a, "w": r(4)}), 0.5)
    with pytest.raises(WeightsError, match="'x' differs"):
        LerpSource(open_weights(a), open_weights({**a, "x": r(4)}), 0.5)
    with pytest.raises(WeightsError, match="cannot be interpolated"):
        LerpSource(open_weights(a), open_weights({**a, "n": np.arange(3) + 1}), 0.5).read("n")
    with pytest.raises(WeightsError, match="no place"):
        LerpSource(open_weights(a), open_weights(a), float("inf"))
    big = {"h": np.full(1, 6e4, np.float16)}
    with pytest.raises(WeightsError, match="overflow"):
        LerpSource(open_weights({"h": -big["h"]}), open_weights(big), 3).read("h")


# ---------------------------------------------------------------- what users run into


def test_an_adapter_goes_onto_the_weights_of_an_engine(tmp_path: Path) -> None:
    trained = {"h.weight": r(40, 24), "h.bias": r(40), "o.weight": r(10, 40), "o.bias": r(10)}
    exported = {"w1": "h.weight", "b1": "h.bias", "w2": "o.weight", "b2": "o.bias"}
    model = mlp({name: np.ascontiguousarray(trained[own].T) for name, own in exported.items()})
    plan = onnx_refit.build(model, checkpoint=trained)
    path = adapter(tmp_path / "a", pair("h", 40, 24))
    x = mlp_input()
    with onnx_refit.load(plan) as engine:
        engine.refit(onnx_refit.lora(trained, path))
        expected = engine.run({"x": x})["y"]
    with onnx_refit.load(plan) as engine:
        with pytest.raises(WeightsError, match=r"for 'h.weight', which the base .* names=plan.names"):
            onnx_refit.lora(engine.weights(), path)
        engine.refit(onnx_refit.lora(engine.weights(), path, names=plan.names))
        np.testing.assert_array_equal(engine.run({"x": x})["y"], expected)


def test_a_folder_that_is_no_adapter_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    save_file({"x": r(2)}, tmp_path / "bare.safetensors")
    for given, message in (
        ("nodir", r"^nodir: no such file or folder"),
        ("empty", r"^empty: the folder has no adapter_model.safetensors"),
        ("bare.safetensors", rf"^{tmp_path}: the folder of the adapter has no adapter_config.json"),
        ("", "path of the adapter is empty"),
    ):
        with pytest.raises(WeightsError, match=message):
            load_adapter(given)
