"""Fetching the published model: resumed where an earlier attempt stopped, checked, put in place whole or not at all."""

from __future__ import annotations

import http.client
import os
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from onnx_refit.errors import OnnxRefitError
from onnx_refit.files import sync_directory, write_error
from onnx_refit.samples.bidaf.original import PUBLISHED, PUBLISHED_BYTES, PUBLISHED_SHA256, file_sha256

URL = (
    "https://github.com/onnx/models/raw/main/validated/text/machine_comprehension/"
    "bidirectional_attention_flow/model/bidaf-9.onnx"
)
"""Where the ONNX model zoo keeps the file."""

Progress = Callable[[int, int], None]
"""Takes the bytes that are there, and those of the whole file."""

_CHUNK = 1 << 18
_TRIES = 3


class DownloadError(OnnxRefitError):
    """The file could not be fetched, or what came is not the file."""


class _CutError(Exception):
    """The connection ended before the file did."""


@dataclass(frozen=True)
class Remote:
    """A file to fetch.

    Attributes:
        url: its address.
        name: its name in the directory.
        nbytes: its size.
        sha256: its digest (hex).
    """

    url: str = URL
    name: str = PUBLISHED
    nbytes: int = PUBLISHED_BYTES
    sha256: str = PUBLISHED_SHA256


def download(
    directory: Path, remote: Remote | None = None, *, progress: Progress | None = None, timeout: float = 30.0
) -> Path:
    """Fetch a file into a directory; at once if it is already there whole.

    What has arrived stays beside the target as ``NAME.part``, and the next attempt goes on from there.

    Args:
        directory: where to; it is made if it is not there.
        remote: what to fetch; the published model if None.
        progress: called as bytes arrive.
        timeout: seconds without a byte after which an attempt counts as failed.

    Returns:
        The file.

    Raises:
        DownloadError: no network, the server refuses, the connection breaks again and again, or the checksum is not
            the published one (what came is then removed).
        WriteError: the directory cannot be written, or the disk is full.
    """
    remote = remote or Remote()
    target, part = directory / remote.name, directory / f"{remote.name}.part"
    if target.is_file() and file_sha256(target) == remote.sha256:
        return target
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for attempt in range(1, _TRIES + 1):
            try:
                _fetch(remote, part, progress, timeout)
                break
            except _CutError as error:
                if attempt == _TRIES:
                    raise DownloadError(
                        f"the connection broke {_TRIES} times ({error})",
                        where=remote.url,
                        hint="Run the command again: it goes on where it stopped",
                    ) from error
        found = file_sha256(part)
        if found != remote.sha256:
            part.unlink()
            raise DownloadError(
                f"what came is not the published file: its sha256 is {found}, not {remote.sha256}",
                where=remote.url,
                hint="Nothing was kept; try again, or get the file another way",
            )
        part.replace(target)
        sync_directory(directory)
    except OSError as error:
        raise write_error(target, error) from error
    return target


def _fetch(remote: Remote, part: Path, progress: Progress | None, timeout: float) -> None:
    """One attempt: ask for what is missing and append it."""
    have = part.stat().st_size if part.exists() else 0
    if have > remote.nbytes:
        part.unlink()
        have = 0
    if have == remote.nbytes:
        return
    headers = {"User-Agent": "onnx-refit", "Range": f"bytes={have}-"} if have else {"User-Agent": "onnx-refit"}
    request = urllib.request.Request(remote.url, headers=headers)
    try:
        response = urllib.request.urlopen(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        if error.code == 416 and have:  # the server does not know this range: start anew
            part.unlink()
            raise _CutError("the server refused to go on where the last attempt stopped") from error
        raise DownloadError(f"the server answered {error.code} {error.reason}", where=remote.url) from error
    except (urllib.error.URLError, TimeoutError, http.client.HTTPException, ConnectionError) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        raise DownloadError(
            f"cannot be reached ({reason})",
            where=remote.url,
            hint=f"Check the network, or fetch {remote.name} elsewhere and name its directory with -d DIR",
        ) from error
    with response:
        resumed = response.status == 206
        _append(response, part, have if resumed else 0, remote.nbytes, progress)


def _append(response: Any, part: Path, have: int, total: int, progress: Progress | None) -> None:
    with part.open("ab" if have else "wb") as file:
        try:
            while chunk := response.read(_CHUNK):
                file.write(chunk)
                have += len(chunk)
                if progress is not None:
                    progress(min(have, total), total)
                if have > total:
                    break
        except http.client.IncompleteRead as error:
            file.write(error.partial)
            have += len(error.partial)
            raise _CutError(f"{have} of {total} bytes arrived") from error
        except (TimeoutError, ConnectionError, http.client.HTTPException) as error:
            raise _CutError(str(error) or type(error).__name__) from error
        finally:
            _sync(file)
    if have < total:
        raise _CutError(f"{have} of {total} bytes arrived")


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
