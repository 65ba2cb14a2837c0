"""NVIDIA TensorRT and TensorRT-RTX behind one adapter.

What was run: parsing and ahead-of-time builds without REFIT, with the real TensorRT-RTX bindings, on a machine without
a GPU; and the whole adapter against a fake of the bindings' contract. What was **not run**: building with a REFIT
flag, refitting, and inference, which need a GPU that the bindings accept.
"""
