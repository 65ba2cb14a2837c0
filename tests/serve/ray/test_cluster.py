"""Replicas on several nodes under load, killed with -9 in every phase, and so is the coordinator."""

import asyncio
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("ray")

import onnx_refit
from onnx_refit.errors import CanaryError, InputError, PlanMismatchError, RefitRejectedError, VersionError
from onnx_refit.refit.check_report import CheckReport
from onnx_refit.serve.cluster.errors import ClusterError, OutcomeUnknownError
from onnx_refit.serve.cluster.roster import Patience
from tests.serve.cluster.support import golden
from tests.serve.models import affine, affine_weights
from tests.serve.ray import failpoints
from tests.serve.ray.conftest import add_worker, wait_until

pytestmark = [pytest.mark.ray, pytest.mark.slow]

X = {"x": np.ones((1, 4), np.float32)}
REPLICAS = 3


class Traffic:
    """Clients that ask all the time; what they were answered, and when they had asked."""

    def __init__(self, handle, clients=3):
        self._handle, self._stop = handle, threading.Event()
        self.answers, self.failures = [], []
        self._threads = [threading.Thread(target=self._ask, args=(n,), daemon=True) for n in range(clients)]
        for thread in self._threads:
            thread.start()

    def _ask(self, number):
        # One client minds the epochs that it has seen, the others do not.
        session = self._handle.session() if number == 0 else None
        while not self._stop.is_set():
            asked = time.monotonic()
            try:
                answer = (session or self._handle).infer(X, timeout=240)
            except Exception as error:  # noqa: BLE001 - whatever it is, it is a failure
                self.failures.append(repr(error))
                continue
            values = set((answer["y"] / 2).reshape(-1).tolist())
            self.answers.append((asked, number, values, answer.version, answer.epoch, answer.replica))

    def stop(self):
        self._stop.set()
        for thread in self._threads:
            thread.join(300)
        assert not any(thread.is_alive() for thread in self._threads), "a request neither succeeds nor fails"

    def count(self):
        return len(self.answers)

    def check(self, scales, published):
        """What must hold of all answers.

        Args:
            scales: version -> the scale of its weights.
            published: (when somebody was told, epoch): whoever asks later gets nothing older.
        """
        assert not self.failures
        latest = 0
        for asked, number, values, version, epoch, replica in self.answers:
            assert values == {scales[version]}, "an answer is of one version, and says of which"
            for told, floor in published:
                assert asked < told or epoch >= floor, f"{replica} answered with epoch {epoch} after {floor}"
            if number == 0:
                assert epoch >= latest
                latest = epoch


class Deployment:
    """The deployment that the tests share, and what is known of it."""

    def __init__(self, handle):
        self.handle = handle
        self.scales = {1: 1.0}
        self.published = []
        self.next_scale = 1.0

    def status(self):
        return self.handle.status()

    def replicas(self):
        """Name -> process id."""
        return {name: int(place["pid"]) for name, place in self.status()["replicas"].items()}

    def whole(self):
        wait_until(lambda: len(self.replicas()) == REPLICAS)
        # Serve has heard of them too: all of them answer.
        seen = set()

        def all_answer():
            seen.add(self.handle.infer(X).replica)
            return seen >= set(self.replicas())

        wait_until(all_answer)

    def refit(self, **options):
        self.next_scale += 1
        scale = self.next_scale
        report = self.handle.refit(affine_weights(scale), canary=golden(scale), **options)
        self.scales[report.version] = scale
        self.published.append((time.monotonic(), report.target.epoch))
        return report


@pytest.fixture(scope="module")
def deployment(ray_cluster, affine_plan, tmp_path_factory):
    from onnx_refit.serve.ray import ClusterSettings, deploy, remove

    handle = deploy(
        affine_plan,
        store=tmp_path_factory.mktemp("store"),
        name="affine",
        num_replicas=REPLICAS,
        settings=ClusterSettings("", on_phase=failpoints.fail, patience=Patience(120, 60, 60)),
        max_replicas_per_node=1,
        health_check_period_s=0.5,
        graceful_shutdown_timeout_s=5,
    )
    yield Deployment(handle)
    remove("affine")


