"""Weight files as inputs of training: read, and averaged over runs that began with the same weights."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from .errors import StateError
from .model import Weights

__all__ = ["mean_weights"]


def mean_weights(paths: Sequence[Path]) -> Weights:
    """Read weight files and return their mean, float32.

    The mean of networks is a good network where they were trained on from the same weights.

    Raises:
        StateError: a file is missing or damaged, or the files hold different weights.
    """
    total: dict[str, np.ndarray] = {}
    for path in paths:
        try:
            weights = load_file(path)
        except (OSError, SafetensorError) as error:
            raise StateError(f"the weights cannot be read ({error})", where=path) from error
        shapes = {name: value.shape for name, value in weights.items()}
        if total and shapes != {name: value.shape for name, value in total.items()}:
            raise StateError("holds other weights than the files before it", where=path)
        for name, value in weights.items():
            total[name] = total.get(name, np.zeros(value.shape, np.float64)) + value
    return {name: (value / len(paths)).astype(np.float32) for name, value in total.items()}
