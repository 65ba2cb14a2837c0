"""The version store: what was committed is there, whole, after a crash at any moment.

A commit writes the tensors that the store does not have into a pack, then a manifest, then one line of the journal,
each durably before the next. The line is the commit: before it nothing refers to pack and manifest, and the garbage
collection takes them away.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from onnx_refit.errors import StoreError, VersionError
from onnx_refit.tensors import Array, TensorSpec, spec_of
from onnx_refit.weights.fingerprint import Fingerprint, combine, tensor_digest
from onnx_refit.weights.store.disk import Disk, Lock, store_error, write_file
from onnx_refit.weights.store.packs import Packs
from onnx_refit.weights.store.records import Action, Entry, Manifest, VersionRecord, decode_entries, now

_DAMAGED = (
    "Restore the store from a backup, or go to another version: engine.rollback(to=N), or without an engine "
    "onnx_refit.weights.store.Store.open(path).rollback(N)"
)


class Store:
    """A directory of versions, open for writing by one process at a time. Its methods may be called from any thread.

    Open one with ``Store.open``.
    """

    def __init__(self, path: Path, disk: Disk) -> None:
        self._path, self._disk = path, disk
        self._mutex = threading.RLock()
        self._records: dict[int, VersionRecord] = {}
        self._manifests: dict[int, Manifest] = {}
        self._hashes: dict[int, str] = {}
        self._order: list[int] = []  # in which versions were current last
        self._current: int | None = None
        self._last = 0
        self._length = 0  # of the sound part of the journal
        self._sound = True
        try:
            if path.exists() and not path.is_dir():
                raise StoreError("is a file, not a directory", where=path, hint="Name the directory of the store")
            for directory in (path, path / "packs", path / "manifests"):
                disk.make_directory(directory)
        except OSError as error:
            raise store_error(path, error) from error
        self._lock: Lock | None = Lock(path / "lock")
        try:
            with self._writing():
                self._recover()
            self._packs = Packs(path / "packs", disk)
        except BaseException:
            self._lock.release()
            raise

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, disk: Disk | None = None) -> Store:
        """Open a store, making it if need be, and clear away what a crash left half-done.

        Args:
            path: its directory.
            disk: how the disk is touched; for tests.

        Raises:
            StoreLockedError: another process, or another object of this one, writes to it.
            StoreError: it cannot be written, or is damaged.
        """
        if not os.fspath(path):
            raise StoreError("the path is empty", hint="Name the directory of the store")
        return cls(Path(path), disk or Disk())

    # ------------------------------------------------------------------ reading

    def current(self) -> VersionRecord | None:
        """The current version: the last committed, or the one last rolled back to; None in an empty store."""
        with self._mutex:
            return None if self._current is None else self._records[self._current]

    def versions(self) -> tuple[VersionRecord, ...]:
        """All versions, oldest first."""
        with self._mutex:
            return tuple(self._records[number] for number in sorted(self._records))

    def previous(self, number: int) -> int | None:
        """The version, other than a given one, that was current last; None if there is none."""
        with self._mutex:
            return next((other for other in reversed(self._order) if other != number), None)

    def load(self, number: int) -> StoredVersion:
        """The tensors of a version as a weight source, mapped from disk, each hashed as it is read.

        Raises:
            VersionError: there is no such version.
            StoreError: its manifest is damaged.
        """
        with self._mutex:
            self._require(number)
            return StoredVersion(self._path, number, self._manifest(number), self._packs)

    def verify(self, number: int) -> None:
        """Hash every tensor of a version again; StoreError names the first that is damaged."""
        with self._mutex:
            self._require(number)
            version = self.load(number)
            version.read_many(version.specs)

    def fingerprint(self, number: int) -> Fingerprint:
        """Fingerprint and digests of a version, without reading its tensors; VersionError if there is none."""
        with self._mutex:
            self._require(number)
            return combine(self._manifest(number).digests)

    # ------------------------------------------------------------------ writing

    def commit(
        self, arrays: Mapping[str, Array], parent: int | None = None, metadata: Mapping[str, str] | None = None
    ) -> VersionRecord:
        """Commit a version durably; when this returns, it survives a power cut.

        Args:
            arrays: tensors by name: all of them, or with a parent those that differ from it.
            parent: the version to take the other tensors from.
            metadata: what to write down with it.

        Raises:
            VersionError: there is no such parent.
            ModelError: a dtype is not known.
            StoreError: the disk refused; the store is as it was.
        """
        with self._mutex, self._writing():
            self._require_sound()
            if parent is not None:
                self._require(parent)
            base = Manifest({}, {}) if parent is None else self._manifest(parent)
            new = _digests(arrays)
            digests = {**base.digests, **new}
            manifest = Manifest({**base.specs, **{name: spec_of(name, a) for name, a in arrays.items()}}, digests)
            self._packs.write(
                {new[name]: array for name, array in arrays.items() if not self._packs.hold(new[name], array)}
            )
            data = manifest.encode()
            hashed = hashlib.sha256(data).hexdigest()
            write_file(self._disk, self._manifest_path(hashed), [data])
            number = self._last + 1
            record = VersionRecord(number, combine(digests).value, parent, now(), dict(metadata or {}))
            self._append(Entry(Action.COMMIT, number, record, hashed))
            self._manifests[number] = manifest
            return record

    def rollback(self, number: int) -> VersionRecord:
        """Make a version the current one, durably; VersionError if there is none, StoreError as for ``commit``."""
        with self._mutex, self._writing():
            self._require_sound()
            self._require(number)
            if number != self._current:
                self._append(Entry(Action.CURRENT, number))
            return self._records[number]

    def delete(self, number: int) -> None:
        """Forget a version; ``gc`` frees its bytes.

        Raises:
            VersionError: there is no such version, or it is the current one.
            StoreError: as for ``commit``.
        """
        with self._mutex, self._writing():
            self._require_sound()
            self._require(number)
            if number == self._current:
                raise VersionError(f"version {number} is the current one", hint="Roll back to another one first")
            self._append(Entry(Action.DELETE, number))

    def gc(self) -> int:
        """Free the bytes that no version needs; the number of bytes of tensors freed.

        Raises:
            StoreError: the disk refused, or a manifest is damaged, in which case nothing of it is freed.
        """
        with self._mutex, self._writing():
            self._require_sound()
            live = {digest for number in self._records for digest in self._manifest(number).digests.values()}
            freed = self._packs.collect(live)
            self._clear()
            return freed

    def close(self) -> None:
        """Give the lock back; versions loaded before stay readable."""
        with self._mutex:
            if self._lock is not None:
                self._lock.release()
                self._lock = None

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ------------------------------------------------------------------ inside

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        if self._lock is None:
            raise StoreError("the store was closed", where=self._path)
        try:
            yield
        except OSError as error:
            raise store_error(self._path, error) from error

    def _require(self, number: int) -> None:
        if number not in self._records:
            held = ", ".join(map(str, sorted(self._records)[-8:])) or "none"
            raise VersionError(f"the store has no version {number}", where=self._path, hint=f"It has {held}")

    def _require_sound(self) -> None:
        if not self._sound:
            raise StoreError(
                "an earlier failure could not be undone", where=self._path, hint="Open the store again to recover it"
            )

    def _journal_path(self) -> Path:
        return self._path / "journal"

    def _manifest_path(self, hashed: str) -> Path:
        # By content, so that a version never finds the manifest of another attempt at its number.
        return self._path / "manifests" / f"{hashed}.json"

    def _manifest(self, number: int) -> Manifest:
        manifest = self._manifests.get(number)
        if manifest is None:
            path = self._manifest_path(self._hashes[number])
            try:
                data = path.read_bytes()
            except OSError as error:
                raise store_error(path, error) from error
            if hashlib.sha256(data).hexdigest() != self._hashes[number]:
                raise StoreError("the manifest is damaged", where=path)
            manifest = self._manifests[number] = Manifest.decode(data)
        return manifest

    def _recover(self) -> None:
        """Read the journal, cut off what a crash left of an unfinished line, and clear away unfinished files."""
        journal = self._journal_path()
        if not journal.exists():
            self._begin(journal)
        data = journal.read_bytes()
        entries, self._length = decode_entries(data, journal)
        if self._length < len(data):
            self._disk.truncate(journal, self._length)
        for entry in entries:
            self._apply(entry)
        self._clear()

    def _begin(self, journal: Path) -> None:
        """Write an empty journal, before there is anything else; StoreError where there is."""
        for kind in ("packs", "manifests"):
            held = sum(1 for path in (self._path / kind).iterdir() if path.suffix != ".tmp")
            if held:
                raise StoreError(
                    f"the file 'journal' is missing, though there are {held} {kind}",
                    where=self._path,
                    hint="Restore it from a backup, or name another directory",
                )
        self._disk.close(self._disk.open_append(journal))
        self._disk.sync_directory(self._path)

    def _apply(self, entry: Entry) -> None:
        number = entry.number
        if number in self._order:
            self._order.remove(number)
        if entry.action is not Action.DELETE:
            self._order.append(number)
        if entry.action is Action.COMMIT and entry.record is not None:
            self._records[number], self._hashes[number] = entry.record, entry.manifest
            self._current = number
            self._last = max(self._last, number)
        elif number not in self._records:
            raise StoreError(f"the journal speaks of version {number}, which it never committed", where=self._path)
        elif entry.action is Action.CURRENT:
            self._current = number
        else:
            del self._records[number], self._hashes[number]
            self._manifests.pop(number, None)

    def _clear(self) -> None:
        """Remove temporary files and manifests that no version has."""
        for directory in (self._path / "packs", self._path / "manifests"):
            for path in directory.glob("*.tmp"):
                self._disk.remove(path)
        needed = set(self._hashes.values())
        for path in (self._path / "manifests").glob("*.json"):
            if path.stem not in needed:
                self._disk.remove(path)

    def _append(self, entry: Entry) -> None:
        """Append a line durably: the moment of a commit. On failure the line is taken back."""
        journal = self._journal_path()
        line = entry.encode()
        if not journal.exists():
            raise StoreError("the file 'journal' is gone", where=self._path, hint="Restore it, or use another store")
        try:
            descriptor = self._disk.open_append(journal)
            try:
                self._disk.write(descriptor, line)
                self._disk.sync(descriptor)
            finally:
                self._disk.close(descriptor)
        except BaseException:  # a full disk, or somebody's Ctrl-C
            self._take_back(journal)
            raise
        # An interrupt from here on leaves the store refusing to write: the line is durable, memory may not know it.
        self._sound = False
        self._length += len(line)
        self._apply(entry)
        self._sound = True

    def _take_back(self, journal: Path) -> None:
        """Cut the journal back to what was committed; where even that fails, nothing more is written."""
        self._sound = False
        with contextlib.suppress(OSError):
            if journal.exists():
                self._disk.truncate(journal, self._length)
            self._sound = True


class StoredVersion:
    """The tensors of one version, mapped from the store's packs."""

    def __init__(self, path: Path, number: int, manifest: Manifest, packs: Packs) -> None:
        self._path, self._number = path, number
        self._manifest, self._packs = manifest, packs

    @property
    def description(self) -> str:
        """The store and the version's number."""
        return f"{self._path} version {self._number}"

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Name -> spec of every tensor."""
        return self._manifest.specs

    def read(self, name: str) -> Array:
        """One tensor, read-only, hashed as it is read; StoreError if there is none, or it is damaged."""
        digest = self._manifest.digests.get(name)
        if digest is None:
            raise StoreError(f"holds no tensor {name!r}", where=self.description)
        damaged = f"tensor {name!r} of version {self._number} is damaged"
        try:
            array = self._packs.read(digest, self._manifest.specs[name].dtype)
        except StoreError as error:
            raise StoreError(f"{damaged}: {error.message}", where=error.where, hint=_DAMAGED) from error
        if tensor_digest(array) != digest:
            raise StoreError(f"{damaged}: its bits are not those that were committed", where=self._path, hint=_DAMAGED)
        return array

    def read_many(self, names: Iterable[str]) -> dict[str, Array]:
        """Several tensors, hashed by many threads; StoreError as for ``read``."""
        wanted = list(names)
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            return dict(zip(wanted, pool.map(self.read, wanted), strict=True))

    def close(self) -> None:
        """Do nothing: the store owns the packs."""


def _digests(arrays: Mapping[str, Array]) -> dict[str, str]:
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return dict(zip(arrays, pool.map(tensor_digest, arrays.values()), strict=True))
