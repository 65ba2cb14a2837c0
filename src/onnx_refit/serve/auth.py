"""Who may do what: bearer tokens, compared in constant time."""

from __future__ import annotations

import hmac
from enum import Enum

from onnx_refit.serve.errors import ServeError
from onnx_refit.serve.settings import Settings


class Need(Enum):
    """What a request must prove."""

    NOTHING = "nothing"
    INFER = "infer"
    ADMIN = "admin"


# Health for load balancers, and a page and a description that hold nothing of the models.
_PUBLIC = frozenset({"/", "/v2/health/live", "/v2/health/ready", "/openapi.json"})


def need_of(path: str) -> Need:
    """What a request to a path must prove. Paths that are not known need the most."""
    if path in _PUBLIC:
        return Need.NOTHING
    parts = path.split("/")
    if path == "/metrics" or path == "/v2" or path == "/v2/models" or path == "/v2/repository/index":
        return Need.INFER
    if parts[1:3] == ["v2", "models"] and "refit" not in parts[4:5]:
        return Need.INFER
    return Need.ADMIN


class Gatekeeper:
    """Checks tokens against the settings."""

    def __init__(self, settings: Settings) -> None:
        self._admin = None if settings.admin_token is None else settings.admin_token.encode()
        self._infer = None if settings.infer_token is None else settings.infer_token.encode()

    def require(self, need: Need, authorization: bytes | None) -> None:
        """Let a request pass.

        Args:
            need: what it must prove.
            authorization: the header of that name.

        Raises:
            ServeError: 401 without a token, 403 with a wrong one or where the server has none.
        """
        if need is Need.NOTHING or (need is Need.INFER and self._infer is None):
            return
        if need is Need.ADMIN and self._admin is None:
            raise ServeError(403, "this server was started without a token, so it takes no refits")
        if authorization is None:
            raise ServeError(401, "a token is needed", hint="Send it as: Authorization: Bearer TOKEN")
        scheme, _, given = authorization.partition(b" ")
        given = given.strip() if scheme.lower() == b"bearer" else b""
        allowed = [self._admin] if need is Need.ADMIN else [self._admin, self._infer]
        # Every comparison is made, so that the time says nothing about which token it was nearly.
        matches = [hmac.compare_digest(given, token) for token in allowed if token is not None]
        if not any(matches):
            raise ServeError(403, "the token is not valid for this")
