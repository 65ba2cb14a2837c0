"""Readers of checkpoints, one module a format; ``onnx_refit.weights.open`` chooses among them."""
