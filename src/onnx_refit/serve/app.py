"""The HTTP application: the protocol, the refit verbs, metrics, the description, the console."""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from importlib.resources import files

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, Router

from onnx_refit.serve import rest_fetch, rest_refit, rest_v2
from onnx_refit.serve.auth import Gatekeeper
from onnx_refit.serve.context import Context
from onnx_refit.serve.gateway import App, Gateway
from onnx_refit.serve.json_response import JsonResponse
from onnx_refit.serve.metrics import CONTENT_TYPE
from onnx_refit.serve.openapi import description


@cache
def _console() -> tuple[str, str]:
    """The console's page, and a policy that lets the browser run exactly its own script and style."""
    page = files("onnx_refit.serve").joinpath("console.html").read_text("utf-8")

    def digest(tag: str) -> str:
        match = re.search(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        text = match.group(1) if match else ""
        return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"

    policy = (
        f"default-src 'none'; script-src {digest('script')}; style-src {digest('style')}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return page, policy


def make_app(context: Context) -> App:
    """The application of one server, as an ASGI callable."""

    async def console(_: Request) -> Response:
        page, policy = _console()
        return Response(page, media_type="text/html", headers={"content-security-policy": policy})

    async def metrics(_: Request) -> Response:
        return Response(context.metrics.text(), media_type=CONTENT_TYPE)

    async def openapi(_: Request) -> Response:
        return JsonResponse(description())

    router = Router(
        [
            *rest_v2.routes(context),
            *rest_refit.routes(context),
            *rest_fetch.routes(context),
            Route("/metrics", metrics),
            Route("/openapi.json", openapi),
            Route("/", console),
        ],
        redirect_slashes=False,
    )

    async def app(scope: object, receive: object, send: object) -> None:
        # With an "app" in its scope the router raises what it cannot route, and the gateway answers in JSON.
        scope["app"] = router  # type: ignore[index]
        await router(scope, receive, send)

    async def unknown(scope: object, receive: object, send: object) -> None:
        raise HTTPException(404, "there is nothing at this path")

    router.default = unknown
    return Gateway(app, Gatekeeper(context.settings), context.metrics, access_log=context.settings.access_log)
