"""Delta files: what turns one checkpoint into another, and nothing else can be turned by.

A delta is a safetensors file. Its metadata hold the fingerprints of base and result; its tensors are, for each tensor
of the result that differs from the base, either the whole of it (``whole:NAME``) or, where that is smaller, the flat
indices and values of the elements that differ (``at:NAME``, ``to:NAME``).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from onnx_refit.errors import WeightsError, WeightsFormatError
from onnx_refit.tensors import Array, TensorSpec
from onnx_refit.weights.fingerprint import Fingerprint, combine, fingerprint, tensor_digest
from onnx_refit.weights.provenance.bits import as_bits
from onnx_refit.weights.source import WeightSource
from onnx_refit.weights.sources.arrays import ArraysSource
from onnx_refit.weights.sources.safetensors import SafetensorsSource
from onnx_refit.weights.write import write_safetensors

_FORMAT = "onnx-refit-delta"
_VERSION = "1"
_HINT = "Make the delta again from the two checkpoints"


@dataclass(frozen=True)
class DeltaSummary:
    """What a delta holds.

    Attributes:
        base: fingerprint of the checkpoint that it applies to.
        result: fingerprint of what comes out.
        changed: tensors that differ or are new.
        removed: tensors that the result lacks.
        nbytes: bytes of tensors in the delta.
    """

    base: str
    result: str
    changed: tuple[str, ...]
    removed: tuple[str, ...]
    nbytes: int


def write_delta(base: WeightSource, result: WeightSource, path: str | os.PathLike[str]) -> DeltaSummary:
    """Write what turns ``base`` into ``result``.

    Raises:
        WriteError: the file cannot be written.
        WeightsError: a tensor cannot be read.
    """
    before, after = fingerprint(base), fingerprint(result)
    parts: dict[str, Array] = {}
    changed = [name for name, digest in after.digests.items() if before.digests.get(name) != digest]
    for name in changed:
        new = result.read(name)
        old = base.read(name) if base.specs.get(name) == result.specs[name] else None
        sparse = None if old is None else _sparse(old, new)
        if sparse is None:
            parts[f"whole:{name}"] = new
        else:
            parts[f"at:{name}"], parts[f"to:{name}"] = sparse
    removed = [name for name in before.digests if name not in after.digests]
    metadata = {
        "format": _FORMAT,
        "version": _VERSION,
        "base": before.value,
        "result": after.value,
        "removed": json.dumps(removed),
    }
    write_safetensors(path, ArraysSource(parts), metadata)
    size = sum(array.nbytes for array in parts.values())
    return DeltaSummary(before.value, after.value, tuple(changed), tuple(removed), size)


def _sparse(old: Array, new: Array) -> tuple[Array, Array] | None:
    """Indices and values of the elements that differ, None where the whole tensor is no larger."""
    if new.dtype.itemsize > 8 or new.size >= 1 << 32:
        return None
    a, b = (as_bits(np.ascontiguousarray(x)).reshape(-1) for x in (old, new))
    where = np.flatnonzero(a != b).astype(np.uint32)
    if where.size * (4 + new.dtype.itemsize) >= new.nbytes:
        return None
    return where, np.ascontiguousarray(new).reshape(-1)[where]


class DeltaSource:
    """The result of applying a delta to its base.

    Args:
        base: the checkpoint that the delta was made from.
        path: the delta.
        known: the fingerprint of the base, where it is at hand; else the base is hashed.

    Raises:
        WeightsFormatError: the file is no delta, is damaged, or its result is not what it says.
        WeightsError: the base is another checkpoint.
    """

    def __init__(self, base: WeightSource, path: str | os.PathLike[str], known: Fingerprint | None = None) -> None:
        self._base = base
        self._delta = SafetensorsSource(Path(path))
        metadata = self._delta.metadata
        if metadata.get("format") != _FORMAT or metadata.get("version") != _VERSION:
            raise WeightsFormatError(f"no delta of version {_VERSION}", where=path, hint=_HINT)
        have = known or fingerprint(base)
        if have.value != metadata.get("base"):
            raise WeightsError(
                f"applies to the checkpoint {metadata.get('base', '?')[:12]}, not to {base.description}, "
                f"which is {have.value[:12]}",
                where=path,
                hint="Apply it to the checkpoint that it was made from",
            )
        self._removed = _removed(metadata.get("removed", ""), path)
        self._specs = self._find_specs(path)
        self._verify(have, metadata.get("result", ""), path)

    def _find_specs(self, path: object) -> dict[str, TensorSpec]:
        specs = {name: spec for name, spec in self._base.specs.items() if name not in self._removed}
        for key, spec in self._delta.specs.items():
            kind, _, name = key.partition(":")
            if kind == "whole":
                specs[name] = TensorSpec(name, spec.dtype, spec.shape)
                continue
            at, to = self._delta.specs.get(f"at:{name}"), self._delta.specs.get(f"to:{name}")
            if kind not in ("at", "to") or at is None or to is None or name not in specs:
                raise WeightsFormatError(f"{key!r} is no part of a delta", where=path, hint=_HINT)
            if (
                at.dtype != "uint32"
                or to.dtype != specs[name].dtype
                or at.shape != to.shape
                or len(at.shape or ()) != 1
            ):
                raise WeightsFormatError(f"{key!r} does not fit the base", where=path, hint=_HINT)
        return specs

    def _verify(self, base: Fingerprint, result: str, path: object) -> None:
        digests = {name: base.digests[name] for name in self._specs if name not in self.changed}
        for name in self.changed:
            digests[name] = tensor_digest(self.read(name))
        self.fingerprint = combine(digests)
        if self.fingerprint.value != result:
            raise WeightsFormatError("the result is not what the delta says it is", where=path, hint=_HINT)

    @property
    def changed(self) -> frozenset[str]:
        """The tensors that differ from the base or are new."""
        return frozenset(key.partition(":")[2] for key in self._delta.specs)

    @property
    def description(self) -> str:
        """Base and delta."""
        return f"{self._base.description} with {self._delta.description}"

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Name -> spec of every tensor of the result."""
        return self._specs

    def read(self, name: str) -> Array:
        """One tensor of the result; WeightsError if there is none of that name."""
        if name not in self._specs:
            raise WeightsError(f"holds no tensor {name!r}", where=self.description)
        if f"whole:{name}" in self._delta.specs:
            return self._delta.read(f"whole:{name}")
        base = self._base.read(name)
        if f"at:{name}" not in self._delta.specs:
            return base
        patched = np.array(base, order="C")
        where = self._delta.read(f"at:{name}")
        if where.size and int(where.max()) >= patched.size:
            raise WeightsFormatError(f"the delta of {name!r} leads out of it", where=self.description, hint=_HINT)
        patched.reshape(-1)[where] = self._delta.read(f"to:{name}")
        return patched

    def close(self) -> None:
        """Close base and delta."""
        self._base.close()
        self._delta.close()


def _removed(text: str, path: object) -> frozenset[str]:
    try:
        names = json.loads(text)
    except (ValueError, RecursionError):
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise WeightsFormatError("the list of removed tensors is damaged", where=path, hint=_HINT)
    return frozenset(names)
