"""What an operator may choose about a server."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from onnx_refit.serve.errors import SettingsError
from onnx_refit.serve.origins import Origin

MIB = 1 << 20


@dataclass(frozen=True)
class Limits:
    """Bounds on what clients may use.

    Attributes:
        body_bytes: largest body of a request other than an upload, before and after decompression.
        upload_bytes: largest upload of weights.
        header_bytes: largest request line and headers together.
        connections: HTTP connections and running requests at a time.
        queue: inference requests of one model that may wait.
        request_seconds: default and largest deadline of an inference, and the time to receive its body.
        header_seconds: time to receive the headers of a first request.
        upload_seconds: time to receive an upload.
        staged: staged weight sets of one model at a time.
        staged_seconds: after so long a staged weight set that nobody committed is discarded.
    """

    body_bytes: int = 64 * MIB
    upload_bytes: int = 64 * 1024 * MIB
    header_bytes: int = 64 * 1024
    connections: int = 1024
    queue: int = 256
    request_seconds: float = 60.0
    header_seconds: float = 10.0
    upload_seconds: float = 3600.0
    staged: int = 4
    staged_seconds: float = 3600.0


@dataclass(frozen=True)
class Batching:
    """Dynamic batching.

    Attributes:
        rows: largest batch, in rows of the first dimension; 1 turns batching off.
        delay_seconds: how long the first request of a batch may wait for others while an instance is idle. With 0 an
            idle instance never waits, and batches form from what arrives while all are busy.
    """

    rows: int = 1
    delay_seconds: float = 0.0


@dataclass(frozen=True)
class Tls:
    """Certificate and key, PEM files."""

    certificate: Path
    key: Path


@dataclass(frozen=True)
class Settings:
    """All settings of a server.

    Attributes:
        host: address to listen on.
        port: HTTP port; 0 takes a free one.
        grpc_port: gRPC port; 0 takes a free one, None serves no gRPC.
        admin_token: needed for refit verbs, loading and unloading; None refuses these verbs.
        infer_token: needed for inference and metadata; None lets anybody. The admin token is good for it too.
        tls: certificate and key for both ports.
        limits: bounds on what clients may use.
        batching: dynamic batching, for every model whose rows are independent.
        instances: inferences of one model that run at a time.
        drain_seconds: how long a stopping server lets running requests finish.
        spool: directory for uploads; None makes a temporary one.
        memory: directory in which every model remembers what was staged and committed, so that a client can ask
            again after a restart; None remembers nothing.
        access_log: write a log line for every request.
        weights_from: alias -> a place that clients may point to for weights.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    grpc_port: int | None = None
    admin_token: str | None = field(default=None, repr=False)
    infer_token: str | None = field(default=None, repr=False)
    tls: Tls | None = None
    limits: Limits = Limits()
    batching: Batching = Batching()
    instances: int = 1
    drain_seconds: float = 30.0
    spool: Path | None = None
    memory: Path | None = None
    access_log: bool = True
    weights_from: Mapping[str, Origin] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """SettingsError for a token that is guessed too easily, or bounds that allow nothing."""
        for token in (self.admin_token, self.infer_token):
            if token is not None and len(token) < 16:
                raise SettingsError("a token must have at least 16 characters", hint="openssl rand -hex 32 makes one")
        if self.instances < 1 or self.batching.rows < 1 or self.limits.queue < 1:
            raise SettingsError("instances, batch rows and queue must be at least 1")

    @property
    def loopback(self) -> bool:
        """Whether only this machine can connect."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False
