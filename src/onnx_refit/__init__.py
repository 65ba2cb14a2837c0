"""Compile an ONNX model once, then replace the weights of the compiled engine in place.

plan = onnx_refit.build("model.onnx")
plan.save("model.plan")
with onnx_refit.load("model.plan") as engine:
    outputs = engine.run({"x": x})
    report = engine.refit("epoch7.safetensors")
    engine.rollback()
"""

from onnx_refit._version import __version__

TYPE_CHECKING = False  # type checkers take it for true; importing typing would take longer than all else here
if TYPE_CHECKING:
    from onnx_refit.api import BuildOptions, EngineOptions, build, check, load, refit_plan
    from onnx_refit.compose import delta, lerp, lora
    from onnx_refit.errors import OnnxRefitError
    from onnx_refit.plan.plan import Plan
    from onnx_refit.refit.canary import Canary
    from onnx_refit.refit.check import Casting, CheckOptions, CheckReport
    from onnx_refit.refit.live import Engine, Outputs
    from onnx_refit.refit.report import RefitReport
    from onnx_refit.refit.transaction import Staged
else:
    # Loaded when first asked for: the command line needs none of it to print its help or to be interrupted.
    _HOMES = {
        "api": ("BuildOptions", "EngineOptions", "build", "check", "load", "refit_plan"),
        "compose": ("delta", "lerp", "lora"),
        "errors": ("OnnxRefitError",),
        "plan.plan": ("Plan",),
        "refit.canary": ("Canary",),
        "refit.check": ("Casting", "CheckOptions", "CheckReport"),
        "refit.live": ("Engine", "Outputs"),
        "refit.report": ("RefitReport",),
        "refit.transaction": ("Staged",),
    }

    def __getattr__(name: str):  # noqa: ANN202 - hidden from type checkers, who would take any name for good
        """What is public, from where it is defined; and the package's modules, as if they had been imported."""
        from importlib import import_module
        from importlib.util import find_spec

        for home, public in _HOMES.items():
            if name in public:
                found = getattr(import_module(f"onnx_refit.{home}"), name)
                globals()[name] = found
                return found
        if not name.startswith("_") and find_spec(f"onnx_refit.{name}") is not None:
            return import_module(f"onnx_refit.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


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