@pytest.fixture
def under_load(deployment):
    """The deployment, whole, with clients that ask; afterwards all that must hold is looked at."""
    deployment.whole()
    deployment.published.clear()
    traffic = Traffic(deployment.handle)
    wait_until(lambda: traffic.count() > 10)
    yield deployment
    deployment.whole()
    seen = traffic.count()
    wait_until(lambda: traffic.count() > seen + 20)
    traffic.stop()
    assert failpoints.armed() == [], "what was to end did not come there"
    traffic.check(deployment.scales, deployment.published)
    wait_until(lambda: deployment.status()["settled"])
    status = deployment.status()
    answers = [deployment.handle.infer(X) for _ in range(30)]
    assert {(answer.version, answer.epoch) for answer in answers} == {(status["version"], status["epoch"])}


def test_replicas_are_on_several_nodes_and_change_together(under_load):
    assert len({place["node"] for place in under_load.status()["replicas"].values()}) == REPLICAS
    before = under_load.status()["version"]
    report = under_load.refit()
    assert len(report.replicas) == REPLICAS
    assert report.previous == before
    assert report.changed == ("b", "w")
    for _ in range(5):
        under_load.refit()
    back = under_load.handle.rollback()
    under_load.published.append((time.monotonic(), back.target.epoch))
    assert back.version == under_load.handle.version
    assert [version["number"] for version in under_load.handle.versions][-1] == back.version + 1


def test_what_is_refused_is_refused_by_all_and_says_why(under_load):
    handle = under_load.handle
    before = under_load.status()
    with pytest.raises(CanaryError, match="differs"):
        handle.refit(affine_weights(77.0), canary=golden(78))
    with pytest.raises(RefitRejectedError) as refused:
        handle.refit({"w": np.eye(3, dtype=np.float32)})
    report = refused.value.report
    assert isinstance(report, CheckReport)
    assert [missing.name for missing in report.missing] == ["b"]
    with pytest.raises(VersionError):
        handle.rollback(999)
    with pytest.raises(InputError, match="judge"):
        handle.refit(affine_weights(2.0), canary=onnx_refit.Canary(X, accept=bool))
    with pytest.raises(InputError):
        handle.infer({"x": np.ones((1, 5), np.float32)})
    with pytest.raises(VersionError):
        handle.infer(X, version=999)
    assert under_load.status()["epoch"] == before["epoch"]


def test_the_rest_of_a_handle(under_load):
    first, second, third = (under_load.refit() for _ in range(3))
    held = under_load.handle.infer(X, version=second.version)
    assert (float(held["y"][0, 0]) / 2, held.version) == (under_load.scales[second.version], second.version)
    assert list(under_load.handle.infer(X, ["y"])) == ["y"]

    async def several():
        asked = (under_load.handle.infer_async(X, fence=third.target.epoch) for _ in range(6))
        return await asyncio.gather(*asked)

    assert {answer.version for answer in asyncio.run(several())} == {third.version}
    under_load.handle.forget(second.version)
    with pytest.raises(VersionError):
        under_load.handle.infer(X, version=second.version)
    with pytest.raises(VersionError):
        under_load.handle.rollback(second.version)
    with pytest.raises(VersionError):
        under_load.handle.forget(third.version)
    under_load.handle.rollback(first.version)
    outcome = under_load.handle.outcome(third.transaction)
    assert outcome is not None
    assert outcome.version == third.version
    assert under_load.handle.outcome("never heard of") is None
    partial = {"b": np.full(4, 0, np.float32)}
    report = under_load.handle.refit(partial, partial=True)
    assert report.changed == ("b",)
    under_load.scales[report.version] = under_load.scales[first.version] / 2


# Who is killed, where, and whether what the client asked for is decided by then.
REPLICA_DEATHS = {
    "while staging": (("replica", "preparing"), False),
    "staged": (("replica", "prepared"), False),
    "all staged, before the decision": (("coordinator", "prepared"), True),
    "decided, before it publishes": (("coordinator", "decided"), True),
    "while publishing": (("replica", "publishing"), True),
    "published": (("replica", "published"), True),
}


