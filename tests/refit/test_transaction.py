"""Refit, versions, stage, commit and rollback on one engine."""

from __future__ import annotations

import contextlib
import gc
import threading
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import safetensors.numpy

import onnx_refit
from onnx_refit.errors import OnnxRefitError, RefitError, VersionError
from onnx_refit.tensors import Array
from tests.refit.transaction_support import X, answers
from tests.support.models import mlp, mlp_reference, mlp_weights


def fresh(weights: dict[str, Array]) -> Array:
    session = ort.InferenceSession(mlp(weights).SerializeToString(), providers=["CPUExecutionProvider"])
    result: Array = session.run(None, {"x": X})[0]
    return result


def test_a_refit_gives_what_a_fresh_session_gives(engine: onnx_refit.Engine) -> None:
    for seed in range(1, 6):
        new = mlp_weights(seed)
        report = engine.refit(new)
        assert report.version == engine.version == seed + 1
        assert set(report.changed) == set(new)
        np.testing.assert_allclose(engine.run({"x": X})["y"], fresh(new), rtol=1e-5, atol=1e-5)


def test_every_answer_names_its_version_and_held_versions_can_be_asked(engine: onnx_refit.Engine) -> None:
    first = engine.run({"x": X})
    engine.refit(mlp_weights(1))
    second = engine.run({"x": X})
    assert (first.version, second.version) == (1, 2)
    again = engine.run({"x": X}, version=1)
    assert again.version == 1
    np.testing.assert_array_equal(again["y"], first["y"])


def test_rollback_gives_the_same_bits_back(engine: onnx_refit.Engine) -> None:
    before = engine.run({"x": X})["y"]
    engine.refit(mlp_weights(1))
    report = engine.rollback()
    assert (report.version, report.previous) == (1, 2)
    np.testing.assert_array_equal(engine.run({"x": X})["y"], before)
    for name, array in mlp_weights(0).items():
        np.testing.assert_array_equal(engine.weights().read(name), array)


def test_rollback_without_an_earlier_version_is_refused(engine: onnx_refit.Engine) -> None:
    with pytest.raises(VersionError, match="no earlier version"):
        engine.rollback()


def test_versions_beyond_keep_are_forgotten_but_listed(engine: onnx_refit.Engine) -> None:
    for seed in range(1, 5):
        engine.refit(mlp_weights(seed))
    assert [(info.number, info.held, info.current) for info in engine.versions] == [
        (1, False, False),
        (2, False, False),
        (3, True, False),
        (4, True, False),
        (5, True, True),
    ]
    with pytest.raises(VersionError, match="no longer held"):
        engine.run({"x": X}, version=1)
    with pytest.raises(VersionError, match="does not exist"):
        engine.rollback(to=99)


def test_the_memory_of_versions_is_bounded(engine: onnx_refit.Engine) -> None:
    weights = [{"b1": mlp_weights(seed)["b1"]} for seed in range(2)]
    for turn in range(1200):
        engine.refit(weights[turn % 2], partial=True)
    assert engine.version == 1201
    assert len(engine.versions) < 1010
    assert engine.versions[-1].number == 1201
    with pytest.raises(VersionError, match="no longer held"):
        engine.run({"x": X}, version=1)


def test_a_partial_refit_changes_what_it_gives(engine: onnx_refit.Engine) -> None:
    new = mlp_weights(1)
    report = engine.refit({"b1": new["b1"]}, partial=True)
    assert report.changed == ("b1",)
    assert set(report.unchanged) == {"w1", "w2", "b2"}
    assert answers(engine, {**mlp_weights(0), "b1": new["b1"]})


def test_weights_given_but_equal_are_shared_not_written(engine: onnx_refit.Engine) -> None:
    new = {**mlp_weights(0), "w2": mlp_weights(1)["w2"]}
    report = engine.refit(new)
    assert report.changed == ("w2",)
    info = engine.versions[-1]
    assert info.shared_nbytes > 0
    assert answers(engine, new)


def test_one_changed_element_is_seen(engine: onnx_refit.Engine) -> None:
    new = mlp_weights(0)
    for index in (0, 501, new["w1"].size - 1):
        new["w1"].reshape(-1)[index] += 1.0
        assert engine.refit(new).changed == ("w1",)
        assert answers(engine, new)


def test_a_staged_set_is_seen_by_nobody_until_it_is_committed(engine: onnx_refit.Engine) -> None:
    staged = engine.stage(mlp_weights(1))
    assert engine.version == 1
    assert answers(engine, mlp_weights(0))
    np.testing.assert_allclose(staged.run({"x": X})["y"], mlp_reference(mlp_weights(1), X), rtol=1e-4, atol=1e-4)
    staged.commit()
    assert answers(engine, mlp_weights(1))


