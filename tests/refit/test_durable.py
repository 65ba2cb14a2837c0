"""Commits that survive: an engine with a version store, restarted, killed, refused, out of disk."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

import onnx_refit
from onnx_refit.errors import StoreError, StoreLockedError, VersionError, WeightsError
from onnx_refit.weights.store import Store
from tests.support.models import conv_bn, mlp, mlp_input, mlp_reference, mlp_weights

X = mlp_input()


@pytest.fixture(scope="module")
def plan_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return onnx_refit.build(mlp()).save(tmp_path_factory.mktemp("durable") / "mlp.plan")


def answers(engine: onnx_refit.Engine, seed: int) -> bool:
    return bool(np.allclose(engine.run({"x": X})["y"], mlp_reference(mlp_weights(seed), X), rtol=1e-4, atol=1e-4))


def test_the_committed_version_answers_after_a_restart(plan_path: Path, tmp_path: Path) -> None:
    with onnx_refit.load(plan_path, store=tmp_path / "store") as engine:
        assert engine.version == 1
        assert engine.refit(mlp_weights(1)).version == 2
        assert engine.refit({"b1": mlp_weights(2)["b1"]}, partial=True).version == 3
        before = engine.run({"x": X})["y"]
        fingerprint = engine.fingerprint()
    with onnx_refit.load(plan_path, store=tmp_path / "store") as engine:
        assert engine.version == 3
        np.testing.assert_array_equal(engine.run({"x": X})["y"], before)
        assert engine.fingerprint() == fingerprint
        assert [info.number for info in engine.versions] == [1, 2, 3]
        assert engine.refit(mlp_weights(4)).version == 4


def test_a_rollback_is_durable_too(plan_path: Path, tmp_path: Path) -> None:
    with onnx_refit.load(plan_path, store=tmp_path / "store") as engine:
        engine.refit(mlp_weights(1))
        engine.rollback()
    with onnx_refit.load(plan_path, store=tmp_path / "store") as engine:
        assert engine.version == 1
        assert answers(engine, 0)
        assert engine.refit(mlp_weights(2)).version == 3


def test_a_version_no_longer_held_comes_back_from_the_store(plan_path: Path, tmp_path: Path) -> None:
    with onnx_refit.load(plan_path, store=tmp_path / "store", keep=1) as engine:
        for seed in range(1, 5):
            engine.refit(mlp_weights(seed))
        with pytest.raises(VersionError):
            engine.run({"x": X}, version=2)
        np.testing.assert_array_equal(engine.weights(2).read("w1"), mlp_weights(1)["w1"])
        assert engine.rollback(to=2).version == 2
        assert answers(engine, 1)
        engine.forget(3)
        with pytest.raises(VersionError):
            engine.rollback(to=3)
        assert engine.rollback(to=4).version == 4
        assert answers(engine, 3)


def test_a_version_is_forgotten_though_its_bytes_cannot_be_freed_now(
    plan_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Store) -> int:
        raise StoreError("the disk refused")

    with onnx_refit.load(plan_path, store=tmp_path / "store", keep=4) as engine:
        for seed in (1, 2, 3):
            engine.refit(mlp_weights(seed))
        with monkeypatch.context() as patch:
            patch.setattr(Store, "gc", refuse)
            engine.forget(2)
        assert [info.number for info in engine.versions if info.held] == [1, 3, 4]
        with pytest.raises(VersionError):
            engine.run({"x": X}, version=2)
        before = sum(path.stat().st_size for path in (tmp_path / "store").rglob("*") if path.is_file())
        engine.forget(3)
        after = sum(path.stat().st_size for path in (tmp_path / "store").rglob("*") if path.is_file())
    one = sum(array.nbytes for array in mlp_weights(0).values())
    assert before - after > 1.5 * one, "the next one frees both"


def test_what_is_stored_is_what_was_staged(plan_path: Path, tmp_path: Path) -> None:
    given = mlp_weights(1)
    with onnx_refit.load(plan_path, store=tmp_path / "store") as engine:
        staged = engine.stage(given)
        for array in given.values():
            array[...] = 7
        staged.commit()
        assert answers(engine, 1)
    with onnx_refit.load(plan_path, store=tmp_path / "store") as engine:
        assert answers(engine, 1)


def test_a_second_engine_on_the_store_is_refused(plan_path: Path, tmp_path: Path) -> None:
    with (
        onnx_refit.load(plan_path, store=tmp_path / "store"),
        pytest.raises(StoreLockedError),
    ):
        onnx_refit.load(plan_path, store=tmp_path / "store")
    onnx_refit.load(plan_path, store=tmp_path / "store").close()


def test_a_store_of_another_plan_is_refused(plan_path: Path, tmp_path: Path) -> None:
    onnx_refit.load(plan_path, store=tmp_path / "store").close()
    other = onnx_refit.build(conv_bn())
    for _ in range(2):  # a refusal gives the lock back
        with pytest.raises(StoreError, match="another plan"):
            onnx_refit.load(other, store=tmp_path / "store")
    onnx_refit.load(plan_path, store=tmp_path / "store").close()


@pytest.mark.parametrize("method", ["commit", "rollback"])
def test_a_disk_that_refuses_leaves_the_engine_as_it_was(
    plan_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise StoreError("the disk is full", where=tmp_path)

    with onnx_refit.load(plan_path, store=tmp_path / "store") as engine:
        engine.refit(mlp_weights(1))
        with monkeypatch.context() as patch:
            patch.setattr(Store, method, refuse)
            with pytest.raises(StoreError, match="full"):
                engine.refit(mlp_weights(2)) if method == "commit" else engine.rollback()
        assert engine.version == 2
        assert answers(engine, 1)
        engine.refit(mlp_weights(3))
        assert answers(engine, 3)


_CHILD = """
import sys, numpy as np, onnx_refit
sys.path.insert(0, sys.argv[3])
from tests.support.models import mlp_weights
engine = onnx_refit.load(sys.argv[1], store=sys.argv[2])
turn = 0
while True:
    turn += 1
    report = engine.refit(mlp_weights(turn % 5))
    sys.stdout.write(f"{report.version} {turn % 5}\\n")
    sys.stdout.flush()
