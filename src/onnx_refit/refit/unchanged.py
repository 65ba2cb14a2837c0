"""Finding the weights that a refit gives but does not change, without reading much of those that it does."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from onnx_refit.tensors import Array
from onnx_refit.weights.scan import same_bits

_SAMPLES = 32


@lru_cache(maxsize=4096)
def _positions(size: int) -> npt.NDArray[np.int64]:
    """Up to 32 positions spread over a tensor, the same for every tensor of a size."""
    if size <= _SAMPLES:
        return np.arange(size)
    return np.random.default_rng(size).integers(0, size, _SAMPLES)


def sample(array: Array) -> bytes:
    """A few elements of a C-contiguous array as bytes: where they differ, the arrays differ."""
    return array.reshape(-1).take(_positions(array.size)).tobytes()


def unchanged(
    arrays: Mapping[str, Array], samples: Mapping[str, bytes], current: Callable[[str], Array]
) -> tuple[frozenset[str], dict[str, bytes]]:
    """Which weights have the very bits they have now.

    A weight whose samples differ has changed; only where they agree are all bits compared, so that a refit which
    changes everything pays microseconds a tensor for the question.

    Args:
        arrays: the weights given.
        samples: name -> ``sample`` of the current weight.
        current: reads a current weight.

    Returns:
        The names of the equal ones, and the samples of all the weights given.
    """
    found = {name: sample(array) for name, array in arrays.items()}
    alike: Iterable[str] = (name for name, taken in found.items() if taken == samples.get(name))
    return frozenset(name for name in alike if same_bits(arrays[name], current(name))), found
