"""Takes a request for a model, waits for a place at one of its engines, and passes bytes both ways untouched.

What an engine says is passed on as it comes, status and headers (but those of one connection) included. A client that
goes away takes its request at the engine with it. An engine that dies before anything of its answer was passed on costs
the client nothing but time: the request goes to another replica, or waits for the restart. Afterwards a stream ends
with an error event.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass
from typing import Final
from urllib.parse import parse_qs

import aiohttp
from starlette.types import Receive, Scope, Send

from elastickv.errors import ElasticKVError
from elastickv.gateway.base import Fleet, Model, Recorder
from elastickv.gateway.body import Asked, BodyMemory, ClientGone, asked_for, header, read_body
from elastickv.gateway.errors import Refused, refusal_of, response_of
from elastickv.gateway.relay import Relay
from elastickv.gateway.upstream import Broken, Upstream, request_headers
from elastickv.gateway.waiting import Lane, Place

__all__ = ["Limits", "Proxy"]

log = logging.getLogger(__name__)

SENT_TWICE: Final = 2
"""A request that was on its way to an engine that died is sent once more and no more: it may be what kills."""
CONNECT_AGAIN_S: Final = 0.1
CLIENT_GONE: Final = 499
"""As nginx notes it; nobody receives it."""
SHOWN_BYTES: Final = 2000
HELD_BODIES: Final = 64
"""As many bodies of the largest size may be in memory at a time."""


@dataclass(frozen=True)
class Limits:
    """What a client may take. Bytes and seconds."""

    max_body: int = 16 * 1024 * 1024
    body_s: float = 120.0
    """For a whole body to arrive."""
    keys_are_ours: bool = False
    """The header Authorization is for the gateway, and engines do not see it."""
    log_requests: bool = False
    """Log each request with the beginning of its body."""


@dataclass
class _Request:
    """One request, read."""

    asked: Asked
    method: str
    target: bytes
    headers: list[tuple[str, str]]
    body: bytes
    target_s: float | None
    began: float


class Proxy:
    """An ASGI application for every path that an engine answers."""

    def __init__(self, fleet: Fleet, recorder: Recorder, upstream: Upstream, limits: Limits) -> None:
        self._fleet, self._recorder, self._upstream, self._limits = fleet, recorder, upstream, limits
        self._memory = BodyMemory(HELD_BODIES * limits.max_body)
        self._lanes: dict[str, Lane] = {}

    async def close(self) -> None:
        """Tells those who wait that there will be no answer."""
        for lane in self._lanes.values():
            await lane.close()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        began = time.monotonic()
        limits, headers = self._limits, scope["headers"]
        try:
            body = await read_body(receive, headers, limits.max_body, limits.body_s, self._memory)
        except ClientGone:
            return
        except Refused as refused:
            await response_of(refused)(scope, receive, send)
            return
        try:
            request = self._read(scope, body, began)
            model = self._model(request.asked.model)
            await self._answer(model, request, scope, receive, send)
        except ElasticKVError as error:
            await response_of(refusal_of(error))(scope, receive, send)
        finally:
            self._memory.give(len(body))

    def _read(self, scope: Scope, body: bytes, began: float) -> _Request:
        query: bytes = scope["query_string"]
        named = parse_qs(query.decode("latin-1")).get("model", [None])[0] if b"model=" in query else None
        asked = asked_for(body, scope["headers"], named)
        raw: bytes = scope["raw_path"]
        target = raw + b"?" + query if query else raw
        headers = request_headers(scope["headers"], without_key=self._limits.keys_are_ours)
        return _Request(asked, scope["method"], target, headers, body, _ttft_target(scope), began)

    def _model(self, name: str) -> Model:
        try:
            return self._fleet.model(name)
        except ElasticKVError as error:
            refused = refusal_of(error)
            if refused.status != 404:
                raise
            raise Refused(refused.message, status=404, code="model_not_found", param="model") from None

    def _lane(self, model: Model) -> Lane:
        lane = self._lanes.get(model.spec.name)
        if lane is None or lane.model is not model:
            lane = self._lanes[model.spec.name] = Lane(model)
        return lane

    async def _answer(self, model: Model, request: _Request, scope: Scope, receive: Receive, send: Send) -> None:
        """Counts the request, and gives it up when the client does."""
        name = model.spec.name
        self._recorder.arrived(name, request.asked.prompt)
        model.on_activity()
        relay = Relay(name, self._recorder, send, request.began)
        me = asyncio.current_task()
        gone = False

        async def watch() -> None:
            nonlocal gone
            while (await receive())["type"] != "http.disconnect":
                pass
            gone = True
            if me is not None:
                me.cancel()

        watcher = asyncio.create_task(watch())
        status = 503
        try:
            await self._forward(model, request, relay)
            status = relay.status
        except asyncio.CancelledError:
            if not gone:  # the server ends, and its patience with those that still run is over
                await relay.give_up("the gateway is ending")
            status = CLIENT_GONE if gone else relay.status
        except ElasticKVError as error:
            status = refusal_of(error).status
            raise
        finally:
            watcher.cancel()
            model.on_activity()
            relay.finished(status)
            if self._limits.log_requests:
                shown = request.body[:SHOWN_BYTES]
                log.info("%s %s: %d after %.3f s: %r", name, scope["path"], status, relay.seconds, shown)

    async def _forward(self, model: Model, request: _Request, relay: Relay) -> None:
        """Until something of an answer has been passed on. Refused with 502 where engines keep dying over it."""
        lane, asked, sent = self._lane(model), request.asked, 0
        target = model.spec.ttft_target if request.target_s is None else request.target_s
        deadline = time.monotonic() + model.spec.queue_deadline
        while True:
            place = await lane.enter(asked.prompt, asked.prompt + asked.answer, target, request.began, deadline)
            try:
                await self._try(lane, place, request, relay)
                return
            except Broken as broken:
                model.unreachable(place.replica, broken.reason)
                sent += broken.sent
                if sent >= SENT_TWICE:
                    raise Refused(
                        f"the engine of model {model.spec.name} failed twice over this request: {broken.reason}",
                        status=502,
                        code="engine_failed",
                    ) from None
                deadline = _next_deadline(model, broken, deadline)
            finally:
                place.leave()
            await asyncio.sleep(CONNECT_AGAIN_S)

    async def _try(self, lane: Lane, place: Place, request: _Request, relay: Relay) -> None:
        began = time.monotonic()
        answer: aiohttp.ClientResponse = await self._upstream.send(
            place.replica.url, request.method, request.target, request.headers, request.body
        )
        try:
            await relay.run(answer)
        finally:
            answer.close()  # a connection whose answer was read to its end has gone back to be used again already
        if relay.first_at is not None:
            lane.service.add(request.asked.prompt, relay.first_at - began)


def _next_deadline(model: Model, broken: Broken, deadline: float) -> float:
    """For the next try: a request whose engine died over it waits anew. Refused (503) where it is over."""
    now = time.monotonic()
    if broken.sent:
        return now + model.spec.queue_deadline
    if now >= deadline:
        text = f"no engine of model {model.spec.name} can be reached: {broken.reason}; try again later"
        raise Refused(text, status=503, code="unreachable", retry_after_s=CONNECT_AGAIN_S)
    return deadline


def _ttft_target(scope: Scope) -> float | None:
    """Seconds, of the header X-TTFT-Target-Ms. Refused (400) for anything but a number of milliseconds."""
    value = header(scope["headers"], b"x-ttft-target-ms")
    if value is None:
        return None
    try:
        target = float(value)
    except ValueError:
        target = -1.0
    if not 0 <= target <= 1e9:
        shown = value[:40].decode("latin-1")
        raise Refused(f"X-TTFT-Target-Ms: {shown!r} is no number of milliseconds", status=400, code="invalid_header")
    return target / 1000