"""


def kill_and_restart(plan_path: Path, store: Path, commits: int) -> None:
    """Kill a process that commits in a loop once it has reported so many, and look at what a new one finds."""
    root = str(Path(__file__).parents[2])
    run = [sys.executable, "-c", _CHILD, str(plan_path), str(store), root]
    with subprocess.Popen(run, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        reported = [child.stdout.readline().split() for _ in range(commits)]
        os.kill(child.pid, signal.SIGKILL)
        reported += [line.split() for line in child.stdout.read().splitlines() if len(line.split()) == 2]
    version, seed = int(reported[-1][0]), int(reported[-1][1])
    with onnx_refit.load(plan_path, store=store) as engine:
        # The last reported commit, or the one after it: written, but not yet reported when the process was killed.
        assert engine.version in {version, version + 1}
        assert answers(engine, seed if engine.version == version else (seed + 1) % 5)


@pytest.mark.parametrize("commits", [1, 2, 7])
def test_kill_9_leaves_one_whole_version(plan_path: Path, tmp_path: Path, commits: int) -> None:
    for _ in range(2):
        kill_and_restart(plan_path, tmp_path / "store", commits)


# ---------------------------------------------------------------- damage


def flip(path: Path, at: int = -5) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


def packs(store: Path) -> list[Path]:
    return sorted((store / "packs").iterdir())


def test_damaged_weights_are_never_served(plan_path: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    with onnx_refit.load(plan_path, store=store, keep=1) as engine:
        engine.refit(mlp_weights(1))
        engine.refit(mlp_weights(2))
        flip(packs(store)[1])
        with pytest.raises(StoreError, match=r"tensor '[wb]\d' of version 2 is damaged"):
            engine.rollback(to=2)
        with pytest.raises(StoreError, match=r"tensor '[wb]\d' of version 2 is damaged"):
            engine.fingerprint(2)
        assert engine.version == 3
        assert answers(engine, 2)
        engine.forget(2)  # what is damaged can still be let go of
    flip(packs(store)[-1])
    for _ in range(2):  # a refusal gives the lock back
        with pytest.raises(StoreError, match=r"tensor '[wb]\d' of version 3 is damaged"):
            onnx_refit.load(plan_path, store=store)


@pytest.mark.parametrize("at", [2, 8, 12, 80, 100, 120, -5])
def test_a_pack_damaged_anywhere_is_an_error_of_the_store(plan_path: Path, tmp_path: Path, at: int) -> None:
    onnx_refit.load(plan_path, store=tmp_path / "store").close()
    flip(packs(tmp_path / "store")[0], at)
    with pytest.raises(StoreError, match="damaged"):
        onnx_refit.load(plan_path, store=tmp_path / "store")


def test_stored_weights_are_never_taken_for_a_checkpoint(tmp_path: Path) -> None:
    """Square weights under the same names as in the checkpoint, where they are transposed."""
    rng = np.random.default_rng(5)
    weights = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in (("w", (24, 24)), ("b", (24,)))}
    model = helper.make_model(
        helper.make_graph(
            [helper.make_node("MatMul", ["x", "w"], ["a"]), helper.make_node("Add", ["a", "b"], ["y"])],
            "square",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 24])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 24])],
            [numpy_helper.from_array(array, name) for name, array in weights.items()],
        ),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=9,
    )
    plan = onnx_refit.build(model, checkpoint={"w": np.ascontiguousarray(weights["w"].T), "b": weights["b"]})
    with onnx_refit.load(plan, store=tmp_path / "store") as engine:
        before = engine.run({"x": X})["y"]
    with onnx_refit.load(plan, store=tmp_path / "store") as engine:
        np.testing.assert_array_equal(engine.run({"x": X})["y"], before)


def test_rollback_after_a_restart_goes_to_the_version_before(plan_path: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    with onnx_refit.load(plan_path, store=store) as engine:
        with pytest.raises(VersionError, match="no earlier"):
            engine.rollback()
        for seed in (1, 2, 3):
            engine.refit(mlp_weights(seed))
        engine.rollback(to=2)  # in the order of the journal: 1, 3, 4, 2
    with onnx_refit.load(plan_path, store=store) as engine:
        assert engine.rollback().version == 4
        assert answers(engine, 3)
        assert engine.rollback().version == 2
        engine.forget(4)
    with onnx_refit.load(plan_path, store=store) as engine:
        assert engine.rollback().version == 3
        assert answers(engine, 2)


def test_an_empty_path_is_not_the_current_directory(plan_path: Path) -> None:
    with pytest.raises(StoreError, match="the path is empty"):
        onnx_refit.load(plan_path, store="")
    for given in (lambda: onnx_refit.load(plan_path, weights=""), lambda: onnx_refit.check(plan_path, "")):
        with pytest.raises(WeightsError, match="the path is empty"):
            given()


def test_a_refit_with_the_same_weights_repairs_a_damaged_store(plan_path: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    with onnx_refit.load(plan_path, store=store) as engine:
        engine.refit(mlp_weights(1))
        flip(packs(store)[1])
        engine.refit(mlp_weights(2))
        engine.refit(mlp_weights(1))  # the same tensors, of which the store has one damaged
    with onnx_refit.load(plan_path, store=store) as engine:
        assert answers(engine, 1)
    flip(packs(store)[-1])
    with pytest.raises(StoreError, match="damaged"):
        onnx_refit.load(plan_path, store=store)
    with Store.open(store) as opened:
        opened.rollback(3)
    with onnx_refit.load(plan_path, store=store) as engine:
        assert answers(engine, 2)
