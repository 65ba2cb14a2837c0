"""A replica alone: commands again and out of order, fences, and what travels."""

import threading

import ml_dtypes
import numpy as np
import pytest

from onnx_refit.errors import (
    CanaryError,
    EngineError,
    InputError,
    RefitError,
    RefitRejectedError,
    StoreError,
    VersionError,
    WeightsError,
)
from onnx_refit.refit.check_report import CheckReport
from onnx_refit.serve.cluster.errors import ClusterError, Refusal, RefusalKind, StaleReplicaError
from onnx_refit.serve.cluster.messages import Discard, Forget, Prepare, Publish, Report, Target
from onnx_refit.serve.cluster.parcel import pack, unpack
from onnx_refit.serve.cluster.replica import Replica
from tests.serve.cluster.support import golden
from tests.serve.models import affine_weights

X = {"x": np.ones((1, 4), np.float32)}


@pytest.fixture
def replica(affine_plan):
    replica = Replica(affine_plan, Target(7, 20), pack(affine_weights(1.0)), "start")
    yield replica
    replica.close()


def prepare(scale, name="t", **options):
    return Prepare(name, 7, weights=pack(affine_weights(scale)), source="test", **options)


def scale_of(answer):
    return float(answer["y"][0, 0]) / 2


def test_numbers_are_the_coordinators(replica):
    assert (replica.infer(X).version, replica.infer(X).epoch) == (7, 20)
    reply = replica.carry_out(prepare(2.0))
    assert reply.refusal is None
    assert reply.state.prepared == "t"
    assert reply.changed == {"w", "b"}
    assert scale_of(replica.infer(X)) == 1.0
    assert replica.carry_out(Publish("t", Target(12, 31))).refusal is None
    answer = replica.infer(X)
    assert (scale_of(answer), answer.version, answer.epoch) == (2.0, 12, 31)
    assert scale_of(replica.infer(X, version=7)) == 1.0
    with pytest.raises(RefitError, match="coordinator only"):
        replica.engine.refit(affine_weights(3.0))
    assert replica.infer(X).version == 12


def test_commands_may_come_twice(replica):
    assert replica.carry_out(prepare(2.0)) == replica.carry_out(prepare(2.0))
    for _ in range(2):
        assert replica.carry_out(Publish("t", Target(8, 21))).refusal is None
        assert replica.state.target == Target(8, 21)
    for _ in range(2):
        assert replica.carry_out(Discard("t")).refusal is None
    assert replica.carry_out(Report()).state.target == Target(8, 21)


def test_a_later_transaction_takes_the_place_of_one_that_was_given_up(replica):
    replica.carry_out(prepare(2.0, "given up"))
    replica.carry_out(prepare(3.0, "next"))
    assert replica.carry_out(Publish("given up", Target(8, 21))).refusal.kind is RefusalKind.ABSENT
    assert replica.infer(X).version == 7
    replica.carry_out(Publish("next", Target(9, 22)))
    assert scale_of(replica.infer(X)) == 3.0


def test_what_cannot_be_prepared_is_refused_and_leaves_nothing(replica):
    wrong = Prepare("t", 7, weights=pack({"w": np.ones((2, 2), np.float32)}), source="test")
    for command, kind in (
        (wrong, RefusalKind.REJECTED),
        (prepare(2.0, canary=golden(3)), RefusalKind.CANARY),
        (prepare(2.0, partial=True), None),
        (Prepare("t", 7, 4), RefusalKind.ABSENT),
        (Prepare("t", 6, weights=pack({"b": np.ones(4, np.float32)}), partial=True), RefusalKind.CLUSTER),
        (Prepare("t", 7, weights={"w": ("float32", (4, 4), np.ones(3, np.uint8))}), RefusalKind.WEIGHTS),
        (Publish("t", Target(8, 21)), RefusalKind.ABSENT),
    ):
        reply = replica.carry_out(command)
        assert (None if reply.refusal is None else reply.refusal.kind) is kind
        replica.carry_out(Discard("t"))
        assert replica.state.prepared is None
        assert replica.state.target == Target(7, 20)


def test_versions_can_be_freed(replica):
    replica.carry_out(prepare(2.0))
    replica.carry_out(Publish("t", Target(8, 21)))
    assert replica.state.held == (7, 8)
    for version in (7, 8, 9):
        replica.carry_out(Forget(version))
    assert replica.state.held == (8,)


def test_a_fence_waits_for_the_second_phase(replica):
    replica.carry_out(prepare(2.0))
    answers = []
    waiting = threading.Thread(target=lambda: answers.append(replica.infer(X, fence=21)))
    waiting.start()
    waiting.join(0.05)
    assert waiting.is_alive()
    assert replica.infer(X, fence=20).version == 7
    replica.carry_out(Publish("t", Target(8, 21)))
    waiting.join(60)
    assert (answers[0].version, answers[0].epoch, scale_of(answers[0])) == (8, 21, 2.0)
    with pytest.raises(StaleReplicaError, match="epoch 22"):
        replica.infer(X, fence=22, patience=0.01)


def test_whoever_saw_the_new_version_never_gets_the_old_one(replica):
    """Answers that overlap a publication: an answer's epoch is never older than its version."""
    stop = threading.Event()
    wrong = []

    def ask():
        while not stop.is_set():
            answer = replica.infer(X)
            if answer.epoch < answer.version + 13 or scale_of(answer) != answer.version - 6:
                wrong.append((answer.version, answer.epoch, scale_of(answer)))

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for version in range(8, 60):
        replica.carry_out(prepare(version - 6.0, f"t{version}"))
        replica.carry_out(Publish(f"t{version}", Target(version, version + 13)))
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong


def test_parcels_carry_every_dtype():
    arrays = {
        "float32": np.arange(6, dtype=np.float32).reshape(2, 3),
        "bfloat16": np.array([1.5, -2], ml_dtypes.bfloat16),
        "float8": np.array([[1.5], [-2]], ml_dtypes.float8_e4m3fn),
        "int4": np.array([1, -8, 7], ml_dtypes.int4),
        "bool": np.array([True, False]),
        "scalar": np.array(3.25),
        "empty": np.zeros((0, 5), np.int64),
        "transposed": np.arange(6, dtype=np.float16).reshape(2, 3).T,
        "complex": np.array([1 + 2j], np.complex64),
    }
    opened = unpack(pack(arrays))
    assert opened.keys() == arrays.keys()
    for name, array in arrays.items():
        assert (opened[name].dtype, opened[name].shape) == (array.dtype, array.shape)
        assert opened[name].tobytes() == array.tobytes()
    assert np.shares_memory(opened["float32"], arrays["float32"])


@pytest.mark.parametrize(
    "error",
    [CanaryError, VersionError, RefitError, WeightsError, StoreError, InputError, EngineError, StaleReplicaError],
)
def test_errors_survive_the_way(error):
    again = Refusal.of(error("it is so", where="here", hint="Do this")).error("replica")
    assert type(again) is error
    assert str(again) == "replica, here: it is so. Do this"


def test_a_rejection_keeps_its_report():
    report = CheckReport("file", False, (), (), (), ())
    refusal = Refusal.of(RefitRejectedError("no", report=report))
    again = refusal.error()
    assert isinstance(again, RefitRejectedError)
    assert again.report is report
    assert type(Refusal(RefusalKind.ABSENT, "gone").error()) is ClusterError
