"""A JSON response that writes NumPy values as they are."""

from __future__ import annotations

from typing import Any

import orjson
from starlette.responses import Response


class JsonResponse(Response):  # type: ignore[misc]  # Starlette is not in the environment of the type check
    """Data as JSON."""

    media_type = "application/json"

    def __init__(self, data: Any, status: int = 200) -> None:
        super().__init__(orjson.dumps(data, option=orjson.OPT_SERIALIZE_NUMPY), status_code=status)
