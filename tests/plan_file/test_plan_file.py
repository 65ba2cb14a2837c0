"""The plan file: round trip, damage, other versions, and places that cannot be written."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import onnx_refit
from onnx_refit.errors import OnnxRefitError, PlanFormatError, PlanMismatchError
from onnx_refit.files import WriteError
from onnx_refit.plan.content import model_fingerprint
from onnx_refit.weights.sources.safetensors import SafetensorsSource
from onnx_refit.weights.write import write_safetensors
from tests.support.models import conv_bn, mlp, mlp_input, mlp_reference, mlp_weights


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return onnx_refit.build(mlp()).save(tmp_path_factory.mktemp("plan") / "mlp.plan")


def test_what_is_saved_is_what_is_loaded(saved: Path) -> None:
    built, loaded = onnx_refit.build(mlp()), onnx_refit.Plan.load(saved)
    assert loaded.fingerprint == built.fingerprint
    assert loaded.compiled == built.compiled
    assert loaded.model_fingerprint == model_fingerprint(mlp())
    assert loaded.weights is not None
    for name, array in mlp_weights().items():
        np.testing.assert_array_equal(loaded.weights[name], array)
        assert not loaded.weights[name].flags.writeable


def test_a_fold_survives_the_file(tmp_path: Path) -> None:
    built = onnx_refit.build(conv_bn())
    loaded = onnx_refit.Plan.load(built.save(tmp_path / "conv.plan"))
    assert loaded.compiled == built.compiled
    x = np.random.default_rng(0).standard_normal((1, 3, 9, 9)).astype(np.float32)
    with onnx_refit.load(built) as one, onnx_refit.load(loaded) as other:
        np.testing.assert_array_equal(one.run({"x": x})["y"], other.run({"x": x})["y"])


def test_any_safetensors_reader_can_open_it(saved: Path) -> None:
    tensors = safetensors.numpy.load_file(saved)
    np.testing.assert_array_equal(tensors["weights/w1"], mlp_weights()["w1"])
    assert "plan/activation.onnx" in tensors


def test_building_twice_gives_the_same_plan(tmp_path: Path) -> None:
    one = onnx_refit.build(mlp(), options=onnx_refit.BuildOptions(specialise=False)).save(tmp_path / "a.plan")
    two = onnx_refit.build(mlp(), options=onnx_refit.BuildOptions(specialise=False)).save(tmp_path / "b.plan")
    assert one.read_bytes() == two.read_bytes()


def test_a_stripped_plan_holds_no_weights(tmp_path: Path, saved: Path) -> None:
    path = onnx_refit.Plan.load(saved).save(tmp_path / "stripped.plan", strip=True)
    assert onnx_refit.Plan.load(path).weights is None
    names = SafetensorsSource(path).specs
    assert not [name for name in names if name.startswith("weights/")]


def test_a_plan_of_another_model_is_told_apart(saved: Path) -> None:
    plan = onnx_refit.Plan.load(saved)
    plan.require_model(model_fingerprint(mlp()))
    with pytest.raises(PlanMismatchError, match="another model"):
        plan.require_model(model_fingerprint(mlp(mlp_weights(1))))


def test_refit_plan_leaves_the_old_one_alone(tmp_path: Path, saved: Path) -> None:
    before = saved.read_bytes()
    new = onnx_refit.refit_plan(saved, mlp_weights(5)).save(tmp_path / "new.plan")
    assert saved.read_bytes() == before
    x = mlp_input()
    with onnx_refit.load(new) as engine:
        np.testing.assert_allclose(engine.run({"x": x})["y"], mlp_reference(mlp_weights(5), x), rtol=1e-4, atol=1e-4)


def test_weights_that_do_not_fit_are_refused(saved: Path) -> None:
    plan = onnx_refit.Plan.load(saved)
    with pytest.raises(PlanMismatchError, match="1 missing"):
        plan.with_weights({**mlp_weights(), "w1": np.zeros((2, 2), np.float32)})


# ---------------------------------------------------------------- damage


def rewritten(saved: Path, path: Path, **metadata: str) -> Path:
    """The plan with other metadata."""
    source = SafetensorsSource(saved)
    write_safetensors(path, source, {**source.metadata, **metadata})
    return path


def test_another_format_version_is_refused(tmp_path: Path, saved: Path) -> None:
    path = rewritten(saved, tmp_path / "future.plan", format_version="99")
    with pytest.raises(PlanFormatError, match="version 99 of the format"):
        onnx_refit.Plan.load(path)


def test_a_safetensors_file_that_is_no_plan_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    safetensors.numpy.save_file(mlp_weights(), path)
    with pytest.raises(PlanFormatError, match="not a plan"):
        onnx_refit.Plan.load(path)


def test_a_manifest_that_lies_is_refused(tmp_path: Path, saved: Path) -> None:
    manifest = json.loads(SafetensorsSource(saved).metadata["manifest"])
    for key in list(manifest):
        broken = {name: value for name, value in manifest.items() if name != key}
        text = json.dumps(broken)
        digest = hashlib.sha256(text.encode()).hexdigest()
        path = rewritten(saved, tmp_path / "broken.plan", manifest=text, manifest_sha256=digest)
        if key == "producer":
            onnx_refit.Plan.load(path)
            continue
        with pytest.raises(PlanFormatError):
            onnx_refit.Plan.load(path)


@pytest.mark.parametrize("content", [b"", b"x", b"not a plan at all, just text\n" * 100, b"\0" * 1000])
def test_something_else_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "else.plan"
    path.write_bytes(content)
    with pytest.raises(PlanFormatError):
        onnx_refit.Plan.load(path)


def test_tables_that_name_what_is_not_there_are_refused(tmp_path: Path, saved: Path) -> None:
    original = json.loads(SafetensorsSource(saved).metadata["manifest"])
    first = next(iter(original["passthrough"]))
    lies = ({"passthrough": {first: "nobody"}}, {"passthrough": {"nobody": "w1"}}, {"dependencies": {"x": ["w1"]}})
    for change in lies:
        text = json.dumps({**original, **change})
        digest = hashlib.sha256(text.encode()).hexdigest()
        path = rewritten(saved, tmp_path / "broken.plan", manifest=text, manifest_sha256=digest)
        with pytest.raises(PlanFormatError, match="name what is not there"):
            onnx_refit.Plan.load(path)


def test_a_plan_that_reads_other_files_is_refused(tmp_path: Path, saved: Path) -> None:
    plan = onnx_refit.Plan.load(saved)
    secret = tmp_path / "secret"
    secret.write_bytes(b"key!" * 64)
    tensor = plan.compiled.activation.graph.initializer.add()
    tensor.CopyFrom(onnx.numpy_helper.from_array(np.zeros(64, np.float32), "stolen"))
    onnx.external_data_helper.set_external_data(tensor, "secret")
    tensor.ClearField("raw_data")
    path = plan.save(tmp_path / "thief.plan")
    with pytest.raises(PlanFormatError, match="reads from other files"):
        onnx_refit.Plan.load(path)


def test_permissions_of_a_replaced_plan_stay(tmp_path: Path, saved: Path) -> None:
    path = onnx_refit.Plan.load(saved).save(tmp_path / "mlp.plan")
    path.chmod(0o600)
    onnx_refit.refit_plan(path, mlp_weights(1)).save(path)
    assert path.stat().st_mode & 0o777 == 0o600


def test_an_onnx_model_is_said_to_be_one(tmp_path: Path) -> None:
    onnx.save(mlp(), tmp_path / "model.onnx")
    with pytest.raises(PlanFormatError, match="ONNX model, not a plan"):
        onnx_refit.Plan.load(tmp_path / "model.onnx")


def test_no_such_file_and_a_directory_are_refused(tmp_path: Path) -> None:
    with pytest.raises(OnnxRefitError, match="no such file"):
        onnx_refit.Plan.load(tmp_path / "none.plan")
    with pytest.raises(OnnxRefitError, match="directory"):
        onnx_refit.Plan.load(tmp_path)


def test_a_plan_cut_short_is_refused(tmp_path: Path, saved: Path) -> None:
    data = saved.read_bytes()
    path = tmp_path / "cut.plan"
    for length in (*range(0, len(data), max(1, len(data) // 40)), len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(PlanFormatError):
            onnx_refit.Plan.load(path)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_flipped_byte_never_goes_unseen(tmp_path: Path, saved: Path, data: st.DataObject) -> None:
    original = saved.read_bytes()
    at = data.draw(st.integers(0, len(original) - 1))
    flip = data.draw(st.integers(1, 255))
    path = tmp_path / "flipped.plan"
    path.write_bytes(original[:at] + bytes([original[at] ^ flip]) + original[at + 1 :])
    header = 8 + int.from_bytes(original[:8], "little")
    try:
        loaded = onnx_refit.Plan.load(path)
    except PlanFormatError:
        return
    # Only the header may differ without being damage: white space between its entries, metadata that nobody reads.
    assert at < header
    assert loaded == replace(onnx_refit.Plan.load(saved), path=path, weights=loaded.weights)
    assert loaded.weights is not None
    for name, array in loaded.weights.items():
        np.testing.assert_array_equal(array, mlp_weights()[name])


# ---------------------------------------------------------------- places that cannot be written


@pytest.mark.parametrize(
    ("number", "message"),
    [(errno.ENOSPC, "the disk is full"), (errno.EDQUOT, "quota"), (errno.EIO, "cannot be written")],
)
@pytest.mark.parametrize("where", ["os.fsync", "tempfile.mkstemp", "pathlib.Path.replace"])
def test_a_failing_disk_leaves_the_old_plan(
    tmp_path: Path, saved: Path, monkeypatch: pytest.MonkeyPatch, where: str, number: int, message: str
) -> None:
    plan = onnx_refit.Plan.load(saved)
    target = tmp_path / "mlp.plan"
    plan.save(target)
    before = target.read_bytes()

    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(where, fail)
        with pytest.raises(WriteError, match=message):
            plan.save(target, strip=True)
    assert target.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["mlp.plan"]


def test_a_link_is_written_through_and_a_device_is_left_alone(tmp_path: Path, saved: Path) -> None:
    plan = onnx_refit.Plan.load(saved)
    (tmp_path / "folder").mkdir()
    link = tmp_path / "link.plan"
    link.symlink_to(tmp_path / "folder" / "real.plan")
    plan.save(link)
    assert link.is_symlink()
    assert onnx_refit.Plan.load(tmp_path / "folder" / "real.plan").fingerprint == plan.fingerprint
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        plan.save(pipe, strip=True)
        assert os.read(reader, 8) != b""
    finally:
        os.close(reader)
    assert pipe.is_fifo()


def test_a_directory_is_not_replaced(tmp_path: Path, saved: Path) -> None:
    with pytest.raises(WriteError, match="directory"):
        onnx_refit.Plan.load(saved).save(tmp_path)


def test_a_missing_directory_is_said(tmp_path: Path, saved: Path) -> None:
    with pytest.raises(WriteError, match="no such directory"):
        onnx_refit.Plan.load(saved).save(tmp_path / "none" / "mlp.plan")


def test_a_file_where_a_directory_should_be_is_said(saved: Path) -> None:
    with pytest.raises(WriteError, match="a file, not a directory"):
        onnx_refit.Plan.load(saved).save(saved / "mlp.plan")


# ---------------------------------------------------------------- fuzz


def test_mutated_plans_are_read_right_or_refused(tmp_path: Path, saved: Path) -> None:
    """A thousand by default; as many as ``ONNX_REFIT_FUZZ`` says. Nothing but our own errors, nothing wrong inside."""
    original = saved.read_bytes()
    header = 8 + int.from_bytes(original[:8], "little")
    path = tmp_path / "mutated.plan"
    splices = [b"\xff" * 8, b"\0" * 8, b"9" * 30, b"../../../etc/passwd", b"[[[[[[", b'{"', b"NaN", b'"shape":[-1]']
    rng = random.Random(0)
    read = 0
    count = int(os.environ.get("ONNX_REFIT_FUZZ", "1000"))
    for _ in range(count):
        data = bytearray(original)
        for _ in range(rng.randint(1, 4)):
            # Mostly the header: what it says decides how everything else is read.
            at = rng.randrange(header if rng.random() < 0.7 else len(data))
            match rng.randrange(4):
                case 0:
                    data[at] ^= 1 << rng.randrange(8)
                case 1:
                    piece = rng.choice(splices)
                    data[at : at + len(piece)] = piece
                case 2:
                    del data[at : at + rng.randint(1, 40)]
                case 3:
                    data[at:at] = data[rng.randrange(len(data)) :][: rng.randint(1, 40)]
        path.write_bytes(data)
        try:
            loaded = onnx_refit.Plan.load(path)
        except OnnxRefitError:
            continue
        read += 1
        assert loaded.weights is not None
        for name, array in loaded.weights.items():
            np.testing.assert_array_equal(array, mlp_weights()[name])
    assert read < count / 2  # most mutations do damage
