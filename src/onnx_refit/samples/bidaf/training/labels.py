"""Soft labels: what trained networks believe about the training set, for another network to learn from.

One row a word of each example's paragraph (the rows that :attr:`.batches.Batch.label_place` names), two columns: the
probability that the answer starts, and that it ends, at this word.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from .batches import DeviceSplit, length_order
from .errors import DataError
from .files import write_tensors
from .model import Bidaf

__all__ = ["average_labels", "label", "save_labels", "soft_loss"]

_NAME = "probabilities"
_BATCH = 256


def label(model: Bidaf, split: DeviceSplit) -> Any:
    """Return the network's probabilities over a split, float16 [label rows, 2] on its device."""
    was_training = model.training
    model.eval()
    rows = torch.zeros(split.label_rows, 2, dtype=torch.float16, device=split.device)
    with torch.no_grad():
        for examples in length_order(split.context_length, _BATCH):
            batch = split.batch(examples)
            place = batch.padded_place[: batch.context_tokens]
            both = [logits.softmax(1).flatten().index_select(0, place) for logits in model(batch)]
            rows.index_copy_(0, batch.label_place, torch.stack(both, 1).half())
    model.train(was_training)
    return rows


def save_labels(path: Path, labels: Any) -> None:
    """Write labels to a safetensors file.

    Raises:
        WriteError: the file cannot be written.
    """
    write_tensors(path, {_NAME: labels.cpu().numpy()}, {"kind": "bidaf soft labels"})


def average_labels(paths: Sequence[Path], split: DeviceSplit) -> Any:
    """Read the labels of several networks and return their mean, float16 [label rows, 2] on the split's device.

    Raises:
        DataError: a file is missing, damaged or belongs to another corpus.
    """
    total = torch.zeros(split.label_rows, 2, device=split.device)
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                rows = file.get_tensor(_NAME)
        except (OSError, SafetensorError) as error:
            raise DataError(f"the soft labels cannot be read ({error})", where=path) from error
        if tuple(rows.shape) != tuple(total.shape):
            raise DataError(
                f"has soft labels for {len(rows)} words, the corpus has {len(total)}",
                where=path,
                hint="Labels belong to one corpus and one --limit.",
            )
        total += rows.to(split.device).float()
    return (total / len(paths)).half()


def soft_loss(logits: Any, wanted: Any, place: Any) -> Any:
    """Return the mean cross entropy of [B, T] logits against flat wanted probabilities, [c] at ``place``."""
    return -(logits.log_softmax(1).flatten().index_select(0, place) * wanted).sum() / len(logits)
