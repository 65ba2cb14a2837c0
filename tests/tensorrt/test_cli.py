from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest
from click.testing import CliRunner

from onnx_refit.cli.tensorrt import check_tensorrt_command
from onnx_refit.engine.tensorrt.bindings import find_bindings
from onnx_refit.errors import EngineError, MissingExtraError

from .bidaf import random_bidaf


def test_bad_ranges_are_bad_usage(tmp_path: Path) -> None:
    for arguments in (["--dim", "c=5:1:2"], ["--dim", "c"], ["--shape", "x=axb"]):
        result = CliRunner().invoke(check_tensorrt_command, [str(tmp_path / "m.onnx"), *arguments])
        assert result.exit_code == 2, result.output


@pytest.mark.tensorrt
def test_bidaf_node_by_node(tmp_path: Path) -> None:
    try:
        find_bindings()
    except (MissingExtraError, EngineError) as error:
        pytest.skip(str(error))
    path = tmp_path / "bidaf.onnx"
    onnx.save(random_bidaf(), path)
    result = CliRunner().invoke(check_tensorrt_command, [str(path), "--json", "--dim", "c=1:50:400"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    refused = {node["op_type"] for node in report["before"]["nodes"] if not node["accepted"]}
    assert "CategoryMapper" in refused
    assert report["acceptable"] is True
    text = CliRunner().invoke(check_tensorrt_command, [str(path)])
    assert text.exit_code == 0, text.output
    assert "CategoryMapper_4" in text.output
    assert "acceptable" in text.output
