"""Versions of weights on disk: content-addressed, journalled, whole after a crash at any moment."""

from onnx_refit.weights.store.records import VersionRecord
from onnx_refit.weights.store.store import Store, StoredVersion

__all__ = ["Store", "StoredVersion", "VersionRecord"]
