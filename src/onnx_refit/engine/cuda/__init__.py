"""The engine on one or more NVIDIA GPUs, through PyTorch and CUDA graphs.

Everything here also runs on ``device="cpu"``, which is how it is tested; on a GPU it was **not run** yet.
"""
