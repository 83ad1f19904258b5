"""A program that serves like an engine and does as it is told: it starts slowly, fails, hangs, sleeps, dies.

    python engine_program.py --port 8001 --model chat [--fail] [--never-ready] [--slow-start 2] [--static 16MiB]

It answers /health, /v1/models, /v1/completions and /v1/chat/completions (streamed or not), /v1/embeddings, /sleep,
/wake_up and /is_sleeping. An answer has `max_tokens` (default 4) words, one every `pace` seconds.

POST /tell {"pace": 0.1, "hang": true, ...} changes how it goes on (see TOLD), GET /told says what it has seen (see
seen). Started by the gateway (ELASTICKV=1) it is a tenant of the ledger with `--static` bytes of weights, which it
gives back when it sleeps and leases, waiting its turn, when it wakes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from elastickv.config import Settings, is_enabled
from elastickv.errors import ElasticKVError
from elastickv.memory import Tenancy
from elastickv.units import parse_size

TOLD: dict[str, Any] = {
    "pace": 0.0,  # seconds between two words
    "health": 200,  # what /health answers
    "hang": False,  # accept requests and never answer, /health too
    "die_after": None,  # words until the process kills itself, in the middle of an answer
    "status": 200,  # what completions answer; anything but 200 comes with an error body
    "sleep_fails": False,
    "wake_fails": False,
    "wake_takes": 0.0,
}


class Weights:
    """The tenant on the ledger, if the process is managed."""

    def __init__(self, size: int, wait_s: float | None) -> None:
        self.size = size
        self.tenancy: Tenancy | None = None
        if is_enabled():
            settings = Settings.load()
            self.wait_s = settings.start_wait if wait_s is None else wait_s
            self.device = "host" if settings.device == "auto" else settings.device
            self.tenancy = Tenancy.join(settings, [self.device], engine="program 1.0")
            self.take()

    def take(self) -> None:
        if self.tenancy is not None:
            self.tenancy.set_static({self.device: self.size}, self.wait_s, "weights", print, lambda: None)
            self.tenancy.tenants[self.device].describe(engine="program 1.0")

    def give(self) -> None:
        if self.tenancy is not None:
            self.tenancy.set_static({self.device: 0}, 0.0, "weights", print, lambda: None)
            self.tenancy.tenants[self.device].describe(engine="program 1.0, asleep: weights")

    def close(self) -> None:
        if self.tenancy is not None:
            self.tenancy.close()


class Program:
    """The engine's state. `seen`: requests begun, ended, given up by the client, and the bodies' and headers' last."""

    def __init__(self, name: str, weights: Weights, never_ready: bool) -> None:
        self.name = name
        self.weights = weights
        self.told = dict(TOLD)
        self.asleep = False
        self.never_ready = never_ready
        self.seen: dict[str, Any] = {"begun": 0, "ended": 0, "given_up": 0, "words": 0, "pid": os.getpid()}

    async def health(self, _: Request) -> Response:
        await self._maybe_hang()
        return Response(status_code=503 if self.never_ready else self.told["health"])

    async def models(self, _: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": self.name, "object": "model"}]})

    async def tell(self, request: Request) -> Response:
        self.told |= await request.json()
        return JSONResponse(self.told)

    async def what(self, _: Request) -> Response:
        return JSONResponse(self.seen | {"asleep": self.asleep, "environment": dict(os.environ), "argv": sys.argv[1:]})

    async def sleep(self, _: Request) -> Response:
        if self.told["sleep_fails"]:
            return JSONResponse({"error": "told to fail"}, 500)
        self.weights.give()
        self.asleep = True
        return JSONResponse({"status": "sleeping"})

    async def wake_up(self, _: Request) -> Response:
        await asyncio.sleep(self.told["wake_takes"])
        if self.told["wake_fails"]:
            return JSONResponse({"error": "told to fail"}, 500)
        try:
            await asyncio.to_thread(self.weights.take)
        except ElasticKVError as error:
            return JSONResponse({"error": error.message}, 500)
        self.asleep = False
        return JSONResponse({"status": "awake"})

    async def is_sleeping(self, _: Request) -> Response:
        return JSONResponse({"is_sleeping": self.asleep})

    async def complete(self, request: Request) -> Response:
        body = await request.body()
        self.seen |= {
            "body": body.decode("utf-8", "replace"),
            "headers": dict(request.headers),
            "path": str(request.url),
        }
        self.seen["begun"] += 1
        await self._maybe_hang()
        if self.told["status"] != 200 or self.asleep:
            status = 500 if self.asleep else self.told["status"]
            return JSONResponse({"error": {"message": "no", "type": "program", "code": status}}, status)
        asked = json.loads(body or b"{}")
        words = int(asked.get("max_tokens") or 4)
        chat = "chat" in request.url.path
        if asked.get("stream"):
            ids = {"token_ids": [7]} if asked.get("return_token_ids") else {}
            return StreamingResponse(self._stream(words, chat, ids), media_type="text/event-stream")
        for _ in range(words):
            await self._word()
        self.seen["ended"] += 1
        text = "word " * words
        choice = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
        return JSONResponse(
            {
                "id": "program-1",
                "object": "chat.completion" if chat else "text_completion",
                "created": int(time.time()),
                "model": self.name,
                "choices": [{"index": 0, "finish_reason": "length", **choice}],
                "usage": {"prompt_tokens": 1, "completion_tokens": words, "total_tokens": words + 1},
            }
        )

    async def _stream(self, words: int, chat: bool, more: dict[str, Any]) -> AsyncIterator[bytes]:
        try:
            for _ in range(words):
                await self._word()
                part = {"delta": {"content": "word "}} if chat else {"text": "word "}
                kind = "chat.completion.chunk" if chat else "text_completion"
                piece = {"id": "program-1", "object": kind, "created": int(time.time()), "model": self.name}
                yield f"data: {json.dumps({**piece, 'choices': [{'index': 0, **part, **more}]})}\n\n".encode()
            yield b"data: [DONE]\n\n"
            self.seen["ended"] += 1
        except (asyncio.CancelledError, GeneratorExit):
            self.seen["given_up"] += 1
            raise

    async def _word(self) -> None:
        if self.told["pace"]:
            await asyncio.sleep(self.told["pace"])
        self.seen["words"] += 1
        if self.told["die_after"] is not None and self.seen["words"] >= self.told["die_after"]:
            os.kill(os.getpid(), signal.SIGKILL)

    async def _maybe_hang(self) -> None:
        while self.told["hang"]:
            await asyncio.sleep(0.05)

    async def embed(self, request: Request) -> Response:
        self.seen["body"] = (await request.body()).decode("utf-8", "replace")
        data = [{"object": "embedding", "index": 0, "embedding": [0.5, 0.25]}]
        usage = {"prompt_tokens": 1, "total_tokens": 1}
        return JSONResponse({"object": "list", "data": data, "model": self.name, "usage": usage})

    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/health", self.health),
                Route("/told", self.what),
                Route("/tell", self.tell, methods=["POST"]),
                Route("/sleep", self.sleep, methods=["POST"]),
                Route("/wake_up", self.wake_up, methods=["POST"]),
                Route("/is_sleeping", self.is_sleeping),
                Route("/v1/models", self.models),
                Route("/v1/completions", self.complete, methods=["POST"]),
                Route("/v1/chat/completions", self.complete, methods=["POST"]),
                Route("/v1/embeddings", self.embed, methods=["POST"]),
            ]
        )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--model", default="program")
    parser.add_argument("--static", default="0")
    parser.add_argument("--wait", type=float, default=None)
    parser.add_argument("--fail", action="store_true")
    parser.add_argument("--fail-while", default="", help="a file; the start fails while it exists")
    parser.add_argument("--never-ready", action="store_true")
    parser.add_argument("--slow-start", type=float, default=0.0)
    parser.add_argument("--ignore-term", action="store_true")
    given = parser.parse_args()
    if given.fail or (given.fail_while and Path(given.fail_while).exists()):
        print("cannot find the weights\nnothing to serve", file=sys.stderr, flush=True)
        sys.exit(3)
    weights = Weights(parse_size(given.static), given.wait)
    time.sleep(given.slow_start)
    program = Program(given.model, weights, given.never_ready)
    print(f"serving {given.model} on {given.port}", flush=True)
    config = uvicorn.Config(
        program.app(), host="127.0.0.1", port=given.port, log_level="warning", access_log=False, lifespan="off"
    )
    server = uvicorn.Server(config)
    if given.ignore_term:
        server.handle_exit = lambda *_: None  # type: ignore[method-assign]
    server.run()
    weights.close()


if __name__ == "__main__":
    main()
