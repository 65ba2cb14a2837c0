"""Prepare: graph rewrites, ONNX in and ONNX out."""
