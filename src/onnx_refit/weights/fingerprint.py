"""Fingerprints: sha256 over names, dtypes, shapes and bytes, whatever order or format the tensors come in."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from onnx_refit.tensors import Array, dtype_name
from onnx_refit.weights.source import WeightSource

_WINDOW = 64  # tensors read ahead of the hashing threads


@dataclass(frozen=True)
class Fingerprint:
    """The fingerprint of a set of tensors.

    Attributes:
        value: sha256 (hex) of the whole set.
        digests: name -> sha256 (hex) of dtype, shape and bytes of the tensor.
    """

    value: str
    digests: Mapping[str, str]


def tensor_digest(array: Array) -> str:
    """Sha256 (hex) of dtype, shape and bytes (C order, little-endian) of a tensor."""
    digest = hashlib.sha256(f"{dtype_name(array.dtype)}{list(array.shape)}\n".encode())
    contiguous = np.ascontiguousarray(array)
    if contiguous.size:
        digest.update(contiguous.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def combine(digests: Mapping[str, str]) -> Fingerprint:
    """The fingerprint of a set from the digests of its tensors; their order does not matter."""
    whole = hashlib.sha256()
    for name in sorted(digests):
        # The length keeps a name with a line break in it from posing as two tensors.
        encoded = name.encode("utf-8", "surrogatepass")
        whole.update(f"{len(encoded)}:".encode() + encoded + f"={digests[name]}\n".encode())
    return Fingerprint(whole.hexdigest(), dict(digests))


def fingerprint(
    source: WeightSource,
    known: Mapping[str, str] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Fingerprint:
    """Hash a set of tensors, on all cores, at about a gigabyte a second each.

    Args:
        source: the tensors.
        known: digests of tensors that are known not to have changed; they are not read.
        progress: called with the bytes hashed so far.
    """
    digests = dict(known or {})
    names = [name for name in source.specs if name not in digests]
    done = 0
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for start in range(0, len(names), _WINDOW):
            window = names[start : start + _WINDOW]
            # hashlib lets other threads run while it works; reading stays in this thread, sources need not be safe.
            arrays = [source.read(name) for name in window]
            for name, array, digest in zip(window, arrays, pool.map(tensor_digest, arrays), strict=True):
                digests[name] = digest
                done += array.nbytes
                if progress is not None:
                    progress(done)
    return combine({name: digests[name] for name in source.specs})