def test_a_discarded_set_cannot_be_used(engine: onnx_refit.Engine) -> None:
    staged = engine.stage(mlp_weights(1))
    staged.discard()
    for use in (staged.commit, lambda: staged.run({"x": X}), lambda: staged.canary({"x": X})):
        with pytest.raises(RefitError, match="discarded"):
            use()
    assert engine.version == 1


def test_a_set_is_committed_once(engine: onnx_refit.Engine) -> None:
    staged = engine.stage(mlp_weights(1))
    staged.commit()
    with pytest.raises(RefitError, match="committed"):
        staged.commit()
    assert engine.version == 2


def test_leaving_the_block_discards(engine: onnx_refit.Engine) -> None:
    with pytest.raises(ZeroDivisionError), engine.stage(mlp_weights(1)) as staged:
        raise ZeroDivisionError
    assert staged.state.value == "discarded"
    assert engine.version == 1


def test_a_partial_set_staged_on_an_old_version_is_refused(engine: onnx_refit.Engine) -> None:
    staged = engine.stage({"b1": mlp_weights(1)["b1"]}, partial=True)
    engine.refit(mlp_weights(2))
    with pytest.raises(RefitError, match="version 2 was committed since"):
        staged.commit()
    assert answers(engine, mlp_weights(2))


def test_a_complete_set_staged_on_an_old_version_is_taken(engine: onnx_refit.Engine) -> None:
    staged = engine.stage(mlp_weights(1))
    engine.refit(mlp_weights(2))
    staged.commit()
    assert answers(engine, mlp_weights(1))


def test_a_rollback_does_not_wait_for_a_refit_being_staged(
    engine: onnx_refit.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.refit(mlp_weights(1))
    begun, go_on = threading.Event(), threading.Event()
    derive = type(engine._backend).derive

    def slow(*arguments: object, **named: object) -> object:
        begun.set()
        assert go_on.wait(30)
        return derive(*arguments, **named)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(type(engine._backend), "derive", slow)
        thread = threading.Thread(target=lambda: engine.stage(mlp_weights(2)).discard())
        thread.start()
        assert begun.wait(30)
        assert engine.rollback().version == 1
        assert answers(engine, mlp_weights(0))
        go_on.set()
        thread.join()


def test_no_answer_is_torn_while_refits_commit(plan: onnx_refit.Plan) -> None:
    sets = {seed: mlp_weights(seed) for seed in range(4)}
    expected = {seed: mlp_reference(weights, X) for seed, weights in sets.items()}
    torn: list[Array] = []
    done = threading.Event()
    with onnx_refit.load(plan) as engine:
        counts = [0] * 4

        def ask(index: int) -> None:
            while not done.is_set() or counts[index] < 50:
                result = engine.run({"x": X})["y"]
                counts[index] += 1
                if not any(np.allclose(result, wanted, rtol=1e-3, atol=1e-3) for wanted in expected.values()):
                    torn.append(result)

        threads = [threading.Thread(target=ask, args=(index,)) for index in range(4)]
        for thread in threads:
            thread.start()
        for turn in range(200):
            engine.refit(sets[turn % 4])
        done.set()
        for thread in threads:
            thread.join()
        assert engine.version == 201
    assert not torn


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts open files as Linux shows them")
def test_no_file_is_left_open(engine: onnx_refit.Engine, tmp_path: Path) -> None:
    for seed in range(2):
        safetensors.numpy.save_file(mlp_weights(seed), tmp_path / f"{seed}.safetensors")
    bad = {**mlp_weights(3), "w1": np.zeros((2, 2), np.float32)}
    safetensors.numpy.save_file(bad, tmp_path / "bad.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "0.safetensors").read_bytes()[:-100])

    def left_open() -> list[str]:
        """Of these files: other threads of the process may open and close what they like."""
        found = []
        for entry in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                found.append(str(entry.readlink()))
        return [name for name in found if name.startswith(f"{tmp_path}/")]

    def cycle() -> None:
        engine.refit(tmp_path / "1.safetensors")
        engine.refit(tmp_path / "0.safetensors")
        for name in ("bad", "cut", "none"):
            with pytest.raises(OnnxRefitError):
                engine.refit(tmp_path / f"{name}.safetensors")

    cycle()
    gc.collect()
    assert not left_open()
    for _ in range(20):
        cycle()
    gc.collect()
    assert not left_open()
    assert answers(engine, mlp_weights(0))
