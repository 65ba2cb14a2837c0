"""What can go wrong in training, under the library's one base class."""

from onnx_refit.errors import OnnxRefitError

__all__ = ["DataError", "DeviceError", "StateError", "TrainingError"]


class TrainingError(OnnxRefitError):
    """Training cannot start or go on."""


class DataError(TrainingError):
    """The data set, the word vectors or the prepared corpus are missing, damaged or do not fit."""


class DeviceError(TrainingError):
    """The device asked for is not there."""


class StateError(TrainingError):
    """A checkpoint of a run is missing, damaged or belongs to other settings."""
