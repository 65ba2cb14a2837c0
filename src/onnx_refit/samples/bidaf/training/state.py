"""The state of a run in one safetensors file: parameters, their average, optimiser, random numbers, and the log.

Everything else that a continuation needs (settings, step, seconds, log) is JSON in the file's metadata; nothing is
pickled. A resumed run on the same device goes on bit for bit as if it had not stopped.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from .errors import StateError
from .files import write_tensors

__all__ = ["FORMAT", "Progress", "read_state", "write_state"]

FORMAT = "onnx-refit bidaf run 1"


@dataclass(slots=True)
class Progress:
    """How far a run is.

    Attributes:
        step: optimiser steps done.
        seconds: time spent, over all pieces of the run.
        snapshots: how many snapshots were written.
        log: what ``log.json`` holds.
    """

    step: int = 0
    seconds: float = 0.0
    snapshots: int = 0
    log: dict[str, Any] = field(default_factory=lambda: {"train": [], "dev": [], "snapshots": [], "sessions": []})


def write_state(
    path: Path, model: Any, average: Mapping[str, Any], optimizer: Any, progress: Progress, settings: Mapping[str, Any]
) -> None:
    """Write the state of a run.

    Raises:
        WriteError: the file cannot be written.
    """
    tensors: dict[str, Any] = {f"model.{name}": value for name, value in model.named_parameters()}
    tensors |= {f"average.{name}": value for name, value in average.items()}
    for number, slots in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{number}.{name}": value for name, value in slots.items()}
    tensors["random.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    metadata = {
        "format": FORMAT,
        "settings": json.dumps(dict(settings)),
        "progress": json.dumps(
            {
                "step": progress.step,
                "seconds": progress.seconds,
                "snapshots": progress.snapshots,
                "log": progress.log,
            }
        ),
    }
    write_tensors(path, {name: value.detach().cpu().numpy() for name, value in tensors.items()}, metadata)


def read_state(
    path: Path, model: Any, average: Mapping[str, Any], optimizer: Any, settings: Mapping[str, Any]
) -> Progress:
    """Bring model, average, optimiser and random numbers back, and return how far the run was.

    Raises:
        StateError: the file is missing, damaged, or of a run with other settings.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except FileNotFoundError as error:
        raise StateError(
            "there is no checkpoint to resume from", where=path, hint="Start the run without --resume."
        ) from error
    except (OSError, SafetensorError) as error:
        raise StateError(
            f"the checkpoint is damaged ({error})",
            where=path,
            hint="Start again, from saved weights with --init if there are some.",
        ) from error
    if metadata.get("format") != FORMAT:
        raise StateError("is no checkpoint of a training run", where=path)
    _compare(json.loads(metadata["settings"]), settings, path)
    try:
        _restore(tensors, model, average, optimizer)
        return Progress(**json.loads(metadata["progress"]))
    except (KeyError, RuntimeError, ValueError, TypeError) as error:
        raise StateError(f"the checkpoint does not fit this network ({error})", where=path) from error


def _compare(saved: Mapping[str, Any], settings: Mapping[str, Any], path: Path) -> None:
    now = json.loads(json.dumps(dict(settings)))
    other = sorted(name for name in saved.keys() | now.keys() if saved.get(name) != now.get(name))
    if other:
        told = ", ".join(f"{name}: {saved.get(name)} then, {now.get(name)} now" for name in other)
        raise StateError(
            f"the run had other settings ({told})",
            where=path,
            hint="Resume with the settings that it was started with.",
        )


def _restore(tensors: Mapping[str, Any], model: Any, average: Mapping[str, Any], optimizer: Any) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[f"model.{name}"])
            average[name].copy_(tensors[f"average.{name}"])
    state: dict[int, dict[str, Any]] = {}
    for key, value in tensors.items():
        kind, _, rest = key.partition(".")
        if kind == "optimizer":
            number, _, slot = rest.partition(".")
            state.setdefault(int(number), {})[slot] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    torch.set_rng_state(tensors["random.cpu"])
    if torch.cuda.is_available() and "random.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["random.cuda"])
