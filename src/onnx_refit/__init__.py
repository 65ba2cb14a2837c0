"""Compile an ONNX model once, then replace the weights of the compiled engine in place.

plan = onnx_refit.build("model.onnx")
plan.save("model.plan")
with onnx_refit.load("model.plan") as engine:
    outputs = engine.run({"x": x})
    report = engine.refit("epoch7.safetensors")
    engine.rollback()
"""

from onnx_refit._version import __version__
from onnx_refit.api import BuildOptions, EngineOptions, build, check, load, refit_plan
from onnx_refit.compose import delta, lerp, lora
from onnx_refit.errors import OnnxRefitError
from onnx_refit.plan.plan import Plan
from onnx_refit.refit.canary import Canary
from onnx_refit.refit.check import Casting, CheckOptions, CheckReport
from onnx_refit.refit.live import Engine, Outputs
from onnx_refit.refit.report import RefitReport
from onnx_refit.refit.transaction import Staged

__all__ = [
    "BuildOptions",
    "Canary",
    "Casting",
    "CheckOptions",
    "CheckReport",
    "Engine",
    "EngineOptions",
    "OnnxRefitError",
    "Outputs",
    "Plan",
    "RefitReport",
    "Staged",
    "__version__",
    "build",
    "check",
    "delta",
    "lerp",
    "load",
    "lora",
    "refit_plan",
]
