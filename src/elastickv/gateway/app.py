"""The gateway's application: every route, and what begins and ends with it."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import Final

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import Receive, Scope, Send

from elastickv.errors import ElasticKVError
from elastickv.gateway.admin import Admin, json_response
from elastickv.gateway.auth import Guard, Keys
from elastickv.gateway.base import Fleet, ModelView, Recorder
from elastickv.gateway.body import ClientGone
from elastickv.gateway.errors import Refused, refusal_of, response_of
from elastickv.gateway.openapi import document
from elastickv.gateway.proxy import Limits, Proxy
from elastickv.gateway.states import State
from elastickv.gateway.upstream import Upstream

__all__ = ["BESIDE_V1", "create_app"]

log = logging.getLogger(__name__)

BESIDE_V1: Final = ("/tokenize", "/detokenize", "/pooling", "/classify", "/score", "/rerank")
"""Paths that name a model in their body and that engines serve without /v1."""

_CODES: Final = {404: "not_found", 405: "method_not_allowed"}


class _Engines:
    """The routes' way to the proxy, which is there while the application runs. No function, so that Starlette hands it
    all methods and the bare ASGI call."""

    def __init__(self) -> None:
        self.proxy: Proxy | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.proxy is None or ".." in scope["path"].split("/"):
            refused = Refused(f"there is nothing at {scope['path'][:200]}", status=404, code="not_found")
            await response_of(refused)(scope, receive, send)
        else:
            await self.proxy(scope, receive, send)


class _Views:
    """What the gateway says of itself to everybody."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    def routes(self) -> list[Route]:
        return [
            Route("/v1/models", self._models, methods=["GET"]),
            Route("/v1/models/{name}", self._model, methods=["GET"]),
            Route("/health", self._health, methods=["GET"]),
            Route("/ready", self._ready, methods=["GET"]),
            Route("/openapi.json", self._document, methods=["GET"]),
        ]

    async def _models(self, request: Request) -> Response:
        return json_response({"object": "list", "data": [_listed(view) for view in self._fleet.models()]})

    async def _model(self, request: Request) -> Response:
        return json_response(_listed(self._fleet.model(request.path_params["name"]).view()))

    async def _health(self, request: Request) -> Response:
        return json_response({"status": "ok"})

    async def _ready(self, request: Request) -> Response:
        states = {view.name: view.state.value for view in self._fleet.models()}
        starting = State.STARTING.value in states.values()
        return json_response({"ready": not starting, "models": states}, 503 if starting else 200)

    async def _document(self, request: Request) -> Response:
        return json_response(document())


def create_app(
    fleet: Fleet,
    recorder: Recorder,
    *,
    host: str = "127.0.0.1",
    keys: Keys | None = None,
    limits: Limits | None = None,
    drain_s: float = 30.0,
    routes: Sequence[BaseRoute] = (),
    around: AbstractAsyncContextManager[object] | None = None,
) -> Starlette:
    """An ASGI application. It starts `fleet` when it begins and stops it when it ends, waiting up to `drain_s` seconds.

    `host`: where it will listen. `routes`: more of them; `around`: entered before the fleet starts, left after its end.
    """
    engines = _Engines()

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            if around is not None:
                await stack.enter_async_context(around)
            upstream = Upstream()
            stack.push_async_callback(upstream.close)
            stack.push_async_callback(fleet.stop, drain_s)
            await fleet.start()
            engines.proxy = Proxy(fleet, recorder, upstream, limits or Limits())
            stack.push_async_callback(engines.proxy.close)
            yield

    own = [
        *_Views(fleet).routes(),
        Route("/v1/{path:path}", engines),
        *(Route(path, engines) for path in BESIDE_V1),
        *Admin(fleet).routes(),
    ]
    return Starlette(
        routes=[*own, *routes],
        middleware=[Middleware(Guard, keys=keys or Keys(), host=host)],
        exception_handlers={ElasticKVError: _failed, HTTPException: _no_route, ClientGone: _gone, Exception: _bug},
        lifespan=lifespan,
    )


def _listed(view: ModelView) -> dict[str, object]:
    """As OpenAI lists a model, with its state."""
    known = {"id": view.name, "object": "model", "created": int(view.since), "owned_by": "elastickv"}
    return known | {"state": view.state.value, "reason": view.reason, "queued": view.queued}


async def _failed(request: Request, error: Exception) -> Response:
    if not isinstance(error, ElasticKVError):
        raise error
    return response_of(refusal_of(error))


async def _no_route(request: Request, error: Exception) -> Response:
    if not isinstance(error, HTTPException):
        raise error
    code = _CODES.get(error.status_code, "error")
    text = f"{request.method} {request.url.path[:200]}: {error.detail}"
    answer = response_of(Refused(text, status=error.status_code, code=code))
    answer.headers.update(error.headers or {})
    return answer


async def _gone(request: Request, error: Exception) -> Response:
    return Response(status_code=400)  # to nobody


async def _bug(request: Request, error: Exception) -> Response:
    """Starlette raises it again afterwards, so that the server logs it."""
    return response_of(Refused("the gateway failed; its log says more", status=500, code="internal_error"))
