"""The learning curve of a run as a picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from onnx_refit.errors import MissingExtraError
from onnx_refit.files import atomic_write

__all__ = ["draw_curve"]


def draw_curve(logs: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw loss and scores of runs that continue each other to a PNG file.

    Args:
        logs: what ``log.json`` holds, one a run, in order.
        path: the picture.

    Raises:
        MissingExtraError: matplotlib is not installed.
        WriteError: the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("matplotlib", "train", "Drawing the learning curve") from error
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    loss_axis = figure.subplots()
    score_axis = loss_axis.twinx()
    before = 0
    for number, log in enumerate(logs):
        first = number == 0
        if log["train"]:
            steps, losses = zip(*((before + entry[0], entry[1]) for entry in log["train"]), strict=True)
            loss_axis.plot(steps, losses, color="0.6", linewidth=0.8, label="training loss" if first else None)
        scores = sorted([*log["dev"], *log["snapshots"], *([log["final"]] if "final" in log else [])], key=_step)
        places = [before + entry["step"] for entry in scores]
        for key, name, colour in (("exact_match", "dev exact match", "C0"), ("f1", "dev F1", "C1")):
            values = [entry[key] for entry in scores]
            score_axis.plot(places, values, ".-", color=colour, markersize=4, label=name if first else None)
        if not first:
            loss_axis.axvline(before, color="0.85", linestyle="--")
        before += max((_step(entry) for entry in scores), default=0)
    loss_axis.set(xlabel="optimiser steps", ylabel="training loss (start + end)")
    score_axis.set(ylabel="SQuAD v1.1 dev, percent", ylim=(0, 100))
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=120)


def _step(entry: dict[str, Any]) -> int:
    return int(entry["step"])
