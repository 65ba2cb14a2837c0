"""Checkpoints by URL, fetched through fsspec into a private directory that goes with the source."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from onnx_refit.errors import MissingExtraError, OnnxRefitError, WeightsError
from onnx_refit.tensors import Array, TensorSpec
from onnx_refit.weights.source import WeightSource
from onnx_refit.weights.sources.sharded import inside
from onnx_refit.weights.sources.strict_json import read_object

_CHUNK = 8 << 20
_FETCH_ERRORS = (OSError, ValueError, ImportError, RuntimeError, KeyError, TypeError, NotImplementedError)
# What fsspec needs for a kind of URL; only the first two are in the extra.
_PACKAGES = {
    "http": "aiohttp",
    "https": "aiohttp",
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "abfs": "adlfs",
    "az": "adlfs",
    "hf": "huggingface_hub",
    "sftp": "paramiko",
    "ssh": "paramiko",
}


def is_url(text: str) -> bool:
    """Whether text names something by URL (``s3://…``, ``memory://…``, ``simplecache::https://…``)."""
    scheme, separator, _ = text.partition("://")
    return bool(separator) and len(scheme) > 1 and scheme.replace("+", "").replace("::", "").isalnum()


class RemoteSource:
    """A checkpoint fetched from a URL; the copy is removed on close or when the source is collected.

    Args:
        url: a file, an index of shards, or a directory.
        open_local: opens the local copy.
        progress: called with (bytes so far, file name) after each chunk.

    Raises:
        MissingExtraError: fsspec, or what it needs for http, is not installed.
        WeightsError: the URL cannot be fetched.
    """

    def __init__(
        self, url: str, open_local: Callable[[Path], WeightSource], progress: Callable[[int, str], None] | None = None
    ) -> None:
        self._url = url
        directory = tempfile.mkdtemp(prefix="onnx-refit-")
        self._remove = weakref.finalize(self, shutil.rmtree, directory, ignore_errors=True)
        try:
            self._source = open_local(_fetch(url, Path(directory), progress or (lambda done, name: None)))
        except BaseException:
            self._remove()
            raise

    @property
    def description(self) -> str:
        """The URL."""
        return self._url

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Name -> spec of every tensor."""
        return self._source.specs

    def read(self, name: str) -> Array:
        """One tensor, as the format of the file gives it."""
        return self._source.read(name)

    def close(self) -> None:
        """Remove the local copy; arrays already read stay valid."""
        self._source.close()
        self._remove()


def _fetch(url: str, directory: Path, progress: Callable[[int, str], None]) -> Path:
    """Fetch a URL and what it needs; the local path to open."""
    try:
        import fsspec
    except ImportError as error:
        raise MissingExtraError("fsspec", "remote", "reading weights by URL") from error
    try:
        files, root = fsspec.core.url_to_fs(url)
        if files.isdir(root):
            local = directory / "model"
            local.mkdir()
            for entry in files.ls(root, detail=False):
                name = PurePosixPath(entry).name
                if not files.isdir(entry) and not name.startswith("."):
                    _copy(files, entry, inside(local, name, where=url), progress)
            return local
        local = directory / (PurePosixPath(root).name or "checkpoint")
        _copy(files, root, local, progress)
        parent = str(PurePosixPath(root).parent)
        for name in _needed(local):
            target = inside(directory, name, where=url)
            target.parent.mkdir(parents=True, exist_ok=True)
            _copy(files, f"{parent}/{name}", target, progress)
    except OnnxRefitError:
        raise
    except ImportError as error:
        raise _missing(url, error) from error
    except _FETCH_ERRORS as error:
        raise WeightsError(
            f"cannot be fetched: {type(error).__name__}: {error}", where=url, hint="Check the URL and your access"
        ) from error
    return local


def _missing(url: str, error: ImportError) -> OnnxRefitError:
    """Which package a kind of URL needs."""
    scheme = url.partition("://")[0].split("::")[-1]
    package = _PACKAGES.get(scheme)
    if package == "aiohttp":
        return MissingExtraError(package, "remote", f"reading {scheme}:// URLs")
    if package is None:
        return WeightsError(f"cannot be fetched: {error}", where=url, hint="Install the package that it names")
    return WeightsError(
        f"reading {scheme}:// URLs needs the package {package!r}, which is not installed",
        where=url,
        hint=f"Install it with: pip install {package}",
    )


def _needed(path: Path) -> list[str]:
    """The files that a fetched file names: shards of an index, external data of an ONNX model."""
    if path.name.endswith(".index.json"):
        table = read_object(path, what="the index").get("weight_map")
        if isinstance(table, dict):
            return list(dict.fromkeys(v for v in table.values() if isinstance(v, str)))
    if path.suffix == ".onnx":
        from onnx_refit.weights.sources.onnx_model import external_files

        return external_files(path)
    return []


def _copy(files: Any, remote: str, local: Path, progress: Callable[[int, str], None]) -> None:
    done = 0
    with files.open(remote, "rb") as source, local.open("wb") as target:
        while chunk := source.read(_CHUNK):
            target.write(chunk)
            done += len(chunk)
            progress(done, local.name)
