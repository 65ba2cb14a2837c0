"""Packs: safetensors files of tensors under their digests, written once and never changed."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np

from onnx_refit.errors import StoreError, WeightsError
from onnx_refit.tensors import Array, dtype_name, numpy_dtype
from onnx_refit.weights.scan import same_bits
from onnx_refit.weights.sources.safetensors import STORABLE, SafetensorsSource, safetensors_dtype
from onnx_refit.weights.store.disk import Disk, write_file

_SUFFIX = ".pack"


class Packs:
    """All packs of a store.

    Args:
        directory: where they lie.
        disk: how the disk is touched.

    Raises:
        StoreError: a pack is damaged.
    """

    def __init__(self, directory: Path, disk: Disk) -> None:
        self._directory, self._disk = directory, disk
        self._packs: dict[Path, SafetensorsSource] = {}
        self._holder: dict[str, Path] = {}
        self._next = 1
        for path in sorted(directory.glob(f"*{_SUFFIX}")):
            self._add(path)

    def _add(self, path: Path) -> None:
        try:
            pack = SafetensorsSource(path)
        except WeightsError as error:
            raise StoreError(f"the pack is damaged: {error.message}", where=path) from error
        self._packs[path] = pack
        for digest in pack.specs:
            self._holder[digest] = path
        if path.stem.isdecimal():
            self._next = max(self._next, int(path.stem) + 1)

    def hold(self, digest: str, array: Array) -> bool:
        """Whether a pack has a tensor of that digest, sound: a damaged one is to be written again."""
        if digest not in self._holder:
            return False
        try:
            return same_bits(self.read(digest, dtype_name(array.dtype)), array)
        except StoreError:
            return False

    def read(self, digest: str, dtype: str) -> Array:
        """A tensor by its digest, mapped and read-only; StoreError if no pack holds it as that dtype."""
        array = self._read(digest)
        wanted = numpy_dtype(dtype)
        if array.dtype != wanted and array.dtype.itemsize != wanted.itemsize:
            raise StoreError(f"the tensor {digest[:12]} is no {dtype}", where=self._directory)
        return array.view(wanted)

    def _read(self, digest: str) -> Array:
        path = self._holder.get(digest)
        if path is None:
            raise StoreError(f"no pack holds the tensor {digest[:12]}", where=self._directory)
        try:
            return self._packs[path].read(digest)
        except WeightsError as error:
            raise StoreError(f"the pack is damaged: {error.message}", where=path) from error

    def write(self, tensors: Mapping[str, Array]) -> None:
        """Write tensors under their digests into a new pack, durably; OSError leaves the packs as they were."""
        if not tensors:
            return
        path = self._directory / f"{self._next:08d}{_SUFFIX}"
        write_file(self._disk, path, _safetensors(tensors))
        self._add(path)

    def collect(self, live: Collection[str]) -> int:
        """Remove what is not live: whole packs, and packs that are mostly dead after saving what lives in them.

        Returns:
            Bytes freed.
        """
        freed = 0
        for path, pack in list(self._packs.items()):
            sizes = {digest: spec.nbytes for digest, spec in pack.specs.items()}
            kept = {digest for digest in sizes if digest in live and self._holder[digest] == path}
            dead = sum(size for digest, size in sizes.items() if digest not in kept)
            if kept and 2 * dead < sum(sizes.values()):
                continue
            self.write({digest: pack.read(digest) for digest in kept})
            self._disk.remove(path)
            del self._packs[path]
            for digest in sizes:
                if self._holder.get(digest) == path:
                    del self._holder[digest]
            freed += dead
        return freed

    def close(self) -> None:
        """Close all packs; arrays already read stay valid."""
        for pack in self._packs.values():
            pack.close()


def _safetensors(tensors: Mapping[str, Array]) -> list[bytes | memoryview]:
    """The file of some tensors in pieces that share the tensors' memory; widest elements first, to align all."""
    header: dict[str, object] = {}
    chunks: list[bytes | memoryview] = []
    end = 0
    for digest in sorted(tensors, key=lambda d: (-tensors[d].itemsize, d)):
        array = np.ascontiguousarray(tensors[digest])
        if dtype_name(array.dtype) not in STORABLE:  # the manifest knows what it is
            array = array.view(np.uint8)
        header[digest] = {
            "dtype": safetensors_dtype(dtype_name(array.dtype)),
            "shape": list(tensors[digest].shape),
            "data_offsets": [end, end + array.nbytes],
        }
        end += array.nbytes
        if array.size:
            chunks.append(array.reshape(-1).view(np.uint8).data)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return [len(text).to_bytes(8, "little") + text, *chunks]
