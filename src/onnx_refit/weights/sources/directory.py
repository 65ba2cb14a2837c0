"""Which file of a Hugging Face directory holds the weights."""

from __future__ import annotations

from pathlib import Path

from onnx_refit.errors import WeightsFormatError
from onnx_refit.weights.sources.mapped import unreadable

_IN_ORDER = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
    "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors",
    "model.onnx",
    "weights.npz",
)


def weights_file(directory: Path) -> Path:
    """The file of a model directory to open, in the order in which transformers looks.

    Raises:
        WeightsError: the directory cannot be listed.
        WeightsFormatError: it holds no checkpoint, several, or only an adapter.
    """
    try:
        names = sorted(p.name for p in directory.iterdir())
    except OSError as error:
        raise unreadable(directory, error) from error
    for name in _IN_ORDER:
        if name in names:
            return directory / name
    if "adapter_model.safetensors" in names:
        raise WeightsFormatError(
            "the directory holds a LoRA adapter, not a checkpoint",
            where=directory,
            hint="Give it as an adapter, together with the base weights",
        )
    for suffix in (".safetensors.index.json", ".safetensors", ".npz", ".onnx", ".pt", ".pth", ".bin"):
        found = [name for name in names if name.endswith(suffix)]
        if len(found) == 1:
            return directory / found[0]
        if found:
            raise WeightsFormatError(
                f"the directory holds {len(found)} files *{suffix} and no index: {', '.join(found[:4])}",
                where=directory,
                hint="Name the file that is meant",
            )
    raise WeightsFormatError("the directory holds no checkpoint", where=directory, hint="Name the file itself")
