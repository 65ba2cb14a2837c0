"""Checkpoints in: sources, names, LoRA, deltas, the version store."""
