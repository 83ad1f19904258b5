"""An open-loop load client: each request is sent at its own time, whether or not the others have been answered.

Latency counts from the scheduled arrival, so a client or a server that falls behind shows up in it. Every request ends
in exactly one Outcome; one that was refused, cut off, came short or was late for its deadline has a text in `error`.
"""

from __future__ import annotations

import asyncio
import json
import math
import threading
import time
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import httpx

from benchmarks.common.schedule import Shape, prompts

Form = Literal["completions", "generate"]
"""How tokens are asked for: by vLLM's /v1/completions, or by SGLang's own /generate: its /v1/completions needs a
tokenizer, and in 0.5.16 names no token ids."""

START_S = 0.2
"""From the call until the first scheduled arrival, for the tasks to be made."""


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


@dataclass(frozen=True)
class Load:
    """What became of a load. `seconds`: from the start until the last request ended."""

    outcomes: list[Outcome]
    seconds: float

    @property
    def failures(self) -> list[Outcome]:
        return [one for one in self.outcomes if not one.ok]

    @property
    def tokens_per_second(self) -> float:
        """Tokens of answers; those of failed requests do not count."""
        return sum(len(one.tokens) for one in self.outcomes if one.ok) / self.seconds

    @property
    def requests_per_second(self) -> float:
        """Answered ones."""
        return sum(one.ok for one in self.outcomes) / self.seconds

    @property
    def lag(self) -> float:
        """Seconds that the client itself was late at worst: a large one means that the client was too slow."""
        return max((one.sent - one.arrival for one in self.outcomes if not math.isnan(one.sent)), default=0.0)

    def ttft(self) -> list[float]:
        return [one.ttft for one in self.outcomes]

    def tpot(self) -> list[float]:
        return [one.tpot for one in self.outcomes]

    def samples(self) -> dict[str, Any]:
        """For a result file, in seconds and in the order of arrival. A failed request has null, and its error."""

        def rounded(values: Sequence[float]) -> list[float | None]:
            return [round(value, 5) if math.isfinite(value) else None for value in values]

        return {
            "seconds": round(self.seconds, 4),
            "client lag": round(self.lag, 5),
            "arrival": rounded([one.arrival for one in self.outcomes]),
            "ttft": rounded(self.ttft()),
            "tpot": rounded(self.tpot()),
            "tokens": [len(one.tokens) for one in self.outcomes],
            "errors": {str(i): one.error for i, one in enumerate(self.outcomes) if not one.ok},
        }


def requests(
    url: str,
    model: str,
    arrivals: Sequence[float],
    shape: Shape,
    vocabulary: int,
    seed: int,
    form: Form = "completions",
) -> list[Request]:
    """One request of that shape for each arrival, with random prompts."""
    made = prompts(len(arrivals), shape.prompt, vocabulary, seed)
    return [Request(at, url, model, prompt, shape.answer, form) for at, prompt in zip(arrivals, made, strict=True)]


def run(load: Sequence[Request], deadline: float = 120.0, start: float | None = None) -> Load:
    """Sends them all and returns when each has ended, `deadline` seconds after its arrival at the latest.

    `start`: of time.monotonic(), the moment that arrivals count from; in START_S seconds unless given.
    """
    return asyncio.run(_run(load, deadline, time.monotonic() + START_S if start is None else start))


class Background:
    """A load that runs in a thread of its own while the caller does something else. A context manager."""

    def __init__(self, load: Sequence[Request], deadline: float = 120.0) -> None:
        self._most = max((one.arrival for one in load), default=0.0) + deadline + 30.0
        self._result: list[Load] = []
        self._thread = threading.Thread(
            target=lambda: self._result.append(run(load, deadline, self.start)), daemon=True
        )
        self.start = math.nan
        """Of time.monotonic(): the moment that arrivals count from."""

    def __enter__(self) -> Background:
        self.start = time.monotonic() + START_S
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._thread.join(self._most)

    def running(self) -> bool:
        return self._thread.is_alive()

    def wait(self) -> Load:
        self._thread.join(self._most)
        if not self._result:
            raise RuntimeError(f"the load did not end within {self._most:.0f} s")
        return self._result[0]


async def _run(load: Sequence[Request], deadline: float, start: float) -> Load:
    # A connection for each request: a server may close a kept one at the moment that it is used again.
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    # No deadline of httpx's own: `deadline` bounds a request as a whole, from its arrival on.
    async with httpx.AsyncClient(timeout=None, limits=limits, trust_env=False) as client:
        outcomes = await asyncio.gather(*(_one(client, one, start, deadline) for one in load))
        return Load(list(outcomes), time.monotonic() - start)


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
    await asyncio.sleep(max(0.0, start + request.arrival - time.monotonic()))
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
