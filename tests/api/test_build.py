"""Building: from files, modules and checkpoints; the names that refits take afterwards."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

import onnx_refit
from onnx_refit.errors import ModelError, WeightsError
from tests.support.models import mlp, mlp_input, mlp_reference, mlp_weights


def test_refits_take_the_names_of_the_checkpoint(tmp_path: object) -> None:
    def named(seed: int) -> dict[str, np.ndarray]:
        weights = mlp_weights(seed)
        return {
            "net.0.weight": np.ascontiguousarray(weights["w1"].T),
            "net.0.bias": weights["b1"],
            "net.2.weight": np.ascontiguousarray(weights["w2"].T),
            "net.2.bias": weights["b2"],
        }

    path = f"{tmp_path}/mlp.onnx"
    onnx.save(mlp(), path)
    plan = onnx_refit.build(path, checkpoint=named(0))
    plan = onnx_refit.Plan.load(plan.save(f"{tmp_path}/mlp.plan"))
    x = mlp_input()
    with onnx_refit.load(plan) as engine:
        engine.refit(named(3))
        np.testing.assert_allclose(engine.run({"x": x})["y"], mlp_reference(mlp_weights(3), x), rtol=1e-4, atol=1e-4)
        engine.refit(mlp_weights(4))  # the model's own names are taken too
        np.testing.assert_allclose(engine.run({"x": x})["y"], mlp_reference(mlp_weights(4), x), rtol=1e-4, atol=1e-4)


def test_a_checkpoint_of_another_run_is_refused() -> None:
    with pytest.raises(WeightsError, match="none of the 4 weights"):
        onnx_refit.build(mlp(), checkpoint=mlp_weights(9))


def test_weights_that_the_checkpoint_lacks_are_named() -> None:
    checkpoint = {name: array for name, array in mlp_weights().items() if name != "b2"}
    plan = onnx_refit.build(mlp(), checkpoint=checkpoint)
    assert plan.names is not None
    assert plan.names.unmatched == ("b2",)
    assert any(d.subject == "b2" and d.verdict.value == "rejected" for d in plan.compiled.decisions)


def test_contradictory_options_are_refused() -> None:
    with pytest.raises(ModelError, match="both refittable and constant: w1"):
        onnx_refit.BuildOptions(refittable=("w1",), constant=("w1",))
    with pytest.raises(ModelError, match="one string"):
        onnx_refit.BuildOptions(constant="w1")  # type: ignore[arg-type]


def test_an_output_without_a_shape_is_no_obstacle() -> None:
    model = mlp()
    model.graph.output[0].type.tensor_type.ClearField("shape")
    x = mlp_input()
    with onnx_refit.load(onnx_refit.build(model)) as engine:
        np.testing.assert_allclose(engine.run({"x": x})["y"], mlp_reference(mlp_weights(), x), rtol=1e-4, atol=1e-4)


def test_something_that_is_no_model_is_refused() -> None:
    with pytest.raises(ModelError, match="no path and no ONNX model"):
        onnx_refit.build(42)


@pytest.mark.torch
def test_a_module_is_exported_and_refitted_with_its_state_dict() -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("onnxscript")
    nn = torch.nn
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 32), nn.LayerNorm(32), nn.GELU(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 4))
    x = torch.randn(3, 12)
    plan = onnx_refit.build(net, (x,))
    name = plan.inputs[0].name
    with onnx_refit.load(plan) as engine:
        for _ in range(3):
            with torch.no_grad():
                for parameter in net.parameters():
                    parameter.add_(torch.randn_like(parameter) * 0.1)
                wanted = net(x).numpy()
            engine.refit(net.state_dict())
            got = next(iter(engine.run({name: x.numpy()}).values()))
            np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)
