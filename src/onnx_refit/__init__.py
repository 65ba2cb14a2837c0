"""Compile an ONNX model once, then replace the weights of the compiled engine in place."""

from onnx_refit._version import __version__

__all__ = ["__version__"]
