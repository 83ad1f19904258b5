"""What sends requests: each at its own time, whether or not the others have been answered.

Every request ends in exactly one Outcome; one that was refused, cut off, came short or was late for its deadline has a
text in `error`.
"""

from __future__ import annotations

import asyncio
import gc
import json
import math
import time
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import httpx

Form = Literal["completions", "generate"]
"""How tokens are asked for: by vLLM's /v1/completions, or by SGLang's own /generate: its /v1/completions needs a
tokenizer, and in 0.5.16 names no token ids."""


@dataclass(frozen=True)
class Request:
    """`arrival`: seconds from the start. `prompt`: token ids."""

    arrival: float
    url: str
    model: str
    prompt: Sequence[int]
    answer: int
    form: Form = "completions"


@dataclass
class Outcome:
    """Times are seconds from the load's start. `tokens`: those that came."""

    model: str
    arrival: float
    sent: float = math.nan
    first: float = math.nan
    last: float = math.nan
    tokens: list[int] = field(default_factory=list)
    error: str = ""

    @property
    def ok(self) -> bool:
        return not self.error

    @property
    def ttft(self) -> float:
        """Seconds from the scheduled arrival to the first token; infinite for a failed request."""
        return self.first - self.arrival if self.ok else math.inf

    @property
    def tpot(self) -> float:
        """Seconds a token after the first; infinite for a failed request."""
        if not self.ok:
            return math.inf
        return (self.last - self.first) / max(1, len(self.tokens) - 1)


def send(load: Sequence[Request], deadline: float, start: float) -> list[Outcome]:
    """Sends them all, and returns when each has ended, `deadline` seconds after its arrival at the latest.

    `start`: of time.monotonic(), the moment that arrivals count from.
    """
    # What earlier loads left is not looked through for garbage: on an H200 that stopped a client for up to 347 ms.
    gc.freeze()
    try:
        return asyncio.run(_send(load, deadline, start))
    finally:
        gc.unfreeze()


async def _send(load: Sequence[Request], deadline: float, start: float) -> list[Outcome]:
    # A connection for each request: a server may close a kept one at the moment that it is used again.
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    # No deadline of httpx's own: `deadline` bounds a request as a whole, from its arrival on.
    async with httpx.AsyncClient(timeout=None, limits=limits, trust_env=False) as client:
        tasks: dict[int, asyncio.Task[Outcome]] = {}
        # A task is made when its request is due: thousands of them at once would make the first requests late.
        for index in sorted(range(len(load)), key=lambda one: load[one].arrival):
            wait = start + load[index].arrival - time.monotonic()
            if wait > 0:
                await asyncio.sleep(wait)
            tasks[index] = asyncio.create_task(_one(client, load[index], start, deadline))
        return [await tasks[index] for index in range(len(load))]


async def _one(client: httpx.AsyncClient, request: Request, start: float, deadline: float) -> Outcome:
    outcome = Outcome(request.model, request.arrival)
    left = start + request.arrival + deadline - time.monotonic()
    work: Coroutine[Any, Any, None] = _ask(client, request, start, outcome)
    try:
        await asyncio.wait_for(work, left)
    except asyncio.TimeoutError:
        outcome.error = f"no end within {deadline:.0f} s of its arrival; {len(outcome.tokens)} tokens had come"
    except (httpx.HTTPError, KeyError, TypeError, ValueError) as error:
        outcome.error = f"{type(error).__name__}: {error}"[:300]
    return outcome


async def _ask(client: httpx.AsyncClient, request: Request, start: float, outcome: Outcome) -> None:
    path, body = _message(request)
    outcome.sent = time.monotonic() - start
    async with client.stream("POST", f"{request.url}{path}", json=body) as answer:
        if answer.status_code != 200:
            raise ValueError(f"{answer.status_code}: {(await answer.aread())[:200]!r}")
        rest = b""
        async for chunk in answer.aiter_raw():
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                if line.startswith(b"data: {"):
                    _take(json.loads(line[6:]), outcome, time.monotonic() - start)
    if len(outcome.tokens) != request.answer:
        raise ValueError(f"{len(outcome.tokens)} of {request.answer} tokens came")


def _message(request: Request) -> tuple[str, dict[str, Any]]:
    """Where it goes and what it says; greedy, and as long as was asked for."""
    greedy = {"temperature": 0, "ignore_eos": True}
    if request.form == "generate":
        params = {**greedy, "max_new_tokens": request.answer}
        return "/generate", {"input_ids": list(request.prompt), "sampling_params": params, "stream": True}
    asked = {"model": request.model, "prompt": list(request.prompt), "max_tokens": request.answer, **greedy}
    return "/v1/completions", {**asked, "stream": True, "return_token_ids": True}


def _take(event: dict[str, Any], outcome: Outcome, now: float) -> None:
    if "error" in event:
        raise ValueError(f"the server said {event['error']}")
    parts = [event["output_ids"]] if "output_ids" in event else [one["token_ids"] for one in event["choices"]]
    for tokens in parts:
        if tokens:
            if not outcome.tokens:
                outcome.first = now
            outcome.last = now
            outcome.tokens += tokens