@pytest.mark.parametrize("when", REPLICA_DEATHS)
def test_a_replica_is_killed(under_load, when):
    (role, phase), decided = REPLICA_DEATHS[when]
    victim = next(iter(under_load.replicas().values())) if role == "coordinator" else 0
    before = under_load.status()
    failpoints.arm(role, phase, victim)
    if decided:
        report = under_load.refit()
        assert len(report.lost) == 1
        assert len(report.replicas) == REPLICAS - 1
        assert under_load.status()["version"] == report.version
    else:
        with pytest.raises(ClusterError, match="nothing was published"):
            under_load.refit()
        assert under_load.status()["version"] == before["version"]
    # The one in its place joins at what was decided, which is looked at when the test is over.
    wait_until(lambda: not failpoints.armed())
    under_load.whole()
    assert set(under_load.replicas()) != set(before["replicas"])


def test_a_replica_is_killed_before(under_load):
    victim = next(iter(under_load.replicas().values()))
    os.kill(victim, signal.SIGKILL)
    try:
        report = under_load.refit()
        assert len(report.replicas) == REPLICAS - 1
    except ClusterError as error:
        # Ray had not heard of it yet.
        assert "nothing was published" in str(error)
    under_load.whole()
    under_load.refit()


def test_a_replica_is_killed_after(under_load):
    report = under_load.refit()
    before = under_load.replicas()
    os.kill(next(iter(before.values())), signal.SIGKILL)
    wait_until(lambda: set(under_load.replicas()) != set(before))
    under_load.whole()
    assert under_load.status()["version"] == report.version


COORDINATOR_DEATHS = {
    "checked": (("coordinator", "checked"), False),
    "while replicas stage": (("replica", "preparing"), False),
    "all staged": (("coordinator", "prepared"), False),
    "decided": (("coordinator", "decided"), True),
    "while replicas publish": (("replica", "publishing"), True),
    "all published": (("coordinator", "published"), True),
}


@pytest.mark.parametrize("when", COORDINATOR_DEATHS)
def test_the_coordinator_is_killed(under_load, when):
    (role, phase), decided = COORDINATOR_DEATHS[when]
    before = under_load.status()
    failpoints.arm(role, phase, int(before["coordinator"]["pid"]) if role == "replica" else 0)
    if decided:
        report = under_load.refit()
        assert report.version == under_load.status()["version"] == before["version"] + 1
    else:
        with pytest.raises(ClusterError, match="nothing was published"):
            under_load.refit()
        assert under_load.status()["version"] == before["version"]
    after = under_load.status()
    assert after["coordinator"]["pid"] != before["coordinator"]["pid"]
    assert set(after["replicas"]) == set(before["replicas"]), "replicas outlive it"
    under_load.refit()


def test_the_coordinator_is_killed_over_a_rollback(under_load):
    under_load.refit()
    before = under_load.status()
    failpoints.arm("coordinator", "decided")
    back = under_load.handle.rollback()
    under_load.published.append((time.monotonic(), back.target.epoch))
    assert back.version != before["version"]
    assert back.target.epoch > before["epoch"]


def test_both_are_killed(under_load):
    before = under_load.status()
    os.kill(int(before["coordinator"]["pid"]), signal.SIGKILL)
    os.kill(next(iter(under_load.replicas().values())), signal.SIGKILL)
    under_load.whole()
    under_load.refit()


def test_a_whole_node_is_lost(under_load, ray_cluster):
    before = under_load.status()
    # Not the one where the coordinator and the store are.
    lost = next(
        (name, place["node"])
        for name, place in before["replicas"].items()
        if place["node"] != before["coordinator"]["node"]
    )
    node = next(node for node in ray_cluster.worker_nodes if node.node_id == lost[1])
    ray_cluster.remove_node(node, allow_graceful=False)
    wait_until(lambda: lost[0] not in under_load.replicas())
    report = under_load.refit()
    assert lost[0] not in report.replicas
    add_worker(ray_cluster)
    under_load.whole()
    assert lost[1] not in {place["node"] for place in under_load.status()["replicas"].values()}


