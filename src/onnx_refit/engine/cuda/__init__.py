"""The engine on one or more NVIDIA GPUs, through PyTorch, CUDA graphs and kernels of our own.

Everything but the kernels also runs on ``device="cpu"``, which is how it is tested without a GPU.
"""
