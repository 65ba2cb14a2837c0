"""Verify the engine "tensorrt" on your GPU in one command, and print a report to send back.

    pip install 'onnx-refit[tensorrt]'        (or have NVIDIA's full TensorRT installed)
    python samples/bidaf/verify_tensorrt.py --json report.json

Nobody has run this engine on a GPU yet: its authors had none that the bindings accept. Every step says ``ok``,
``failed`` or ``skipped``; a report with failures is as welcome as one without.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

import onnx_refit
from onnx_refit import api
from onnx_refit.engine.registry import EngineOptions
from onnx_refit.engine.tensorrt.backend import create
from onnx_refit.engine.tensorrt.bindings import find_bindings
from onnx_refit.engine.tensorrt.device import DeviceBuffer, DeviceTensor, open_device
from onnx_refit.engine.tensorrt.options import TensorRtOptions
from onnx_refit.engine.tensorrt.profiles import Range
from onnx_refit.engine.tensorrt.support import check_support
from onnx_refit.model.vocabulary import apply_maps
from onnx_refit.plan.plan import Plan
from onnx_refit.refit.live import Engine
from onnx_refit.samples.bidaf.answering import answer
from onnx_refit.samples.bidaf.convert import REFITTED
from onnx_refit.samples.bidaf.prepare import ANSWER, CONTEXT, QUESTION
from onnx_refit.samples.bidaf.vocabulary import Passage, feeds
from onnx_refit.tensors import Array, spec_of

# The published model calls context and question length c and q.
RANGES = {"c": Range(1, 50, 400), "q": Range(1, 12, 40)}
TOLERANCE = 1e-3


def original_model() -> onnx.ModelProto:
    """The model to verify with: the one that comes with the library."""
    from onnx_refit.samples.bidaf.bundle import bundled_model

    return bundled_model()


@dataclass
class Step:
    """One step of the verification."""

    name: str
    verdict: str
    seconds: float
    detail: str


class Skip(Exception):  # noqa: N818 - not an error
    """A step that cannot be done here."""


class Verification:
    """Runs the steps in order; one that fails does not stop those that do not need it."""

    def __init__(self, options: TensorRtOptions, trained: bool) -> None:
        self.options = options
        self.trained = trained
        self.steps: list[Step] = []
        self.facts: dict[str, Any] = {
            "onnx-refit": onnx_refit.__version__,
            "python": platform.python_version(),
            "platform": platform.platform(),
        }
        self.model = original_model()
        self.inputs = feeds(Passage.of(CONTEXT), Passage.of(QUESTION, what="question"))
        self.reference: Engine | None = None
        self.plan: Plan | None = None
        self.folder = tempfile.TemporaryDirectory()
        self.engine: Engine | None = None

    # ------------------------------------------------------------------ the steps

    def find(self) -> str:
        """Bindings and GPU."""
        bindings = find_bindings(self.options.package)
        device = open_device()
        self.facts |= {"tensorrt": bindings.label, "gpu": device.name, "capability": device.compute_capability}
        return f"{bindings.label} on {device.name}, compute capability {device.compute_capability}"

    def parse(self) -> str:
        """The parser takes the prepared model."""
        support = check_support(find_bindings(self.options.package), self.model)
        if not support.acceptable:
            raise AssertionError(f"refused: {support.after.refused} {support.after.problems} {support.blockers}")
        return f"{len(support.before.refused)} nodes were refused before preparation, none after"

    def build(self) -> str:
        """A refittable plan, saved and loaded again."""
        self.reference = api.load(api.build(self.model))
        options = api.BuildOptions(engine=EngineOptions(tensorrt=self.options))
        plan = api.build(self.model, engine="tensorrt", options=options)
        path = Path(self.folder.name) / "bidaf.plan"
        plan.save(path)
        size = path.stat().st_size
        self.plan = Plan.load(path)
        self.engine = api.load(self.plan, options=options.engine, keep=4)
        reused = [d for d in self.engine.decisions if d.subject == "TensorRT plan"]
        if not reused or reused[0].verdict.value != "accepted":
            raise AssertionError(f"the plan was built again instead of being used: {reused}")
        return f"plan file {size} bytes, TensorRT's part {len(plan.artefacts['tensorrt'])} bytes"

    def same_outputs(self) -> str:
        """The same outputs as ONNX Runtime."""
        return f"largest difference {self._compare():.1e}"

    def refit_sample(self) -> str:
        """NVIDIA's own sample: two tensors set to ones, then to the right values."""
        engine, reference = self._engines()
        right = {name: reference.weights().read(name) for name in REFITTED}
        fake = engine.refit({name: np.ones_like(right[name]) for name in REFITTED}, partial=True)
        wrong = answer(engine, CONTEXT, QUESTION).text
        reference.refit({name: np.ones_like(right[name]) for name in REFITTED}, partial=True)
        difference = self._compare()
        engine.refit(right, partial=True)
        reference.refit(right, partial=True)
        difference = max(difference, self._compare())
        found = answer(engine, CONTEXT, QUESTION).text
        if self.trained and (found.lower() != ANSWER or wrong.lower() == ANSWER):
            raise AssertionError(f"answered {wrong!r} with the fake weights and {found!r} with the right ones")
        return f"{wrong!r}, then {found!r}; largest difference {difference:.1e}; refit {fake.seconds['derive']:.4f} s"

    def refit_everything(self) -> str:
        """All weights replaced, compared with ONNX Runtime, and rolled back."""
        engine, reference = self._engines()
        before = engine.run(self.inputs)
        changed = {name: self._other(name, reference) for name in engine.refittable}
        report = engine.refit(changed)
        reference.refit(changed)
        difference = self._compare()
        engine.rollback()
        reference.rollback()
        after = engine.run(self.inputs)
        for name, array in before.items():
            if not np.array_equal(array, after[name]):
                raise AssertionError(f"the rollback did not give {name} back bit for bit")
        return f"largest difference {difference:.1e}; derive {report.seconds['derive']:.4f} s; rollback exact"

    def older_versions(self) -> str:
        """Versions that lie in no device engine any more are put back when asked for."""
        engine, reference = self._engines()
        first = engine.version
        wanted = engine.run(self.inputs)
        for _ in range(self.options.twins):
            name = REFITTED[0]
            engine.refit({name: self._other(name, reference)}, partial=True)
        got = engine.run(self.inputs, version=first)
        engine.rollback(first)
        for name, array in wanted.items():
            if not np.allclose(got[name], array, atol=TOLERANCE):
                raise AssertionError(f"version {first} answered otherwise after it had been put back")
        return f"version {first} answered as before after {self.options.twins} refits"

    def device_weights(self) -> str:
        """Weights that lie on the GPU already."""
        plan, (_, reference) = self._plan(), self._engines()
        device = open_device()
        device.make_current()
        source = reference.weights()
        stream = device.create_stream()
        tensors: dict[str, Array | DeviceTensor] = {}
        for name in plan.refittable:
            array = np.ascontiguousarray(source.read(name))
            buffer = DeviceBuffer(device, array.nbytes)
            device.copy_in(buffer.address, array, stream)
            tensors[name] = DeviceTensor(spec_of(name, array), buffer.address, buffer)
        device.synchronize(stream)
        backend = create(plan.compiled, None, self.options, plan.artefacts["tensorrt"])
        started = time.perf_counter()
        weights = backend.derive(tensors)
        seconds = time.perf_counter() - started
        host = backend.derive({name: source.read(name) for name in plan.refittable})
        numbers = self._numbers(self.inputs)
        one, other = backend.run(weights, numbers), backend.run(host, numbers)
        backend.close()
        for name, array in one.items():
            if not np.array_equal(array, other[name]):
                raise AssertionError(f"{name} differs between weights from the device and from the host")
        on_device = sum(stored.on_device for stored in weights.weights.values())
        return f"{on_device} of {len(weights.weights)} weights stayed on the GPU; derive {seconds:.4f} s"

    def under_load(self) -> str:
        """Refits while requests run: every answer belongs wholly to one version, and none fails."""
        engine, reference = self._engines()
        name = REFITTED[0]
        variants = [reference.weights().read(name), self._other(name, reference)]
        known = []
        for variant in variants:
            engine.refit({name: variant}, partial=True)
            known.append(engine.run(self.inputs))
        stop, wrong, latencies = threading.Event(), list[str](), list[float]()

        def ask() -> None:
            while not stop.is_set():
                started = time.perf_counter()
                try:
                    got = engine.run(self.inputs)
                except Exception as error:  # noqa: BLE001 - reported below
                    wrong.append(repr(error))
                    return
                latencies.append(time.perf_counter() - started)
                if not any(all(np.array_equal(got[key], one[key]) for key in one) for one in known):
                    wrong.append("an answer belongs to neither version")

        threads = [threading.Thread(target=ask) for _ in range(2)]
        for thread in threads:
            thread.start()
        for index in range(10):
            engine.refit({name: variants[index % 2]}, partial=True)
        stop.set()
        for thread in threads:
            thread.join()
        if wrong:
            raise AssertionError(f"{len(wrong)} of {len(latencies)} requests went wrong: {wrong[0]}")
        return f"{len(latencies)} requests during 10 refits, median {statistics.median(latencies) * 1e3:.2f} ms"

    # ------------------------------------------------------------------ helpers

    def step(self, work: Callable[[], str]) -> None:
        """Run one step and note how it went."""
        started = time.perf_counter()
        name = work.__name__.replace("_", " ")
        try:
            verdict, detail = "ok", work()
        except Skip as reason:
            verdict, detail = "skipped", str(reason)
        except Exception as error:  # noqa: BLE001 - the report is the point of this script
            verdict, detail = "failed", f"{type(error).__name__}: {error}"
            self.facts[f"traceback of {name}"] = traceback.format_exc()
        self.steps.append(Step(name, verdict, time.perf_counter() - started, detail))
        print(f"{verdict:8} {name:18} {self.steps[-1].seconds:8.2f} s  {detail}", flush=True)

    def run(self) -> bool:
        """All steps; whether none failed and none was skipped."""
        for work in (
            self.find,
            self.parse,
            self.build,
            self.same_outputs,
            self.refit_sample,
            self.refit_everything,
            self.older_versions,
            self.device_weights,
            self.under_load,
        ):
            self.step(work)
        return all(step.verdict == "ok" for step in self.steps)

    def _plan(self) -> Plan:
        if self.plan is None:
            raise Skip("there is no plan")
        return self.plan

    def _engines(self) -> tuple[Engine, Engine]:
        if self.engine is None or self.reference is None:
            raise Skip("there is no engine")
        return self.engine, self.reference

    def _compare(self) -> float:
        engine, reference = self._engines()
        worst = 0.0
        got, wanted = engine.run(self.inputs), reference.run(self.inputs)
        for name, array in wanted.items():
            difference = np.abs(np.asarray(got[name], np.float64) - np.asarray(array, np.float64)).max()
            worst = max(worst, float(difference))
        if not worst <= TOLERANCE:
            raise AssertionError(f"outputs differ from ONNX Runtime's by {worst:.1e}")
        return worst

    def _other(self, name: str, reference: Engine) -> Array:
        array = reference.weights().read(name)
        halved: Array = (array * np.asarray(0.5, array.dtype)).astype(array.dtype)
        return halved

    def _numbers(self, inputs: Mapping[str, object]) -> dict[str, Array]:
        return apply_maps(self._plan().preprocessors, {name: np.asarray(value) for name, value in inputs.items()})


def main(arguments: list[str] | None = None, *, trained: bool = True) -> int:
    """Exit code 0 if every step went well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the report to this file")
    parser.add_argument("--package", help="the module to use (tensorrt, tensorrt_rtx, tensorrt_rtx_bindings)")
    parser.add_argument("--tf32", action="store_true", help="allow TF32 (the outputs then differ more)")
    chosen = parser.parse_args(arguments)
    options = TensorRtOptions(package=chosen.package, dimensions=RANGES, tf32=chosen.tf32)
    verification = Verification(options, trained)
    well = verification.run()
    report = {"facts": verification.facts, "steps": [asdict(step) for step in verification.steps]}
    if chosen.json is not None:
        chosen.json.write_text(json.dumps(report, indent=2, default=str))
    for fact, value in verification.facts.items():
        if not fact.startswith("traceback"):
            print(f"{fact}: {value}")
    print("everything went well" if well else "not everything went well: please send the report")
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