def test_a_replica_that_is_stopped_is_ended_and_replaced(under_load):
    """SIGSTOP: it neither answers nor ends, and could go on with the old version whenever it is let."""
    from onnx_refit.serve.ray.process import start_time

    before = under_load.replicas()
    victim = next(iter(before.values()))
    # The traffic's requests to it hang too: only Serve's health check, or its end, lets them go elsewhere.
    failpoints.arm("coordinator", "decided", -victim)
    report = under_load.refit()
    assert report.lost == (next(iter(before)),)
    # Its parent may not have taken note yet, so an ended process may still have its number.
    assert start_time(victim) is None


def test_replicas_come_and_go_with_the_wanted_number(ray_cluster, affine_plan, tmp_path):
    from ray import serve

    from onnx_refit.serve.ray import ClusterSettings, application, connect, remove

    settings = ClusterSettings("scaled")
    options = {"store": tmp_path / "store", "settings": settings, "health_check_period_s": 0.5}
    serve.run(application(affine_plan, **options, num_replicas=1), name="scaled", route_prefix=None)
    handle = connect("scaled")
    try:
        handle.refit(affine_weights(2.0))
        serve.run(application(affine_plan, **options, num_replicas=3), name="scaled", route_prefix=None)
        wait_until(lambda: len(handle.status()["replicas"]) == 3)
        handle.refit(affine_weights(3.0))
        serve.run(application(affine_plan, **options, num_replicas=1), name="scaled", route_prefix=None)
        wait_until(lambda: len(handle.status()["replicas"]) == 1)
        handle.refit(affine_weights(4.0))
        answers = [handle.infer(X) for _ in range(10)]
        assert {(float(answer["y"][0, 0]), answer.version) for answer in answers} == {(8.0, 4)}
        with pytest.raises(PlanMismatchError, match="another plan"):
            application(onnx_refit.build(affine(1.0, width=6)), **options)
    finally:
        remove("scaled")
    with onnx_refit.load(affine_plan, store=tmp_path / "store") as engine:
        assert engine.version == 4
        assert engine.run(X)["y"][0, 0] == 8.0


def test_the_coordinators_node_is_lost(ray_cluster, affine_plan, tmp_path):
    """With a store that several nodes reach, as all of these do, another one takes over."""
    from onnx_refit.serve.ray import deploy, remove

    handle = deploy(
        affine_plan,
        store=tmp_path / "store",
        name="shared",
        num_replicas=3,
        coordinator_options={"scheduling_strategy": "DEFAULT", "resources": {"worker": 0.01}},
        max_replicas_per_node=1,
        health_check_period_s=0.5,
    )
    try:
        first = handle.refit(affine_weights(2.0))
        place = handle.status()["coordinator"]["node"]
        node = next(node for node in ray_cluster.worker_nodes if node.node_id == place)
        ray_cluster.remove_node(node, allow_graceful=False)
        wait_until(lambda: handle.status()["coordinator"]["node"] != place)
        # A refit while the one that was there too is still listed stops, and says so.
        wait_until(lambda: place not in {replica["node"] for replica in handle.status()["replicas"].values()})
        assert handle.status()["version"] == first.version
        second = handle.refit(affine_weights(3.0))
        answers = [handle.infer(X) for _ in range(10)]
        assert {(float(a["y"][0, 0]), a.version) for a in answers} == {(6.0, second.version)}
    finally:
        remove("shared")
        add_worker(ray_cluster)


