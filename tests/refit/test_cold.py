"""What is moved to disk comes back bit for bit, and no failure of the disk loses anything that was in memory."""

from __future__ import annotations

import errno
import gc
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import onnx_refit
from onnx_refit import cold
from onnx_refit.cold import ColdBlock, ColdFile, NoDiskError
from onnx_refit.errors import WeightsError
from onnx_refit.refit import retain
from onnx_refit.refit.retain import Kept, Retainer
from onnx_refit.tensors import Array, TensorSpec, numpy_dtype
from tests.support.janitors import by_hand

SPECS = (TensorSpec("a", "float32", (300, 50)), TensorSpec("b", "bfloat16", (7,)), TensorSpec("c", "float64", ()))


def weights(value: float) -> dict[str, Array]:
    return {s.name: np.full(s.static_shape, value, numpy_dtype(s.dtype)) for s in SPECS}


def equal(kept: Kept, value: float) -> None:
    for name, array in weights(value).items():
        assert kept[name].dtype == array.dtype
        assert kept[name].tobytes() == array.tobytes()
        assert kept[name].shape == array.shape
        assert not kept[name].flags.writeable


def quiet(retainer: Retainer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retainer, "_deadline", 0.0)
    monkeypatch.setattr(retainer._expected, "until", 0.0)


@pytest.fixture
def retainer(monkeypatch: pytest.MonkeyPatch) -> Iterator[Retainer]:
    monkeypatch.setattr(retain, "_SPARE_SECONDS", 1e6)  # the tests say when it is quiet
    made = Retainer(SPECS)
    made._janitor = threading.Thread()  # never started: nobody but the test moves anything
    yield made
    made.close()


def test_odd_arrays_come_back_and_places_are_used_again(tmp_path: Path) -> None:
    file = ColdFile(str(tmp_path))
    assert list(tmp_path.iterdir()) == []  # unlinked
    given: dict[str, Array] = {
        "empty": np.zeros((0, 3), np.int64),
        "scalar": np.array(3, np.float16),
        "bf16": np.arange(9).astype(ml_dtypes.bfloat16).reshape(3, 3),
        "large": np.random.default_rng(0).standard_normal((3, 1 << 20)).astype(np.float32),
    }
    block = file.store(given)
    for name, array in given.items():
        assert block[name].tobytes() == array.tobytes()
        assert block[name].shape == array.shape
    size = os.fstat(file._file.fileno()).st_size
    for turn in range(20):
        del block
        gc.collect()
        block = file.store({"x": np.full(1 << 20, turn, np.float32)})
    np.testing.assert_array_equal(block["x"], np.full(1 << 20, 19, np.float32))
    assert os.fstat(file._file.fileno()).st_size <= size


