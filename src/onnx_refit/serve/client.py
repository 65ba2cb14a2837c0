"""A client of the refit verbs. It needs no package beyond the standard library."""

from __future__ import annotations

import hashlib
import http.client
import json
import re
import socket
import ssl
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from onnx_refit.errors import OnnxRefitError
from onnx_refit.files import read_error

_BLOCK = 1 << 20

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""


class ServerError(OnnxRefitError):
    """The server refused, or cannot be reached.

    Args:
        message: what it said.
        status: the HTTP status; 0 where there was no answer.
        body: the whole JSON answer; holds ``report`` where weights were rejected.
        where: the server.
        hint: what to do about it.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 0,
        body: Mapping[str, Any] | None = None,
        where: object = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(message, where=where, hint=hint)
        self.status = status
        self.body = dict(body or {})


@dataclass(frozen=True)
class ServerEvent:
    """One event of a model's stream."""

    number: int
    kind: str
    data: dict[str, Any]


@dataclass(frozen=True)
class _File:
    """A file as a body: the system sends it, where it can, without the bytes coming through here."""

    file: IO[bytes]
    size: int
    progress: Progress | None

    def send(self, connection: socket.socket) -> None:
        done = 0
        while done < self.size:
            sent = connection.sendfile(self.file, done, min(_BLOCK, self.size - done))
            if not sent:
                return  # somebody shortened it meanwhile; the server waits for the rest, and says so
            done += sent
            if self.progress is not None:
                self.progress(done, self.size)


