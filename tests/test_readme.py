"""The README's examples run as they stand."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import safetensors.numpy
from onnx import TensorProto, helper, numpy_helper

import onnx_refit
from onnx_refit.cli.main import main
from onnx_refit.tensors import Array
from tests.support.models import mlp, mlp_input, mlp_weights

TEXT = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
IN_PYTHON = re.findall(r"^```python\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)
COMMANDS = TEXT.split("## On the command line\n\n```sh\n", 1)[1].split("```", 1)[0].splitlines()


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_first_example(capsys: pytest.CaptureFixture[str]) -> None:
    onnx.save(mlp(), "model.onnx")
    for epoch in (7, 8):
        safetensors.numpy.save_file(mlp_weights(epoch), f"epoch{epoch}.safetensors")
    exec(compile(IN_PYTHON[0], "README.md", "exec"), {})
    assert "version 2 (was 1) from epoch7.safetensors" in capsys.readouterr().out


def layers(seed: int) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    shapes = {"layer1.weight": (6, 24), "layer3.weight": (5, 6), "layer3.bias": (5,)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def test_the_example_of_weights_made_of_others(place: Path) -> None:
    nodes = [
        helper.make_node("Gemm", ["x", "layer1.weight"], ["h"], transB=1),
        helper.make_node("Gemm", ["h", "layer3.weight", "layer3.bias"], ["y"], transB=1),
    ]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", n]) for name, n in (("x", 24), ("y", 5))]
    tensors = [numpy_helper.from_array(array, name) for name, array in layers(0).items()]
    graph = helper.make_graph(nodes, "layers", values[:1], values[1:], tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), "model.onnx")
    onnx_refit.build("model.onnx").save("model.plan")
    for name, seed in (("base", 0), ("a", 1), ("b", 2)):
        safetensors.numpy.save_file(layers(seed), f"{name}.safetensors")
    assert main(["diff", "a.safetensors", "b.safetensors", "-o", "a-to-b.safetensors"]) == 0
    (place / "adapters/customer7").mkdir(parents=True)
    pair = {"lora_A": np.ones((2, 6), np.float32), "lora_B": np.ones((5, 2), np.float32)}
    safetensors.numpy.save_file(
        {f"base_model.model.layer3.{name}.weight": array for name, array in pair.items()},
        "adapters/customer7/adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2}
    (place / "adapters/customer7/adapter_config.json").write_text(json.dumps(config))
    known: dict[str, Any] = {"onnx_refit": onnx_refit, "new_bias": layers(9)["layer3.bias"]}
    with onnx_refit.load("model.plan") as first:
        known["engine"] = first
        exec(compile(IN_PYTHON[1], "README.md", "exec"), known)
        np.testing.assert_array_equal(first.weights().read("layer1.weight"), layers(2)["layer1.weight"])
        assert first.version == 5
    with known["engine"] as last:
        assert last is not first
        assert (place / "versions").is_dir()


def test_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    onnx.save(mlp(mlp_weights(6)), "model.onnx")
    for epoch in (6, 7):
        safetensors.numpy.save_file(mlp_weights(epoch), f"epoch{epoch}.safetensors")
    np.savez("in.npz", x=mlp_input())
    assert len(COMMANDS) >= 5
    for line in COMMANDS:
        program, command, *arguments = shlex.split(line, comments=True)
        assert program == "onnx-refit"
        if command == "serve":  # it would stay: its own tests run it
            arguments = ["--help"]
        assert main([command, *arguments]) == 0, line
    assert Path("out.npz").exists()
    assert Path("change.png").exists()
