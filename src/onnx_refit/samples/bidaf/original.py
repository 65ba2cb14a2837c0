"""Where the original model comes from: the user's own published file, or the one bundled with this library."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from onnx_refit.errors import InputError
from onnx_refit.files import read_error

PUBLISHED = "bidaf-9.onnx"
PUBLISHED_SHA256 = "dfc317b56d065a3e297240a9e9b9118ff2260790b5850f4be2bc6ea1bcc65e80"
PUBLISHED_BYTES = 43_522_228
ORIGINAL = "bidaf-original.onnx"
VARIABLE = "TRT_DATA_DIR"

_PLACES = ("", "samples/bidaf", "bidaf")


@dataclass(frozen=True)
class Original:
    """A user's original model.

    Attributes:
        path: the file.
        sha256: its digest (hex).
    """

    path: Path
    sha256: str

    @property
    def published(self) -> bool:
        """Whether it is the published file, bit for bit."""
        return self.sha256 == PUBLISHED_SHA256

    def warning(self) -> str | None:
        """What to warn of, or None."""
        if self.published:
            return None
        return f"{self.path} is not the published {PUBLISHED}: its sha256 is {self.sha256}, not {PUBLISHED_SHA256}"


def find_original(directory: Path | None, environment: Mapping[str, str]) -> Original:
    """Find the user's original model.

    Args:
        directory: the data directory (``-d``); None looks at the variable ``TRT_DATA_DIR``.
        environment: the environment variables.

    Raises:
        InputError: neither names a directory, or it holds no such file; with what to do.
        ReadError: the file cannot be read.
    """
    given = directory
    if given is None and environment.get(VARIABLE):
        given = Path(environment[VARIABLE])
    if given is None:
        raise InputError(
            "no data directory is given",
            hint=f"Name the directory that holds {PUBLISHED} with -d DIR or in the variable {VARIABLE}, fetch the file "
            "with 'onnx-refit bidaf download -d DIR', or use the bundled model with --bundled",
        )
    if not given.is_dir():
        raise InputError("the data directory is not there", where=given, hint="Make it, or name another with -d DIR")
    for place in _PLACES:
        for name in (PUBLISHED, ORIGINAL):
            path = given / place / name
            if path.is_file():
                return Original(path, file_sha256(path))
    raise InputError(
        f"the data directory holds neither {PUBLISHED} nor {ORIGINAL}",
        where=given,
        hint=f"Fetch it with 'onnx-refit bidaf download -d {given}', or use the bundled model with --bundled",
    )


def file_sha256(path: Path) -> str:
    """The sha256 (hex) of a file; ReadError if it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise read_error(path, error) from error
