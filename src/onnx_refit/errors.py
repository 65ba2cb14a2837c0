"""Every error this library raises on purpose, in one hierarchy.

Each message says what was wrong; ``where`` says where (a file, a node, a tensor); ``hint`` says what to do about it.
``str(error)`` joins the three, so that a command line can print one line and stop.
"""

from __future__ import annotations


class OnnxRefitError(Exception):
    """Base of all errors of this library: catch it to catch them all.

    Args:
        message: what was wrong, a sentence without a final stop.
        where: the file, node or tensor it happened at.
        hint: what the reader can do about it.
    """

    def __init__(self, message: str, *, where: object = None, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.where = None if where is None else str(where)
        self.hint = hint

    def __str__(self) -> str:
        text = f"{self.where}: {self.message}" if self.where else self.message
        return f"{text}. {self.hint}" if self.hint else text


class MissingExtraError(OnnxRefitError):
    """An optional dependency is not installed.

    Args:
        package: the package that is missing.
        extra: the extra of this project that installs it.
        purpose: what it was needed for.
    """

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the package {package!r}, which is not installed",
            hint=f"Install it with: pip install 'onnx-refit[{extra}]'",
        )
        self.package = package
        self.extra = extra


class ModelError(OnnxRefitError):
    """The ONNX model cannot be read, is not valid, or cannot be prepared."""


class UnsupportedModelError(ModelError):
    """The model is valid ONNX but holds an operator or opset that the target engine cannot run."""


class PlanError(OnnxRefitError):
    """A plan file cannot be read, written or used."""


class PlanFormatError(PlanError):
    """The file is no plan, is damaged or cut short, or was written in another version of the format."""


class PlanMismatchError(PlanError):
    """The plan is sound but belongs to another model, engine or host."""


class WeightsError(OnnxRefitError):
    """A checkpoint cannot be read or its contents cannot be used."""


class WeightsFormatError(WeightsError):
    """The checkpoint file is damaged, of an unknown kind, or of a kind that would execute code when read."""


class RefitError(OnnxRefitError):
    """A refit stopped before commit; the engine keeps serving the weights it had."""


class RefitRejectedError(RefitError):
    """The check refused a checkpoint: tensors are missing, misshapen, lossy or not finite.

    Args:
        message: the first few problems.
        report: the whole ``onnx_refit.refit.check.CheckReport``.
        where: the checkpoint.
        hint: what the reader can do about it.
    """

    def __init__(self, message: str, *, report: object, where: object = None, hint: str | None = None) -> None:
        super().__init__(message, where=where, hint=hint)
        self.report = report


class CanaryError(RefitError):
    """The canary inference on the staged weights failed or did not give what was expected."""


class VersionError(RefitError):
    """A version was asked for that the engine or the store does not hold."""


class InputError(OnnxRefitError):
    """Inputs of an inference are missing, unknown, or of another dtype or shape than the engine takes."""


class EngineError(OnnxRefitError):
    """A backend failed while building, deriving weights or running."""


class StoreError(OnnxRefitError):
    """The version store on disk cannot be read or written."""


class StoreLockedError(StoreError):
    """Another process writes to this version store."""
