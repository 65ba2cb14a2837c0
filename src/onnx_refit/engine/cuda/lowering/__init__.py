"""ONNX graphs as PyTorch calls: one function an operator, run node by node, so that a CUDA graph can record them.

Our own rather than ``onnx2fx``: weights must be arguments that live in an arena, what only decides shapes must stay on
the host (or every Reshape waits for the GPU), and a refit program is lowered by the same code.
"""
