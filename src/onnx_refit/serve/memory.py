"""What a model's desk remembers across restarts: which ids were staged, and which were committed as what.

A client that was committing when the server died asks again afterwards, and must learn whether it had happened.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from onnx_refit.files import read_error, write_bytes, write_error

_REMEMBERED = 256


@dataclass
class Memory:
    """What is remembered of one id.

    Attributes:
        summary: JSON-able account of what was staged.
        intent: versions up to this number existed when its commit began; None if none did.
        committed: the account of the commit.
    """

    summary: dict[str, Any] = field(default_factory=dict)
    intent: int | None = None
    committed: dict[str, Any] | None = None


class DeskMemory:
    """A journal of JSON lines. Not thread-safe: guarded by the desk's lock.

    Args:
        path: where; made with its first line, shortened when it is opened.

    Raises:
        ReadError, WriteError: it cannot be read or written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.known: dict[str, Memory] = {}
        try:
            lines = path.read_bytes().splitlines() if path.exists() else []
        except OSError as error:
            raise read_error(path, error) from error
        for line in lines:
            self._take(line)
        for identifier in list(self.known)[:-_REMEMBERED]:
            del self.known[identifier]
        if lines:
            write_bytes(path, b"".join(self._lines()))

    def settle(self, account_of: Callable[[int], dict[str, Any] | None]) -> None:
        """Decide what became of commits that were under way when the server died.

        Args:
            account_of: the account of the commit that made a version; None if there is no such version.
        """
        for identifier, memory in self.known.items():
            if memory.committed is None and memory.intent is not None:
                # Commits of one model follow each other, so the next number is this one's or nobody's yet.
                memory.committed = account_of(memory.intent + 1)
                memory.intent = None
                if memory.committed is not None:
                    self.committed(identifier, memory.committed)
                else:
                    self.not_committed(identifier)

    def staged(self, identifier: str, summary: dict[str, Any]) -> None:
        """Remember a staged set; WriteError if the disk refuses."""
        kept = {key: value for key, value in summary.items() if key not in ("report", "changed")}
        self._append({"id": identifier, "staged": kept})

    def committing(self, identifier: str, newest: int) -> None:
        """Remember that a commit begins, durably.

        Args:
            identifier: of what is committed.
            newest: the highest number of a version so far.

        Raises:
            WriteError: the disk refuses.
        """
        self._append({"id": identifier, "committing": newest}, durably=True)

    def not_committed(self, identifier: str) -> None:
        """Remember that a commit that began failed: the next number will be another one's."""
        self._append({"id": identifier, "committing": None})

    def committed(self, identifier: str, account: dict[str, Any]) -> None:
        """Remember that it happened. Needs not be durable: ``settle`` finds out."""
        self._append({"id": identifier, "committed": account})

    def _append(self, entry: dict[str, Any], *, durably: bool = False) -> None:
        try:
            with self._path.open("ab") as file:
                file.write(orjson.dumps(entry) + b"\n")
                if durably:
                    file.flush()
                    os.fsync(file.fileno())
        except OSError as error:
            raise write_error(self._path, error) from error

    def _take(self, line: bytes) -> None:
        try:
            entry = orjson.loads(line)
            memory = self.known.pop(entry["id"], None) or Memory()
        except (orjson.JSONDecodeError, KeyError, TypeError):
            return  # the last line of a server that was killed while it wrote
        if "staged" in entry:
            memory = Memory(entry["staged"])
        if "committing" in entry:
            memory.intent = entry["committing"]
        if "committed" in entry:
            memory.committed, memory.intent = entry["committed"], None
        self.known[entry["id"]] = memory

    def _lines(self) -> list[bytes]:
        made = []
        for identifier, memory in self.known.items():
            entry: dict[str, Any] = {"id": identifier, "staged": memory.summary}
            if memory.intent is not None:
                entry["committing"] = memory.intent
            if memory.committed is not None:
                entry["committed"] = memory.committed
            made.append(orjson.dumps(entry) + b"\n")
        return made
