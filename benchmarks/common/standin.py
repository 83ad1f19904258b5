"""A stand-in for an engine: it batches, decodes and serves as vLLM does, with waiting in place of a model.

Its memory is real: managed (started by `elastickv run`) its blocks are an elastic cache on the host, plain they are an
array. Each token is computed from what stands in the request's blocks, so that lost memory changes the answers. With
it every benchmark runs in seconds on any machine; its figures say nothing about a model's speed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
import zlib
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

import elastickv
from elastickv.config import Settings

BLOCK_TOKENS = 16
BLOCK_BYTES = 64 * 1024
TOKEN_BYTES = BLOCK_BYTES // BLOCK_TOKENS
STEP_S = 0.001
"""A step's time, and SEQUENCE_S for each request in it, PREFILL_S for each token of a prompt."""
SEQUENCE_S = 0.00005
PREFILL_S = 0.00001
ASK_AGAIN_S = 0.005
"""After "none now", unless a request of its own has ended since."""


@dataclass
class Sequence:
    prompt: list[int]
    answer: int
    out: asyncio.Queue[int] = field(default_factory=asyncio.Queue)
    blocks: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    sent: int = 0
    gone: bool = False

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.tokens)


class PlainBlocks:
    """A fixed number of blocks in one array."""

    def __init__(self, count: int) -> None:
        self._memory = np.zeros(count * BLOCK_BYTES, np.uint8)
        self._free = deque(range(count))
        self.total = count

    def array(self) -> Any:
        return self._memory

    def alloc(self, n: int) -> list[int] | None:
        return [self._free.popleft() for _ in range(n)] if n <= len(self._free) else None

    def free(self, ids: list[int]) -> None:
        self._free.extend(ids)


class ElasticBlocks:
    """Blocks of an elastic cache, as the settings of `elastickv run` have them."""

    def __init__(self, caching: bool) -> None:
        settings = Settings.load()
        self._caching = caching
        device = elastickv.open_device(settings.device, capacity=settings.capacity, directory=str(settings.directory))
        self.total = device.view().capacity // BLOCK_BYTES
        # Those that run are not kept waiting while neighbours answer: whoever was refused asks again.
        member = device.join(settings.tenant_name, give_back_wait=0)
        self._cache = member.cache(num_blocks=self.total, block_bytes=BLOCK_BYTES)

    def array(self) -> Any:
        return np.from_dlpack(self._cache).view(np.uint8)

    def alloc(self, n: int) -> list[int] | None:
        return self._cache.alloc(n)

    def free(self, ids: list[int]) -> None:
        self._cache.free(ids, cached=self._caching)


class Standin:
    """The engine: one task that steps, requests that wait for their tokens."""

    def __init__(self, blocks: PlainBlocks | ElasticBlocks, most: int) -> None:
        self._blocks = blocks
        self._memory = blocks.array()
        self._most = most
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        self._bell = asyncio.Event()
        self._ask_again = 0.0

    def add(self, sequence: Sequence) -> None:
        if -(-(len(sequence.prompt) + sequence.answer) // BLOCK_TOKENS) >= self._blocks.total:
            raise ValueError(f"a request of {len(sequence.prompt)}+{sequence.answer} tokens does not fit in the cache")
        self._waiting.append(sequence)
        self._bell.set()

    async def serve(self) -> None:
        while True:
            if not self._waiting and not self._running:
                self._bell.clear()
                await self._bell.wait()
            began = time.monotonic()
            seconds = self._step()
            await asyncio.sleep(max(0.0, began + seconds - time.monotonic()))

    def _step(self) -> float:
        """Admits what fits, one token for each that runs; the seconds that a model would take."""
        prefilled = 0
        for sequence in [one for one in self._running if one.gone]:
            self._end(sequence)
        while self._waiting and len(self._running) < self._most and self._admit(self._waiting[0]):
            prefilled += len(self._waiting.popleft().prompt)
        for sequence in list(self._running):
            self._decode(sequence)
        return STEP_S + len(self._running) * SEQUENCE_S + prefilled * PREFILL_S

    def _admit(self, sequence: Sequence) -> bool:
        """With all the blocks that it will need, so that none has to be put back to wait."""
        if time.monotonic() < self._ask_again:
            return False
        ids = self._blocks.alloc(-(-(len(sequence.prompt) + sequence.answer) // BLOCK_TOKENS))
        if ids is None:
            self._ask_again = time.monotonic() + ASK_AGAIN_S
            return False
        sequence.blocks = ids
        for place, token in enumerate(sequence.prompt):
            self._write(sequence, place, token)
        self._running.append(sequence)
        return True

    def _decode(self, sequence: Sequence) -> None:
        state, left = 0, sequence.length
        for block in sequence.blocks:
            rows = self._memory[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES].reshape(BLOCK_TOKENS, TOKEN_BYTES)
            state = zlib.crc32(rows[:left, :4].tobytes(), state)
            left = max(0, left - BLOCK_TOKENS)
        token = 2 + state % 250
        self._write(sequence, sequence.length, token)
        sequence.tokens.append(token)
        sequence.out.put_nowait(token)
        if len(sequence.tokens) == sequence.answer:
            self._end(sequence)

    def _end(self, sequence: Sequence) -> None:
        self._ask_again = 0.0
        self._running.remove(sequence)
        self._blocks.free(sequence.blocks)
        sequence.blocks = []

    def _write(self, sequence: Sequence, place: int, token: int) -> None:
        start = sequence.blocks[place // BLOCK_TOKENS] * BLOCK_BYTES + place % BLOCK_TOKENS * TOKEN_BYTES
        self._memory[start : start + 4] = np.frombuffer(token.to_bytes(4, "little"), np.uint8)


def application(options: argparse.Namespace) -> Starlette:
    """The server, with the two paths that benchmarks use."""
    managed = Settings.load().enabled
    engines: list[Standin] = []

    @asynccontextmanager
    async def life(_: Starlette) -> AsyncIterator[None]:
        blocks = ElasticBlocks(options.caching) if managed else PlainBlocks(options.kv_bytes // BLOCK_BYTES)
        engines.append(Standin(blocks, options.seqs))
        task = asyncio.create_task(engines[0].serve())
        yield
        task.cancel()

    async def health(_: Request) -> Response:
        return Response()

    async def completions(request: Request) -> Response:
        body = await request.json()
        sequence = Sequence(body["prompt"], body["max_tokens"])
        try:
            engines[0].add(sequence)
        except ValueError as error:
            return JSONResponse({"error": str(error)}, 400)
        return StreamingResponse(_events(sequence), media_type="text/event-stream")

    routes = [Route("/health", health), Route("/v1/completions", completions, methods=["POST"])]
    return Starlette(routes=routes, lifespan=life)


async def _events(sequence: Sequence) -> AsyncIterator[str]:
    try:
        for _ in range(sequence.answer):
            token = await sequence.out.get()
            yield f"data: {json.dumps({'choices': [{'index': 0, 'text': '', 'token_ids': [token]}]})}\n\n"
        yield "data: [DONE]\n\n"
    finally:
        sequence.gone = True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model")
    parser.add_argument("--served-model-name")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--kv-bytes", type=int, default=16 << 20)
    parser.add_argument("--seqs", type=int, default=16)
    parser.add_argument("--caching", action="store_true")
    options = parser.parse_args()
    uvicorn.run(application(options), host=options.host, port=options.port, log_level="warning", lifespan="on")


if __name__ == "__main__":
    main()