class RefitClient:
    """Stages, commits and rolls back weights on a server.

    Every call opens a connection of its own, so one client may be used from several threads.

    Args:
        url: the server, ``http://127.0.0.1:8000``.
        token: the server's token for refits.
        timeout: seconds to wait for the server between two pieces of data.
        tls: how to check the server's certificate; None checks it as the system does.
    """

    def __init__(
        self,
        url: str = "http://127.0.0.1:8000",
        token: str | None = None,
        *,
        timeout: float = 600.0,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ServerError("this is no http or https URL", where=url)
        self._url, self._parts, self._token, self._timeout, self._tls = url, parts, token, timeout, tls

    # ------------------------------------------------------------------ refit verbs

    def status(self, model: str) -> dict[str, Any]:
        """The versions, what is staged, and how busy the model is."""
        return self._json("GET", _path(model))

    def stage(
        self,
        model: str,
        weights: str | Path,
        *,
        label: str | None = None,
        partial: bool = False,
        allow_nonfinite: bool = False,
        allow_rounding: bool = False,
        measure: bool = False,
        progress: Progress | None = None,
    ) -> dict[str, Any]:
        """Upload a file of weights and stage it; the same file again finds what is staged.

        Args:
            model: the model's name.
            weights: a safetensors, npz or ONNX file.
            label: what the version is to be called in lists; the file's name by default.
            partial: weights that are not given stay as they are.
            allow_nonfinite: NaN and infinities are accepted.
            allow_rounding: a cast may round.
            measure: norms and changes go into the report.
            progress: called while the file travels.

        Raises:
            ReadError: the file cannot be read.
            ServerError: refused; ``body["report"]`` is the check's report where the weights were rejected.
        """
        path = Path(weights)
        flags = {
            "partial": partial,
            "allow_nonfinite": allow_nonfinite,
            "allow_rounding": allow_rounding,
            "measure": measure,
        }
        query = {name: "true" for name, value in flags.items() if value} | {"label": label or _plain(path.name)}
        try:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                size = file.tell()
                file.seek(0)
                headers = {
                    "content-type": "application/octet-stream",
                    "content-length": str(size),
                    "x-content-sha256": digest,
                }
                target = f"{_path(model)}/stage?{urllib.parse.urlencode(query)}"
                return self._json("POST", target, _File(file, size, progress), headers)
        except OSError as error:
            raise read_error(path, error) from error

    def fetch(
        self,
        model: str,
        place: str,
        name: str,
        *,
        sha256: str | None = None,
        label: str | None = None,
        partial: bool = False,
        allow_nonfinite: bool = False,
        allow_rounding: bool = False,
        measure: bool = False,
    ) -> dict[str, Any]:
        """Have the server fetch a file of weights from a place that its operator allows, and stage it.

        Args:
            model: the model's name.
            place: the place's alias.
            name: the file's name there: plain components joined by slashes.
            sha256: of the file, in hex; must be given where the place is reached without TLS.
            label: what the version is to be called in lists; ``place:name`` by default.
            partial: see ``stage``; and so the others.
            allow_nonfinite: NaN and infinities are accepted.
            allow_rounding: a cast may round.
            measure: norms and changes go into the report.

        Raises:
            ServerError: refused, or the place cannot be reached.
        """
        flags = {
            "partial": partial,
            "allow_nonfinite": allow_nonfinite,
            "allow_rounding": allow_rounding,
            "measure": measure,
        }
        given = {"sha256": sha256, "label": label}
        body = {"from": place, "name": name, **{k: v for k, v in given.items() if v is not None}}
        return self._json("POST", _path(model, "fetch"), body | {k: v for k, v in flags.items() if v})

    def places(self, model: str) -> list[str]:
        """The aliases of the places that weights may be fetched from."""
        return list(self._json("GET", _path(model, "fetch"))["from"])

    def staged(self, model: str, identifier: str) -> dict[str, Any]:
        """A staged weight set, with the report of its check."""
        return self._json("GET", _path(model, "staged", identifier))

    def canary(
        self,
        model: str,
        identifier: str,
        inputs: list[dict[str, Any]],
        expect: list[dict[str, Any]] | None = None,
        *,
        rtol: float = 1e-4,
        atol: float = 1e-5,
    ) -> dict[str, Any]:
        """Run golden inputs on a staged set; tensors are in the protocol's JSON form. ServerError if refused."""
        body: dict[str, Any] = {"inputs": inputs, "rtol": rtol, "atol": atol}
        if expect is not None:
            body["expect"] = expect
        return self._json("POST", _path(model, "staged", identifier, "canary"), body)

    def commit(self, model: str, identifier: str, *, require_canary: bool = False) -> dict[str, Any]:
        """Publish a staged set; again, the same account."""
        return self._json("POST", _path(model, "staged", identifier, "commit"), {"require_canary": require_canary})

    def discard(self, model: str, identifier: str) -> dict[str, Any]:
        """Drop a staged set."""
        return self._json("DELETE", _path(model, "staged", identifier))

    def rollback(self, model: str, to: int | None = None) -> dict[str, Any]:
        """Publish an earlier version again; the one before the current by default."""
        return self._json("POST", _path(model, "rollback"), {} if to is None else {"to": to})

    def delete(self, model: str, version: int) -> dict[str, Any]:
        """Free an earlier version."""
        return self._json("DELETE", _path(model, "versions", str(version)))

    def diff(self, model: str, before: int, after: int) -> dict[str, Any]:
        """How far each weight moved between two held versions."""
        return self._json("GET", f"{_path(model, 'diff')}?from={before}&to={after}")

    def split(self, model: str, weights: Mapping[int, float]) -> dict[str, Any]:
        """Split the traffic that names no version; an empty mapping ends the split."""
        return self._json("PUT", _path(model, "traffic"), {str(version): share for version, share in weights.items()})

    def models(self) -> list[str]:
        """The models of the server."""
        return list(self._json("GET", "/v2/models")["models"])

    def events(self, model: str, *, after: int | None = None) -> Iterator[ServerEvent]:
        """Follow a model's events, from a number on or from now on, until the server ends the stream."""
        headers = {} if after is None else {"last-event-id": str(after)}
        connection, response = self._send("GET", _path(model, "events"), None, headers)
        try:
            if response.status != 200:
                raise self._refusal(response)
            fields: dict[str, str] = {}
            for line in response:
                text = line.decode().rstrip("\r\n")
                if text:
                    name, _, value = text.partition(":")
                    fields[name] = value.removeprefix(" ")
                elif "data" in fields:
                    yield ServerEvent(int(fields.get("id", 0)), fields.get("event", ""), json.loads(fields["data"]))
                    fields = {}
        finally:
            connection.close()

    # ------------------------------------------------------------------ transport

    def _json(
        self, method: str, target: str, body: object = None, headers: Mapping[str, str] | None = None
    ) -> dict[str, Any]:
        if isinstance(body, dict):
            body, headers = json.dumps(body).encode(), {"content-type": "application/json"}
        connection, response = self._send(method, target, body, headers or {})
        try:
            if response.status >= 400:
                raise self._refusal(response)
            answer: dict[str, Any] = json.loads(response.read())
            return answer
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise ServerError(f"the answer broke off: {error}", where=self._url) from error
        finally:
            connection.close()

    def _send(
        self, method: str, target: str, body: Any, headers: Mapping[str, str]
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        host, port = self._parts.hostname or "", self._parts.port
        connection: http.client.HTTPConnection
        if self._parts.scheme == "https":
            connection = http.client.HTTPSConnection(host, port, timeout=self._timeout, context=self._tls)
        else:
            connection = http.client.HTTPConnection(host, port, timeout=self._timeout)
        sent = dict(headers)
        if self._token is not None:
            sent["authorization"] = f"Bearer {self._token}"
        try:
            try:
                path = self._parts.path.rstrip("/") + target
                if isinstance(body, _File):
                    connection.putrequest(method, path)
                    for name, value in sent.items():
                        connection.putheader(name, value)
                    connection.endheaders()
                    body.send(connection.sock)
                else:
                    connection.request(method, path, body=body, headers=sent)
            except BrokenPipeError:
                # The server answered before it had the whole body, with a refusal that is worth reading.
                if connection.sock is None:
                    raise
            return connection, connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            raise ServerError(
                f"the server cannot be reached: {error}",
                where=self._url,
                hint="Is it running, and is this its address?",
            ) from error

    def _refusal(self, response: http.client.HTTPResponse) -> ServerError:
        raw = response.read()
        try:
            body = json.loads(raw)
            message = body["error"]
        except (ValueError, KeyError, TypeError):
            body, message = {}, raw[:200].decode("utf-8", "replace") or response.reason
        return ServerError(f"{message} ({response.status})", status=response.status, body=body, where=self._url)


def _plain(name: str) -> str:
    """A file's name as a label: the server takes only what can stand in a log line."""
    return re.sub(r"[^\w .,:+@=/-]", "_", name)[:120]


def _path(model: str, *parts: str) -> str:
    return "/".join(["/v2/models", *(urllib.parse.quote(part, safe="") for part in (model, "refit", *parts))])
