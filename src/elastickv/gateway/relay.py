"""Passes one answer of an engine on to the client, chunk by chunk as it comes, and measures it on the way."""

from __future__ import annotations

import re
import time
from typing import Final

import aiohttp
from starlette.types import Send

from elastickv.errors import Unavailable
from elastickv.gateway.base import Recorder
from elastickv.gateway.errors import Refused, error_event
from elastickv.gateway.upstream import Broken, passed_on

__all__ = ["Relay"]

HELD_BYTES: Final = 1024 * 1024
"""An answer that is no stream and not longer is passed on once it is complete, so that it can still fail cleanly."""
TAIL_BYTES: Final = 64
ENGINE_FAILED: Final = 502

_USAGE: Final = re.compile(rb'"(?:completion_tokens|output_tokens)"\s*:\s*(\d{1,9})')
"""In a text that a model wrote the quotes would stand behind backslashes."""


class Relay:
    """One request's way back. `send` is ASGI's."""

    def __init__(self, model: str, recorder: Recorder, send: Send, began: float) -> None:
        self._model, self._recorder, self._send, self._began = model, recorder, send, began
        self.status = 0
        """What the client got, or 502 where it got the beginning of an answer that broke off."""
        self.seconds = 0.0
        self.first_at: float | None = None
        """Of time.monotonic(): when the first part of a streamed answer was passed on."""
        self._last_at = 0.0
        self._tokens: int | None = None
        self._events = 0
        self._tail = b""
        self._streamed = self._begun = False

    async def run(self, answer: aiohttp.ClientResponse) -> None:
        """To the answer's end. Broken where the engine failed before anything was passed on."""
        self.status = answer.status
        self._streamed = answer.content_type == "text/event-stream"
        head = {
            "type": "http.response.start",
            "status": answer.status,
            "headers": passed_on([(name.lower(), value) for name, value in answer.raw_headers]),
        }
        length = answer.content_length
        if not self._streamed and length is not None and length <= HELD_BYTES:
            await self._whole(answer, head)
        else:
            await self._parts(answer, head)

    async def give_up(self, reason: str) -> None:
        """Ends an answer that has begun like one that broke off. Unavailable where none has begun."""
        if not self._begun:
            raise Unavailable(f"{reason}; try again in a moment")
        await self._broke(reason)

    def finished(self, status: int) -> None:
        """Tells the recorder."""
        now = time.monotonic()
        self.seconds = now - self._began
        tokens = self._events if self._tokens is None else self._tokens
        decode = 0.0 if self.first_at is None else self._last_at - self.first_at
        if tokens > self._events:
            self._recorder.produced(self._model, tokens - self._events)
        self._recorder.finished(self._model, self.seconds, tokens, status, decode)

    async def _whole(self, answer: aiohttp.ClientResponse, head: dict[str, object]) -> None:
        try:
            body = await answer.read()
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise Broken(f"the answer broke off: {error}", sent=True) from None
        self._look(body)
        self._begun = True
        await self._send(head)
        await self._send({"type": "http.response.body", "body": body})

    async def _parts(self, answer: aiohttp.ClientResponse, head: dict[str, object]) -> None:
        try:
            async for chunk in answer.content.iter_any():
                if not self._begun:
                    self._begun = True
                    await self._send(head)
                await self._send({"type": "http.response.body", "body": chunk, "more_body": True})
                self._note(chunk)
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            if not self._begun:
                raise Broken(f"the answer broke off: {error}", sent=True) from None
            reason = str(error) or type(error).__name__
            await self._broke(f"the engine of model {self._model} failed in the midst of the answer: {reason}")
            return
        if not self._begun:
            self._begun = True
            await self._send(head)
        await self._send({"type": "http.response.body", "body": b""})

    async def _broke(self, reason: str) -> None:
        """Ends a stream with an error event. Where that is not possible the connection is cut: what came looks then as
        incomplete as it is."""
        self.status = ENGINE_FAILED
        if not self._streamed or not self._tail.endswith((b"\n\n", b"\r\n\r\n")):
            return  # the server closes a connection whose answer was not completed
        refused = Refused(reason, status=ENGINE_FAILED, code="engine_failed")
        await self._send({"type": "http.response.body", "body": error_event(refused)})

    def _note(self, chunk: bytes) -> None:
        self._last_at = time.monotonic()
        if self._streamed and self.first_at is None:
            self.first_at = self._last_at
            if self.status == 200:
                self._recorder.first_byte(self._model, self._last_at - self._began)
        if self._streamed:
            events = chunk.count(b"data: {")
            self._events += events
            self._recorder.produced(self._model, events)
        self._look(chunk)

    def _look(self, chunk: bytes) -> None:
        """For the number of tokens that the engine counted; also where it stands across two chunks."""
        if b"_tokens" in chunk or self._tail:
            found = _USAGE.findall(self._tail + chunk)
            if found:
                self._tokens = int(found[-1])
        self._tail = chunk[-TAIL_BYTES:] if len(chunk) >= TAIL_BYTES else (self._tail + chunk)[-TAIL_BYTES:]
