"""Bursts of prompts against the demo's engines, and what became of each request."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from elastickv.demo.engines import Engine

__all__ = ["Served", "burst", "bursts"]

REQUEST_S = 300.0

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Served:
    """One request. Times are of time.monotonic(); `error` is empty when it was answered."""

    engine: str
    began: float
    ended: float
    prompt_tokens: int
    completion_tokens: int
    error: str = ""

    @property
    def tokens(self) -> int:
        """What stood in the cache at its end."""
        return self.prompt_tokens + self.completion_tokens


async def _ask(client: httpx.AsyncClient, engine: Engine, messages: Messages, max_tokens: int) -> Served:
    body: dict[str, Any] = {
        "model": engine.name,
        "messages": messages,
        "max_tokens": max_tokens,
        "temperature": 0,
    }
    began = time.monotonic()
    try:
        answer = await client.post(f"{engine.url}/v1/chat/completions", json=body)
        answer.raise_for_status()
        usage = answer.json()["usage"]
    except (httpx.HTTPError, KeyError, ValueError) as error:
        return Served(engine.name, began, time.monotonic(), 0, 0, f"{type(error).__name__}: {error}")
    return Served(engine.name, began, time.monotonic(), usage["prompt_tokens"], usage["completion_tokens"])


async def burst(engine: Engine, prompts: Sequence[Messages], max_tokens: int) -> list[Served]:
    """All prompts at once; returns when the last is answered."""
    limits = httpx.Limits(max_connections=len(prompts) or 1)
    async with httpx.AsyncClient(timeout=REQUEST_S, limits=limits) as client:
        return list(await asyncio.gather(*(_ask(client, engine, prompt, max_tokens) for prompt in prompts)))


async def bursts(loads: Sequence[tuple[Engine, Sequence[Messages]]], max_tokens: int) -> list[Served]:
    """A burst on each engine at the same time."""
    parts = await asyncio.gather(*(burst(engine, prompts, max_tokens) for engine, prompts in loads))
    return [served for part in parts for served in part]
