"""A checkpoint in several files with an index (``*.safetensors.index.json``, ``pytorch_model.bin.index.json``)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

from onnx_refit.errors import WeightsError, WeightsFormatError
from onnx_refit.tensors import Array, TensorSpec
from onnx_refit.weights.source import WeightSource
from onnx_refit.weights.sources.strict_json import read_object


def inside(directory: Path, name: str, *, where: object) -> Path:
    """The path of a file that another file names, which must lie in the same directory or below.

    Raises:
        WeightsFormatError: the name is absolute, climbs out, or leads out through a symbolic link.
    """
    hint = "Such a file is never opened: fix the name, or move the file"
    if not name or "\0" in name or "\\" in name:
        raise WeightsFormatError(f"{name!r} is no file name", where=where, hint=hint)
    relative = Path(name)
    if relative.is_absolute() or ".." in relative.parts:
        raise WeightsFormatError(f"the name {name!r} leads out of the directory", where=where, hint=hint)
    path = directory / relative
    try:
        root, target = directory.resolve(), path.resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise WeightsFormatError(f"the name {name!r} cannot be followed: {error}", where=where) from error
    if not any(target.is_relative_to(allowed) for allowed in _roots(root)):
        raise WeightsFormatError(f"the link {name!r} leads out of the directory", where=where, hint=hint)
    return path


def _roots(root: Path) -> list[Path]:
    """Where links may lead: the directory, and in the Hugging Face cache (``snapshots/<revision>``) its blobs."""
    if root.parent.name == "snapshots":
        return [root, root.parent.parent / "blobs"]
    return [root]


class ShardedSource:
    """The tensors of all shards that an index names.

    Args:
        index: the index file; shards lie beside it.
        open_shard: opens one shard.

    Raises:
        WeightsError: a shard cannot be opened.
        WeightsFormatError: the index is damaged, leads out of its directory, or disagrees with the shards.
    """

    def __init__(self, index: Path, open_shard: Callable[[Path], WeightSource]) -> None:
        self._index = index
        document = read_object(index, what="the index")
        table = document.get("weight_map")
        if not isinstance(table, dict) or not table or not all(isinstance(v, str) for v in table.values()):
            raise WeightsFormatError(
                "the index has no weight_map of tensor names to file names", where=index, hint="Download it again"
            )
        paths = {name: inside(index.parent, name, where=index) for name in dict.fromkeys(table.values())}
        self._shards: dict[str, WeightSource] = {}
        try:
            for name, path in paths.items():
                self._shards[name] = open_shard(path)
            self._of = {tensor: self._shards[file] for tensor, file in table.items()}
            self._specs = MappingProxyType(self._match(table))
        except BaseException:
            self.close()
            raise

    def _match(self, table: Mapping[str, str]) -> dict[str, TensorSpec]:
        specs: dict[str, TensorSpec] = {}
        for tensor, file in table.items():
            spec = self._shards[file].specs.get(tensor)
            if spec is None:
                raise WeightsFormatError(
                    f"the index says that {file} holds {tensor!r}, but it does not",
                    where=self._index,
                    hint="Index and shards are of different checkpoints: download both again",
                )
            specs[tensor] = spec
        for file, shard in self._shards.items():
            for tensor in shard.specs:
                if table.get(tensor) != file:
                    raise WeightsFormatError(
                        f"{file} holds {tensor!r}, which the index does not place there",
                        where=self._index,
                        hint="Index and shards are of different checkpoints: download both again",
                    )
        return specs

    @property
    def description(self) -> str:
        """The path of the index."""
        return str(self._index)

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Name -> spec of every tensor, in the order of the index."""
        return self._specs

    def read(self, name: str) -> Array:
        """One tensor, as its shard gives it; WeightsError if there is none of that name."""
        shard = self._of.get(name)
        if shard is None:
            raise WeightsError(f"holds no tensor {name!r}", where=self._index)
        return shard.read(name)

    def close(self) -> None:
        """Close all shards; arrays already read stay valid."""
        for shard in self._shards.values():
            shard.close()
