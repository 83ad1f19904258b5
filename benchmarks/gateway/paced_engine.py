"""Stands in for an engine: it answers completions by the clock and costs as little as it can.

    python benchmarks/gateway/paced_engine.py

The first event of a stream comes FIRST_S after the request, the others PACE_S apart; each says when it was written, by
the clock that all processes of a machine share. A prompt of one token is answered with one event and then silence,
until the client goes. GET /streams tells how many streams are open. It prints its port.
"""

from __future__ import annotations

import asyncio
import json
import socket
import time
from typing import Any

import uvicorn
import uvloop

FIRST_S = 0.02
PACE_S = 0.01


class Engine:
    def __init__(self) -> None:
        self.streams = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        if scope["path"] != "/v1/completions":
            await self._say(send, b"%d" % self.streams if scope["path"] == "/streams" else b"{}")
            return
        asked = json.loads(body)
        self.streams += 1
        try:
            await self._stream(asked, receive, send)
        finally:
            self.streams -= 1

    async def _stream(self, asked: dict[str, Any], receive: Any, send: Any) -> None:
        headers = [(b"content-type", b"text/event-stream")]
        due = time.monotonic() + FIRST_S
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for number in range(asked["max_tokens"]):
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            due += PACE_S
            at = time.monotonic()
            event = b'data: {"at": %.6f, "choices": [{"text": " word", "token_ids": [%d]}]}\n\n' % (at, number)
            await send({"type": "http.response.body", "body": event, "more_body": True})
            if len(asked["prompt"]) == 1:
                while (await receive())["type"] != "http.disconnect":
                    pass
                return
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})

    async def _say(self, send: Any, body: bytes) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
        await send({"type": "http.response.body", "body": body})


async def serve() -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=4096) as listening:
        print(listening.getsockname()[1], flush=True)
        config = uvicorn.Config(Engine(), log_level="warning", access_log=False, lifespan="off", backlog=4096)
        await uvicorn.Server(config).serve([listening])


if __name__ == "__main__":
    uvloop.run(serve())