def test_kept_weights_move_to_disk_only_in_quiet_times(retainer: Retainer, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = retainer.retain(weights(1.0), None)
    before = kept["a"]
    retainer.cool()
    assert kept["a"].ctypes.data == before.ctypes.data
    quiet(retainer, monkeypatch)
    retainer.cool()
    assert kept["a"].ctypes.data != before.ctypes.data
    equal(kept, 1.0)
    np.testing.assert_array_equal(before, weights(1.0)["a"])  # what was read before is still whole
    partial = retainer.retain({"b": weights(2.0)["b"]}, kept)
    quiet(retainer, monkeypatch)
    retainer.cool()
    np.testing.assert_array_equal(partial["b"], weights(2.0)["b"])
    np.testing.assert_array_equal(partial["a"], weights(1.0)["a"])
    equal(kept, 1.0)


def test_many_refits_leave_nothing_behind(retainer: Retainer, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = retainer.retain(weights(0.0), None)
    for turn in range(300):
        kept = retainer.retain(weights(float(turn)), None)
    assert len(retainer._warm) < 100
    quiet(retainer, monkeypatch)
    retainer.cool()
    equal(kept, 299.0)


def test_a_full_disk_keeps_them_in_memory_and_says_so(retainer: Retainer, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = retainer.retain(weights(1.0), None)
    quiet(retainer, monkeypatch)
    calls, write = 0, os.pwrite

    def full(descriptor: int, data: memoryview, place: int) -> int:
        nonlocal calls
        calls += 1
        if calls > 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, data[:1], place)  # short writes first

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        retainer.cool()
    assert "No space left" in str(retainer.warm_because)
    equal(kept, 1.0)
    retainer.cool()  # there is space again
    assert str(retainer.warm_because) == "None"
    equal(kept, 1.0)


def test_a_disk_that_lies_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = ColdFile(str(tmp_path))
    write = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda d, data, place: write(d, bytes(len(data)), place))
    with pytest.raises(NoDiskError, match="reads back otherwise"):
        file.store(weights(1.0))


@pytest.mark.parametrize("harm", ["cut", "flip"])
def test_damage_is_an_error_and_no_wrong_weight(tmp_path: Path, harm: str) -> None:
    file = ColdFile(str(tmp_path))
    block = file.store(weights(1.0))
    if harm == "cut":
        os.ftruncate(file._file.fileno(), 100)
    else:
        os.pwrite(file._file.fileno(), b"\xff", 77)
    with pytest.raises(WeightsError, match="cannot be read back from disk"):
        block["a"]


def test_a_folder_in_memory_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cold, "_file_system", lambda device: "tmpfs")
    with pytest.raises(NoDiskError, match="is memory itself"):
        ColdFile(str(tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no tmpfs at /dev/shm")
def test_a_real_tmpfs_is_seen() -> None:
    with pytest.raises(NoDiskError, match="is memory itself"):
        ColdFile("/dev/shm")


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(NoDiskError, match="no temporary file can be made"):
        ColdFile(str(tmp_path / "missing"))


def folded() -> onnx.ModelProto:
    """A convolution whose weights go into arithmetic: the engine cannot give them back."""
    rng = np.random.default_rng(0)
    shapes = {"w": (8, 3, 3, 3), "s": (8,), "b": (8,), "m": (8,), "v": (8,)}
    arrays = {name: rng.uniform(0.5, 1.5, shape).astype(np.float32) for name, shape in shapes.items()}
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], kernel_shape=[3, 3]),
        helper.make_node("BatchNormalization", ["c", "s", "b", "m", "v"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "folded",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def unattended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the test moves anything: a janitor that starts late would do so at the same time."""
    monkeypatch.setattr(retain, "_SPARE_SECONDS", 1e6)
    monkeypatch.setattr(retain, "_clean", lambda *_: None)


def settle(engine: onnx_refit.Engine) -> Retainer:
    retainer = engine._derivation._retainer
    retainer._deadline = 0.0
    retainer.cool()
    retainer.clear()
    return retainer


def test_an_engine_goes_on_as_if_nothing_had_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    unattended(monkeypatch)
    model = folded()
    plan = onnx_refit.build(model)
    x = np.random.default_rng(1).standard_normal((1, 3, 8, 8)).astype(np.float32)
    first = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    with onnx_refit.load(plan) as engine:
        assert engine._derivation._kept_names
        second = {name: array * np.float32(1.5) for name, array in first.items()}
        engine.refit(second)
        outputs = {number: engine.run({"x": x}, version=number)["y"] for number in (1, 2)}
        settle(engine)
        assert not [d for d in engine.decisions if "disk" in d.action]
        for number, given in ((1, first), (2, second)):
            for name, array in given.items():
                assert engine.weights(number).read(name).tobytes() == array.tobytes()
        third = {**second, "s": first["s"]}
        engine.refit({"s": first["s"]}, partial=True)  # needs the cold convolution
        np.testing.assert_array_equal(engine.weights().read("w"), second["w"])
        with onnx_refit.load(plan, weights=third) as fresh:
            np.testing.assert_array_equal(engine.run({"x": x})["y"], fresh.run({"x": x})["y"])
        settle(engine)
        engine.rollback()
        np.testing.assert_array_equal(engine.run({"x": x})["y"], outputs[2])
        weights_after = engine.weights()
    np.testing.assert_array_equal(weights_after.read("w"), second["w"])  # after close, too


def test_without_a_disk_the_engine_says_where_they_stay(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    unattended(monkeypatch)
    with onnx_refit.load(onnx_refit.build(folded())) as engine:
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
        settle(engine)
        (decision,) = [d for d in engine.decisions if "disk" in d.action]
        assert "no temporary file can be made" in decision.reason
        engine.weights().read("w")


def test_memory_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    unattended(monkeypatch)
    monkeypatch.setattr(cold, "ColdFile", None)
    plan = onnx_refit.build(folded())
    with onnx_refit.load(plan, options=onnx_refit.EngineOptions(cold="memory")) as engine:
        assert settle(engine)._cold is None
        assert not [d for d in engine.decisions if "disk" in d.action]


def test_the_janitor_moves_them_by_itself_and_ends_with_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retain, "_SPARE_SECONDS", 0.01)
    made = Retainer(SPECS)
    kept = made.retain(weights(1.0), None)
    deadline = time.monotonic() + 30
    while not isinstance(kept.chunks["a"]._arrays, ColdBlock) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert isinstance(kept.chunks["a"]._arrays, ColdBlock)
    equal(kept, 1.0)
    made.close()
    assert made._janitor is not None
    made._janitor.join(30)
    assert not made._janitor.is_alive()
    equal(kept, 1.0)


@pytest.fixture
def look(retainer: Retainer, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    monkeypatch.setattr(retain, "step_back", lambda: None)
    return by_hand(retainer, retain._clean, monkeypatch)


def test_a_refit_that_stalled_is_moved_once_it_is_done(
    retainer: Retainer, look: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The janitor came by after the refit had begun, and found nothing of it yet."""
    given = weights(1.0)
    keeping = retainer.keep(given, None)
    quiet(retainer, monkeypatch)
    look()
    assert not retainer._used.is_set(), "it waits for somebody to wake it"
    for name, target in keeping.targets.items():
        np.copyto(target, given[name])
    kept = keeping.finish()
    assert retainer._used.is_set(), "nobody woke it"
    assert retainer.seconds_left() > 0
    quiet(retainer, monkeypatch)
    look()
    assert isinstance(kept.chunks["a"]._arrays, ColdBlock)
    equal(kept, 1.0)


def test_a_refit_just_when_the_janitor_has_looked_is_not_missed(
    retainer: Retainer, look: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    retainer.retain(weights(1.0), None)
    quiet(retainer, monkeypatch)
    kept: list[Kept] = []
    real = retainer.seconds_left

    def seconds_left() -> float:
        left = real()
        if not kept:
            kept.append(retainer.retain(weights(2.0), None))  # between its look and what it does then
        return left

    monkeypatch.setattr(retainer, "seconds_left", seconds_left)
    look()
    assert not isinstance(kept[0].chunks["a"]._arrays, ColdBlock)
    assert retainer._used.is_set(), "it would not look again soon"
    look()
    assert retainer._used.is_set(), "there was time left: it has to look again"
    quiet(retainer, monkeypatch)
    look()
    assert isinstance(kept[0].chunks["a"]._arrays, ColdBlock)
    assert not retainer._used.is_set()


def test_refits_at_intervals_move_what_is_kept_and_leave_the_memory_for_the_next(
    retainer: Retainer, look: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retain, "_SPARE_SECONDS", 0.0)
    first = retainer.retain(weights(1.0), None)
    retainer._expected._last -= 20.0  # that was twenty seconds ago
    kept = retainer.retain(weights(2.0), None)
    look()
    for version, value in ((first, 1.0), (kept, 2.0)):
        assert isinstance(version.chunks["a"]._arrays, ColdBlock)
        equal(version, value)
    assert retainer._spare, "the next refit is expected"
    assert retainer._used.is_set(), "it has to look again"
    monkeypatch.setattr(retainer._expected, "until", 0.0)
    look()
    assert not retainer._spare
    assert not retainer._used.is_set()


def test_closing_just_when_the_janitor_has_looked_is_not_missed(
    retainer: Retainer, look: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    retainer.retain(weights(1.0), None)

    def seconds_left() -> float:
        retainer.close()
        return 0.0

    monkeypatch.setattr(retainer, "seconds_left", seconds_left)
    look()
    assert retainer.closed
    assert retainer._used.is_set(), "it would end a minute late"


def test_nothing_is_left_of_a_killed_process(tmp_path: Path) -> None:
    code = (
        "import numpy as np, os, signal\n"
        "from onnx_refit.cold import ColdFile\n"
        f"block = ColdFile({str(tmp_path)!r}).store({{'a': np.ones(1 << 20)}})\n"
        "assert block['a'].sum() == 1 << 20\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    assert list(tmp_path.iterdir()) == []