def test_another_coordinator_takes_over_from_one_that_is_gone_for_good(ray_cluster, affine_plan, tmp_path):
    import ray

    from onnx_refit.serve.ray import ClusterSettings, deploy, remove, start_coordinator
    from onnx_refit.serve.ray.settings import NAMESPACE, coordinator_name

    def there():
        try:
            return ray.get_actor(coordinator_name("again"), namespace=NAMESPACE)
        except ValueError:
            return None

    handle = deploy(affine_plan, store=tmp_path / "store", name="again", num_replicas=2)
    try:
        report = handle.refit(affine_weights(2.0))
        before = set(handle.status()["replicas"])
        ray.kill(ray.get_actor(coordinator_name("again"), namespace=NAMESPACE), no_restart=True)
        wait_until(lambda: not there())
        with pytest.raises(ClusterError, match="no coordinator"):
            handle.refit(affine_weights(3.0))
        with pytest.raises(ClusterError, match="no coordinator"):
            handle.status()
        assert handle.infer(X).version == report.version, "inference needs no coordinator"
        start_coordinator(affine_plan, store=tmp_path / "store", settings=ClusterSettings("again"))
        assert set(handle.status()["replicas"]) == before, "the same replicas go on"
        assert handle.refit(affine_weights(3.0)).version == report.version + 1
        assert {float(handle.infer(X)["y"][0, 0]) for _ in range(10)} == {6.0}
    finally:
        remove("again")


@pytest.mark.parametrize("phase", ["prepared", "decided"])
def test_a_coordinator_that_never_comes_back_leaves_it_to_the_next(ray_cluster, affine_plan, tmp_path, phase):
    from onnx_refit.serve.ray import ClusterSettings, deploy, remove

    name = f"last-{phase}"
    options = {"store": tmp_path / "store", "name": name, "num_replicas": 2, "health_check_period_s": 0.5}
    mortal = {"max_restarts": 0}
    settings = ClusterSettings("", on_phase=failpoints.fail)
    handle = deploy(affine_plan, **options, settings=settings, coordinator_options=mortal)
    try:
        failpoints.arm("coordinator", phase)
        with pytest.raises(OutcomeUnknownError) as unknown:
            handle.refit(affine_weights(2.0))
        handle = deploy(affine_plan, **options, settings=settings)
        outcome = handle.outcome(unknown.value.transaction)
        assert (outcome is not None) == (phase == "decided")
        expected = (4.0, 2) if phase == "decided" else (2.0, 1)
        answers = [handle.infer(X) for _ in range(10)]
        assert {(float(answer["y"][0, 0]), answer.version) for answer in answers} == {expected}
    finally:
        remove(name)


def test_weights_are_fetched_once_a_node_and_mapped_by_its_processes(ray_cluster):
    import ray

    from onnx_refit.serve.cluster.parcel import pack
    from onnx_refit.serve.ray.transport import ship

    weights = {"w": np.arange(2 << 20, dtype=np.float32)}
    shipment = ship(pack(weights))

    class Process:
        def look(self, shipment):
            from onnx_refit.serve.cluster.parcel import unpack
            from onnx_refit.serve.ray.transport import receive

            array = unpack(receive(shipment))["w"]
            address = array.__array_interface__["data"][0]
            with Path("/proc/self/maps").open() as maps:
                for line in maps:
                    span, permissions, offset, _, inode, *_ = line.split()
                    start, end = (int(part, 16) for part in span.split("-"))
                    if start <= address < end:
                        place = (inode, int(offset, 16) + address - start)
                        return os.getpid(), permissions[3], place, array.flags.writeable, float(array[-1])
            raise AssertionError("not mapped at all")

    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
    places: dict[str, set[tuple[str, int]]] = {}
    processes = set()
    for node in nodes:
        where = NodeAffinitySchedulingStrategy(node, soft=False)
        actors = [ray.remote(Process).options(scheduling_strategy=where).remote() for _ in range(2)]
        looks = ray.get([actor.look.remote(shipment) for actor in actors])
        for pid, shared, place, writeable, last in looks:
            assert (shared, writeable, last) == ("s", False, float((2 << 20) - 1))
            places.setdefault(node, set()).add(place)
            processes.add(pid)
    assert len(processes) == 2 * len(nodes)
    assert all(len(found) == 1 for found in places.values()), "two processes of a node map the same bytes"
    assert len({place[0] for found in places.values() for place in found}) == len(nodes), "each node has its own"
