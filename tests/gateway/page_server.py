"""The page's routes on a real socket, with models that are only said to be there and tenants on a real ledger."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from elastickv.errors import ElasticKVError, NotFound
from elastickv.gateway.base import ModelView
from elastickv.gateway.states import Move, State
from elastickv.gateway.stats import Stats
from elastickv.gateway.watching import Watching


class Models:
    """Stands in for a fleet: a table of views, whose models sleep and wake when they are told to."""

    def __init__(self, *views: ModelView) -> None:
        self.views = {view.name: view for view in views}
        self.told: list[tuple[str, str]] = []
        self.refuse = ""
        """If not empty, orders fail with this text."""

    def models(self) -> list[ModelView]:
        return list(self.views.values())

    def move(self, name: str, to: State, reason: str) -> None:
        view = self.views[name]
        now = time.time()
        move = Move(view.state, to, reason, now, now - view.since)
        self.views[name] = replace(view, state=to, reason=reason, since=now, moves=(*view.moves, move))

    async def order(self, request: Request) -> Response:
        name, order = request.path_params["name"], request.path_params["order"]
        self.told.append((order, name))
        if self.refuse:
            return JSONResponse({"error": {"message": self.refuse}}, 503)
        self.move(name, State.ASLEEP if order == "sleep" else State.READY, f"told to {order}")
        return Response(status_code=204)


class NeedsKey:
    """What stands in front of /admin where there is a key."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self._app, self._key = app, key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].startswith("/admin") and self._key:
            given = dict(scope["headers"]).get(b"authorization", b"").decode()
            if given != f"Bearer {self._key}":
                answer = JSONResponse({"error": {"message": "wrong or no admin key"}}, 401)
                await answer(scope, receive, send)
                return
        await self._app(scope, receive, send)


async def explain(request: Request, error: Exception) -> Response:
    status = 404 if isinstance(error, NotFound) else 400
    return JSONResponse({"error": {"message": str(error)}}, status)


def application(directory: Path, models: Models, stats: Stats, key: str = "") -> ASGIApp:
    watching = Watching(directory, models.models, stats)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with watching.running():
            yield

    orders = Route("/admin/models/{name}/{order}", models.order, methods=["POST"])
    app = Starlette(
        routes=[*watching.routes(), orders], lifespan=lifespan, exception_handlers={ElasticKVError: explain}
    )
    return NeedsKey(app, key)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def serving(app: ASGIApp, port: int) -> Iterator[str]:
    """Serves in a thread of its own; gives the URL."""
    config = uvicorn.Config(app, "127.0.0.1", port, log_level="warning", timeout_graceful_shutdown=2)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until = time.monotonic() + 30
    while not server.started:
        if time.monotonic() > until or not thread.is_alive():
            raise RuntimeError("the page's server did not start within 30 s")
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        with contextlib.suppress(RuntimeError):
            thread.join(30)
