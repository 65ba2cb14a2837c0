"""What the store writes down: versions, manifests and the lines of the journal."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import Enum
from typing import Any

from onnx_refit.errors import ModelError, StoreError
from onnx_refit.tensors import TensorSpec, numpy_dtype

FORMAT = 1


@dataclass(frozen=True)
class VersionRecord:
    """One version in the store.

    Attributes:
        number: counts up from 1, never used again.
        fingerprint: sha256 (hex) over names, dtypes, shapes and bytes of its tensors.
        parent: the version it was made from.
        committed: when.
        metadata: what the committer wrote down.
    """

    number: int
    fingerprint: str
    parent: int | None
    committed: datetime
    metadata: Mapping[str, str] = field(default_factory=dict)


class Action(Enum):
    """What a line of the journal records."""

    COMMIT = "commit"
    CURRENT = "current"
    DELETE = "delete"


@dataclass(frozen=True)
class Entry:
    """One line of the journal.

    Attributes:
        action: what happened.
        number: the version.
        record: the version, for a commit.
        manifest: sha256 (hex) of the manifest file, for a commit.
    """

    action: Action
    number: int
    record: VersionRecord | None = None
    manifest: str = ""

    def encode(self) -> bytes:
        """The line, with a checksum in front."""
        value: dict[str, Any] = {"action": self.action.value, "number": self.number}
        if self.record is not None:
            value |= {
                "fingerprint": self.record.fingerprint,
                "parent": self.record.parent,
                "committed": self.record.committed.isoformat(),
                "metadata": dict(self.record.metadata),
                "manifest": self.manifest,
            }
        text = json.dumps(value, separators=(",", ":")).encode()
        return b"%08x %s\n" % (zlib.crc32(text), text)


def decode_entries(data: bytes, where: object = None) -> tuple[list[Entry], int]:
    """The sound lines from the start of a journal, and how many bytes they take.

    What follows the last sound line is what a crash cut short; it was never committed.

    Raises:
        StoreError: a damaged line is followed by sound ones, so that it is no crash but damage.
    """
    entries: list[Entry] = []
    at = 0
    while at < len(data):
        end = data.find(b"\n", at)
        entry = _decode(data[at:end]) if end >= 0 else None
        if entry is None:
            rest = data[end + 1 :].split(b"\n") if end >= 0 else []
            if any(_decode(line) is not None for line in rest):
                raise StoreError(
                    f"the journal is damaged in the middle, at byte {at}",
                    where=where,
                    hint="Restore the store from a backup",
                )
            break
        entries.append(entry)
        at = end + 1
    return entries, at


def _decode(line: bytes) -> Entry | None:
    checksum, _, text = line.partition(b" ")
    try:
        if len(checksum) != 8 or int(checksum, 16) != zlib.crc32(text):
            return None
        value = json.loads(text)
        action, number = Action(value["action"]), int(value["number"])
        if action is not Action.COMMIT:
            return Entry(action, number)
        record = VersionRecord(
            number,
            str(value["fingerprint"]),
            None if value["parent"] is None else int(value["parent"]),
            datetime.fromisoformat(value["committed"]),
            {str(k): str(v) for k, v in value["metadata"].items()},
        )
        return Entry(action, number, record, str(value["manifest"]))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


@dataclass(frozen=True)
class Manifest:
    """The tensors of one version.

    Attributes:
        specs: name -> dtype and shape, in order.
        digests: name -> digest of the tensor, by which packs hold it.
    """

    specs: Mapping[str, TensorSpec]
    digests: Mapping[str, str]

    def encode(self) -> bytes:
        """The manifest as the bytes of its file."""
        tensors = {name: [spec.dtype, list(spec.static_shape), self.digests[name]] for name, spec in self.specs.items()}
        return json.dumps({"format": FORMAT, "tensors": tensors}, separators=(",", ":")).encode()

    @classmethod
    def decode(cls, data: bytes) -> Manifest:
        """The manifest that ``encode`` wrote; StoreError for anything else."""
        try:
            value = json.loads(data)
            if value["format"] != FORMAT:
                raise StoreError(
                    f"the manifest is of format {value['format']}, not {FORMAT}",
                    hint="Use the release of onnx-refit that wrote the store",
                )
            specs, digests = {}, {}
            for name, (dtype, shape, digest) in value["tensors"].items():
                numpy_dtype(dtype)
                specs[name] = TensorSpec(name, dtype, tuple(int(d) for d in shape))
                digests[name] = str(digest)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, ModelError) as error:
            raise StoreError(f"the manifest is damaged: {error!r}") from error
        return cls(specs, digests)


def now() -> datetime:
    """The time, in UTC, to the microsecond."""
    return datetime.now(UTC)
