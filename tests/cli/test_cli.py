"""The command line as people and machines use it: output, exit codes, one clear line for every failure."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import safetensors.numpy

import onnx_refit
from onnx_refit.cli.main import main
from tests.support.models import mlp, mlp_input, mlp_reference, mlp_weights


@pytest.fixture
def place(tmp_path: Path) -> Path:
    onnx.save(mlp(), tmp_path / "mlp.onnx")
    safetensors.numpy.save_file(mlp_weights(1), tmp_path / "one.safetensors")
    np.savez(tmp_path / "in.npz", x=mlp_input())
    assert main(["build", str(tmp_path / "mlp.onnx"), "-o", str(tmp_path / "mlp.plan")]) == 0
    return tmp_path


def run_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, object]:
    capsys.readouterr()
    assert main([*arguments, "--json"]) == 0
    result: dict[str, object] = json.loads(capsys.readouterr().out)
    return result


def test_build_then_run_then_run_with_other_weights(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan, inputs, output = str(place / "mlp.plan"), str(place / "in.npz"), place / "out.npz"
    assert main(["run", plan, "--input", inputs, "-o", str(output)]) == 0
    x = mlp_input()
    np.testing.assert_allclose(np.load(output)["y"], mlp_reference(mlp_weights(), x), rtol=1e-4, atol=1e-4)
    shown = run_json(
        capsys, "run", plan, "--input", inputs, "--weights", str(place / "one.safetensors"), "-o", str(output)
    )
    assert shown["outputs"] == {"y": {"dtype": "float32", "shape": [3, 10]}}
    np.testing.assert_allclose(np.load(output)["y"], mlp_reference(mlp_weights(1), x), rtol=1e-4, atol=1e-4)


def test_inputs_that_are_no_npz_file_say_how_to_write_one(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for wrong in ("mlp.onnx", "one.safetensors"):
        arguments = ["run", str(place / "mlp.plan"), "--input", str(place / wrong), "-o", str(place / "out.npz")]
        assert main(arguments) == 1
        assert "no npz file of plain arrays. Write one with numpy.savez" in capsys.readouterr().err


def test_a_portable_plan_is_built_for_an_engine_that_is_not_here_and_runs_where_it_is(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, plan = str(place / "mlp.onnx"), place / "portable.plan"
    assert main(["build", model, "-o", str(plan), "--engine", "tensorrt", "--portable"]) == 0
    assert onnx_refit.Plan.load(plan).engine == "tensorrt"
    assert main(["build", model, "-o", str(plan), "--portable"]) == 0
    assert main(["run", str(plan), "--input", str(place / "in.npz"), "-o", str(place / "out.npz")]) == 0
    wanted = mlp_reference(mlp_weights(), mlp_input())
    np.testing.assert_allclose(np.load(place / "out.npz")["y"], wanted, rtol=1e-4, atol=1e-4)


def test_refit_writes_a_second_plan(place: Path) -> None:
    other = place / "other.plan"
    assert main(["refit", str(place / "mlp.plan"), str(place / "one.safetensors"), "-o", str(other)]) == 0
    assert main(["run", str(other), "--input", str(place / "in.npz"), "-o", str(place / "out.npz")]) == 0
    wanted = mlp_reference(mlp_weights(1), mlp_input())
    np.testing.assert_allclose(np.load(place / "out.npz")["y"], wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "arguments",
    [
        ["diff", "one.safetensors", "two.safetensors", "-o", "one.safetensors"],
        ["diff", "one.safetensors", "two.safetensors", "--html", "two.safetensors"],
        ["diff", "one.safetensors", "two.safetensors", "--plot", "two.safetensors"],
        ["refit", "mlp.plan", "one.safetensors", "-o", "one.safetensors"],
        ["build", "mlp.onnx", "-o", "one.safetensors", "--checkpoint", "one.safetensors"],
        ["build", "mlp.onnx", "-o", "mlp.onnx"],
        ["prepare", "mlp.onnx", "-o", "mlp.onnx"],
        ["run", "mlp.plan", "--input", "in.npz", "-o", "in.npz"],
    ],
)
def test_what_a_command_reads_is_not_overwritten(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    monkeypatch.chdir(place)
    safetensors.numpy.save_file(mlp_weights(2), "two.safetensors")
    before = {path.name: path.read_bytes() for path in place.iterdir()}
    assert main(arguments) == 1
    assert "the output would replace the input. Name another file with -o" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in place.iterdir()} == before


def test_a_plot_of_another_kind_is_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = str(place / "one.safetensors")
    assert main(["diff", one, one, "--plot", str(place / "change.doc")]) == 1
    assert "Name a .png or .svg file" in capsys.readouterr().err


def test_inspect_shows_weights_and_what_reads_them(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = run_json(capsys, "inspect", str(place / "mlp.plan"))
    weights = {entry["name"]: entry for entry in shown["weights"]}  # type: ignore[attr-defined]
    assert set(weights) == {"w1", "b1", "w2", "b2"}
    assert weights["w1"]["shape"] == [24, 40]
    assert weights["w1"]["bytes"] == 24 * 40 * 4
    assert "first" in weights["w1"]["uses"][0]
    assert main(["inspect", str(place / "mlp.plan"), "--decisions"]) == 0
    assert "4 refittable weights" in capsys.readouterr().out


def test_check_says_which_file_of_a_directory_it_read(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = place / "hub"
    folder.mkdir()
    safetensors.numpy.save_file(mlp_weights(1), folder / "model.safetensors")
    assert main(["check", str(place / "mlp.plan"), str(folder)]) == 0
    assert f"a refit from {folder / 'model.safetensors'} would be accepted" in capsys.readouterr().out


def test_check_says_what_would_be_refused_and_why(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(place / "mlp.plan"), str(place / "one.safetensors")]) == 0
    assert "a refit would be accepted" in capsys.readouterr().out
    bad = {**mlp_weights(1), "w1": np.full((24, 40), np.nan, np.float32), "w3": np.zeros(3, np.float32)}
    del bad["b1"]
    safetensors.numpy.save_file(bad, place / "bad.safetensors")
    assert main(["check", str(place / "mlp.plan"), str(place / "bad.safetensors")]) == 1
    text = capsys.readouterr().out
    assert "rejected: 1" in text
    assert "missing: 1" in text
    assert "a refit would be refused" in text
    assert main(["check", str(place / "mlp.plan"), str(place / "bad.safetensors"), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert not report["ok"]
    assert [entry["name"] for entry in report["missing"]] == ["b1"]


def test_diff_shows_changes_and_its_delta_brings_them_back(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan, one, delta = place / "mlp.plan", place / "one.safetensors", place / "delta.safetensors"
    shown = run_json(capsys, "diff", str(plan), str(one), "-o", str(delta), "--html", str(place / "d.html"))
    assert shown["changed"] == 4
    assert "<h1>" in (place / "d.html").read_text()
    assert main(["refit", str(plan), str(plan), "--delta", str(delta), "-o", str(place / "other.plan")]) == 0
    assert main(["diff", str(place / "other.plan"), str(one)]) == 0
    assert "identical" in capsys.readouterr().out
    assert main(["refit", str(plan), str(one), "--delta", str(delta), "-o", str(place / "new")]) == 1
    assert "applies to the checkpoint" in capsys.readouterr().err
    assert not (place / "new").exists()


def test_interpolation_goes_half_the_way(place: Path) -> None:
    plan, one, half = str(place / "mlp.plan"), str(place / "one.safetensors"), place / "half.plan"
    assert main(["refit", plan, plan, "--lerp", f"{one}=0.5", "-o", str(half)]) == 0
    weights = onnx_refit.Plan.load(half).weights
    assert weights is not None
    np.testing.assert_allclose(weights["w1"], (mlp_weights(0)["w1"] + mlp_weights(1)["w1"]) / 2, rtol=1e-5, atol=1e-6)
    assert main(["refit", plan, plan, "--lerp", one, "-o", str(half)]) == 2


def test_an_adapter_is_merged_into_its_base(place: Path) -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 24)).astype(np.float32), rng.standard_normal((40, 2)).astype(np.float32)
    folder = place / "adapter"
    folder.mkdir()
    tensors = {"base_model.model.first.lora_A.weight": a, "base_model.model.first.lora_B.weight": b}
    safetensors.numpy.save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["first"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    base = {("first.weight" if name == "w1" else name): array for name, array in mlp_weights(1).items()}
    base["first.weight"] = np.ascontiguousarray(base["first.weight"].T)
    safetensors.numpy.save_file(base, place / "base.safetensors")
    onnx.save(mlp(mlp_weights(1)), place / "base.onnx")
    plan, out = str(place / "base.plan"), str(place / "merged.plan")
    checkpoint = str(place / "base.safetensors")
    assert main(["build", str(place / "base.onnx"), "-o", plan, "--checkpoint", checkpoint]) == 0
    assert main(["refit", plan, checkpoint, "--lora", f"{folder}=0.5", "-o", out]) == 0
    weights = onnx_refit.Plan.load(out).weights
    assert weights is not None
    np.testing.assert_allclose(weights["w1"], mlp_weights(1)["w1"] + (b @ a).T, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(weights["w2"], mlp_weights(1)["w2"])


def test_prepare_writes_a_model(place: Path) -> None:
    assert main(["prepare", str(place / "mlp.onnx"), "-o", str(place / "prepared.onnx")]) == 0
    onnx.checker.check_model(onnx.load(place / "prepared.onnx"))


def test_bench_measures(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = run_json(capsys, "bench", str(place / "mlp.plan"), "--repeats", "3")
    for key in ("load_seconds", "inference_seconds", "refit_seconds", "copy_seconds"):
        assert float(str(shown[key])) > 0


# ---------------------------------------------------------------- failure: exit code, one line, nothing half-written

NOT_A_PLAN = {
    "nothing": None,
    "empty": b"",
    "text": b"hello\n" * 50,
}


@pytest.mark.parametrize("content", NOT_A_PLAN.values(), ids=NOT_A_PLAN.keys())
@pytest.mark.parametrize("command", ["inspect", "run", "check", "refit", "bench"])
def test_what_is_no_plan_fails_with_one_line(
    place: Path, capsys: pytest.CaptureFixture[str], command: str, content: bytes | None
) -> None:
    plan = place / "bad.plan"
    if content is not None:
        plan.write_bytes(content)
    arguments = {
        "inspect": [],
        "run": ["--input", str(place / "in.npz"), "-o", str(place / "new")],
        "check": [str(place / "one.safetensors")],
        "refit": [str(place / "one.safetensors"), "-o", str(place / "new")],
        "bench": [],
    }[command]
    capsys.readouterr()
    assert main([command, str(plan), *arguments]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert len(shown.err.strip().splitlines()) == 1
    assert shown.err.startswith(f"error: {plan}")
    assert not (place / "new").exists()


@pytest.mark.parametrize(
    "content", [None, b"", b"this is no protobuf", b"\x08\x07"], ids=["none", "empty", "text", "bare"]
)
def test_what_is_no_model_fails_with_one_line(
    place: Path, capsys: pytest.CaptureFixture[str], content: bytes | None
) -> None:
    model = place / "bad.onnx"
    if content is not None:
        model.write_bytes(content)
    for command in ("build", "prepare"):
        capsys.readouterr()
        assert main([command, str(model), "-o", str(place / "new")]) == 1
        shown = capsys.readouterr()
        assert len(shown.err.strip().splitlines()) == 1
        assert str(model) in shown.err
        assert "Traceback" not in shown.err
        assert not (place / "new").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: setattr(model.graph.node[2], "op_type", "Reluu"), "Reluu"),
        (lambda model: setattr(model.graph.node[2], "domain", "com.example"), "com.example"),
        (lambda model: setattr(model.opset_import[0], "version", 99), "99"),
        (lambda model: setattr(model.opset_import[0], "version", 3), "3"),
        (lambda model: model.graph.node[2].input.__setitem__(0, "nobody"), "nobody"),
    ],
    ids=["operator", "domain", "new opset", "old opset", "broken graph"],
)
def test_a_model_that_cannot_run_fails_with_one_line(
    place: Path, capsys: pytest.CaptureFixture[str], change: Callable[[onnx.ModelProto], None], message: str
) -> None:
    model = mlp()
    change(model)
    onnx.save(model, place / "odd.onnx")
    capsys.readouterr()
    assert main(["build", str(place / "odd.onnx"), "-o", str(place / "new")]) == 1
    shown = capsys.readouterr()
    assert len(shown.err.strip().splitlines()) == 1, shown.err
    assert message in shown.err
    assert not (place / "new").exists()


def test_debug_shows_the_traceback(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(place / "none.plan"), "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({}, "missing: 'x'"),
        ({"x": mlp_input().astype(np.float64)}, "float64"),
        ({"x": mlp_input()[:, :3]}, "the shape is"),
        ({"x": mlp_input(), "y": np.zeros(2)}, "unknown: 'y'"),
    ],
)
def test_bad_inputs_fail_with_one_line(
    place: Path, capsys: pytest.CaptureFixture[str], arrays: dict[str, np.ndarray], message: str
) -> None:
    np.savez(place / "bad.npz", **arrays)  # type: ignore[arg-type]
    capsys.readouterr()
    assert main(["run", str(place / "mlp.plan"), "--input", str(place / "bad.npz"), "-o", str(place / "new")]) == 1
    shown = capsys.readouterr()
    assert message in shown.err
    assert not (place / "new").exists()


def test_a_single_array_is_no_set_of_inputs(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(place / "one.npy", mlp_input())
    assert main(["run", str(place / "mlp.plan"), "--input", str(place / "one.npy"), "-o", str(place / "new")]) == 1
    assert "npy, not npz" in capsys.readouterr().err


def test_outputs_may_have_any_name_and_dtype(tmp_path: Path) -> None:
    node = onnx.helper.make_node("Cast", ["x"], ["file"], to=onnx.TensorProto.BFLOAT16)
    graph = onnx.helper.make_graph(
        [node],
        "cast",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [2])],
        [onnx.helper.make_tensor_value_info("file", onnx.TensorProto.BFLOAT16, [2])],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, tmp_path / "cast.onnx")
    np.savez(tmp_path / "in.npz", x=np.array([1.5, -2.0], np.float32))
    plan, out = str(tmp_path / "cast.plan"), tmp_path / "out.npz"
    assert main(["build", str(tmp_path / "cast.onnx"), "-o", plan]) == 0
    assert main(["run", plan, "--input", str(tmp_path / "in.npz"), "-o", str(out)]) == 0
    np.testing.assert_array_equal(np.load(out)["file"], np.array([1.5, -2.0], np.float32))


def test_vocabularies_stay_in_the_folder_of_the_output(tmp_path: Path) -> None:
    mapper = onnx.helper.make_node(
        "CategoryMapper", ["w"], ["i"], name="/../../escaped", domain="ai.onnx.ml", cats_strings=["a"], cats_int64s=[3]
    )
    graph = onnx.helper.make_graph(
        [mapper, onnx.helper.make_node("Neg", ["i"], ["y"])],
        "words",
        [onnx.helper.make_tensor_value_info("w", onnx.TensorProto.STRING, [2])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.INT64, [2])],
    )
    opsets = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid("ai.onnx.ml", 1)]
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=9), folder / "words.onnx")
    assert main(["prepare", str(folder / "words.onnx"), "-o", str(folder / "ready.onnx")]) == 0
    written = {path.name for path in tmp_path.rglob("*.json")}
    assert written == {path.name for path in folder.glob("*.json")}
    assert len(written) == 1


def test_an_npz_with_pickles_is_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(place / "evil.npz", x=np.array([{"a": 1}], dtype=object))
    assert main(["run", str(place / "mlp.plan"), "--input", str(place / "evil.npz"), "-o", str(place / "new")]) == 1
    assert "no npz file of plain arrays" in capsys.readouterr().err


def test_an_input_is_not_overwritten(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, inputs, plan = place / "mlp.onnx", place / "in.npz", place / "mlp.plan"
    before = [path.read_bytes() for path in (model, inputs, plan)]
    assert main(["build", str(model), "-o", str(model)]) == 1
    assert main(["prepare", str(model), "-o", str(model)]) == 1
    assert main(["run", str(plan), "--input", str(inputs), "-o", str(inputs)]) == 1
    assert "would replace the input" in capsys.readouterr().err
    assert [path.read_bytes() for path in (model, inputs, plan)] == before


def test_names_cannot_command_the_terminal(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = {**mlp_weights(1), "\x1b[31mred": np.zeros(3, np.float32)}
    safetensors.numpy.save_file(weights, place / "odd.safetensors")
    assert main(["check", str(place / "mlp.plan"), str(place / "odd.safetensors")]) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert "red" in shown


@pytest.mark.parametrize(
    "arguments", [["frobnicate"], ["build"], ["build", "a.onnx"], ["build", "a", "-o", "b", "--engine", "abacus"]]
)
def test_bad_usage_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert "Usage" in capsys.readouterr().err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_directory_fails_with_one_line(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place.chmod(0o500)
    try:
        assert main(["build", str(place / "mlp.onnx"), "-o", str(place / "x.plan")]) == 1
        assert "permission denied" in capsys.readouterr().err
    finally:
        place.chmod(0o700)
