"""Real architectures of the onnx package, without their weights: compiled, derived and run on PyTorch's CPU device."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

torch = pytest.importorskip("torch")
torch.set_num_threads(1)

from onnx_refit.engine.cuda.backend import CudaBackend  # noqa: E402
from onnx_refit.engine.cuda.options import CudaOptions  # noqa: E402
from onnx_refit.model.prepare import prepare  # noqa: E402
from onnx_refit.plan.compile import compile_model  # noqa: E402

from .models import random_like  # noqa: E402

pytestmark = [pytest.mark.torch, pytest.mark.slow]

LIGHT = Path(onnx.__file__).parent / "backend/test/data/light"


@pytest.mark.parametrize("name", sorted(path.stem for path in LIGHT.glob("*.onnx")))
def test_light_model(name: str) -> None:
    model = prepare(onnx.load(LIGHT / f"{name}.onnx"), for_engine="cuda").model
    compilation = compile_model(model)
    sources = {name: np.abs(a) + 0.1 for name, a in random_like(dict(compilation.weights), 1).items()}
    backend = CudaBackend(compilation.compiled, "cpu", CudaOptions(devices=("cpu",)))
    assert backend.choice.runner == "torch"
    rng = np.random.default_rng(0)
    feeds = {
        spec.name: rng.standard_normal(spec.static_shape).astype(np.float32) for spec in compilation.compiled.inputs
    }
    session = ort.InferenceSession(
        compilation.compiled.activation.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    held = backend.derive(sources)
    engine = {name: held.view(name).numpy() for name in held.places}
    got = backend.run(held, feeds)
    for output, expected in zip(session.get_outputs(), session.run(None, {**feeds, **engine}), strict=True):
        scale = float(np.abs(expected).max()) + 1e-30
        np.testing.assert_allclose(
            np.asarray(got[output.name], np.float64) / scale,
            np.asarray(expected, np.float64) / scale,
            rtol=1e-3,
            atol=1e-4,
        )
