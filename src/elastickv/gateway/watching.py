"""The gateway's routes for those who watch: the page, its data, /metrics, and limits.

    GET  /               the page; it holds no data, so anybody may have it
    GET  /page/{file}    its script and style
    GET  /metrics        for Prometheus
    GET  /admin/watch    JSON for the page: ?since=N leaves out what it has seen
    POST /admin/limit    {"device": "host", "tenant": "chat", "limit": "2GiB" or null, "now": false}

Who may ask is decided in front of these routes. They raise errors of elastickv's family, for which the application
has answers.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from importlib import resources
from pathlib import Path
from typing import Any, Final

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

import elastickv
from elastickv import _core
from elastickv.errors import DeadlineExceeded, InvalidArgument, NotFound
from elastickv.gateway.admin import BODY_S, MAX_BODY
from elastickv.gateway.base import ModelView
from elastickv.gateway.body import BodyMemory, read_body
from elastickv.gateway.history import History
from elastickv.gateway.metrics import MetricsPage
from elastickv.gateway.stats import Stats
from elastickv.ledger import read_device
from elastickv.ledgers import device_names
from elastickv.limits import LimitOrder, limit_order, place_order, wait_for_order
from elastickv.telemetry.reader import LOCK_DEADLINE_MS
from elastickv.units import parse_size_or_none

__all__ = ["LimitBody", "Watching"]

INTERVAL_S: Final = 1.0
LIMIT_WAIT_S: Final = 5.0
"""How long an order waits for its tenant; the order stands whether or not it answers."""

_KINDS: Final = {"html": "text/html", "js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}
_FILES: Final = ("index.html", "app.js", "panels.js", "chart.js", "format.js", "style.css", "icon.svg")
_HEADERS: Final = {
    # Nothing but what this gateway serves itself; nobody may frame it.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}

_logger = logging.getLogger("elastickv.gateway")


class LimitBody(msgspec.Struct, forbid_unknown_fields=True):
    """Body of POST /admin/limit. `limit`: bytes, a text such as "2GiB" or "none", or null for no limit."""

    device: str
    tenant: str
    limit: int | str | None
    now: bool = False


class Watching:
    """Samples the ledgers while `running`, and answers. Belongs to the event loop; the ledgers are read elsewhere.

    `directory`: of the ledgers. `models`: Fleet.models.
    """

    def __init__(self, directory: Path, models: Callable[[], Sequence[ModelView]], stats: Stats) -> None:
        self._directory = directory
        self._models = models
        self._history = History(directory, stats)
        self._metrics = MetricsPage(directory, stats)
        self._run = secrets.token_hex(8)  # tells the page that the gateway is another one than before
        self._page = _load_page()
        self._memory = BodyMemory(64 * MAX_BODY)

    def routes(self) -> list[Route]:
        """Those of the module's docstring."""
        return [
            Route("/", self._file, methods=["GET"]),
            Route("/page/{name}", self._file, methods=["GET"]),
            Route("/metrics", self._scrape, methods=["GET"]),
            Route("/admin/watch", self._watch, methods=["GET"]),
            Route("/admin/limit", self._limit, methods=["POST"]),
        ]

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Takes a sample every second meanwhile, the first one at once."""
        task = asyncio.create_task(self._sample(), name="elastickv-history")
        task.add_done_callback(_say_why)
        try:
            yield
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    async def _sample(self) -> None:
        while True:
            await asyncio.to_thread(self._history.look, self._models())
            await asyncio.sleep(INTERVAL_S)

    async def _file(self, request: Request) -> Response:
        name = request.path_params.get("name", "index.html")
        if name not in self._page:
            raise NotFound(f"the page has no file {name!r}; it has {', '.join(self._page)}")
        kind = _KINDS[name.rpartition(".")[2]]
        return Response(self._page[name], media_type=kind, headers=_HEADERS)

    async def _scrape(self, request: Request) -> Response:
        accept = request.headers.get("accept", "")
        text, kind = await asyncio.to_thread(self._metrics.render, self._models(), accept)
        return Response(text, headers={"Content-Type": kind})

    async def _watch(self, request: Request) -> Response:
        since = request.query_params.get("since", "0")
        if not (since.isascii() and since.isdecimal()) or len(since) > 15:
            raise InvalidArgument(f"since={since!r}; give the number of the last sample that was seen, or 0 for all")
        seen = {"run": self._run, "version": elastickv.__version__, "interval": INTERVAL_S}
        return _json(seen | self._history.since(int(since)))

    async def _limit(self, request: Request) -> Response:
        body = await read_body(request.receive, request.scope["headers"], MAX_BODY, BODY_S, self._memory)
        self._memory.give(len(body))
        try:
            order = msgspec.json.decode(body, type=LimitBody)
        except (msgspec.DecodeError, ValueError, RecursionError) as error:  # ValueError: not UTF-8
            raise InvalidArgument(f"the body is no order of a limit: {error}") from None
        return _json(await asyncio.to_thread(self._order, order))

    def _order(self, body: LimitBody) -> LimitOrder:
        limit = parse_size_or_none(body.limit, "limit") if isinstance(body.limit, str) else body.limit
        names = device_names(self._directory)
        if body.device not in names:
            raise NotFound(f"no device named {body.device!r} has a ledger; there are: {', '.join(names) or 'none'}")
        ledger = _core.Ledger.open(str(self._directory), body.device, 0, LOCK_DEADLINE_MS)
        revision = place_order(ledger, body.tenant, limit, body.now)
        try:
            return wait_for_order(ledger, body.tenant, revision, LIMIT_WAIT_S)
        except DeadlineExceeded:  # in force for new leases even so: the answer says that it is pending
            return limit_order(read_device(ledger), body.tenant, revision)


def _load_page() -> dict[str, bytes]:
    place = resources.files("elastickv.gateway").joinpath("page")
    return {name: place.joinpath(name).read_bytes() for name in _FILES}


def _json(value: Any) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json", headers={"Cache-Control": "no-store"})


def _say_why(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and task.exception() is not None:
        _logger.error("the page gets no more samples: %r", task.exception())
