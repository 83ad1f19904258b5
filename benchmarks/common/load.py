"""An open-loop load: each request is sent at its own time, whether or not the others have been answered.

Latency counts from the scheduled arrival, so a client or a server that falls behind shows up in it.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from benchmarks.common.client import Form, Outcome, Request
from benchmarks.common.schedule import Shape, prompts
from benchmarks.common.senders import Senders

__all__ = ["Background", "Form", "Load", "Outcome", "Request", "requests", "run"]

START_S = 0.2
"""From the moment that all is ready until the first scheduled arrival."""


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


def run(load: Sequence[Request], deadline: float = 120.0, processes: int = 0) -> Load:
    """Sends them all and returns when each has ended, `deadline` seconds after its arrival at the latest.

    `processes`: that send them; as many as suit the machine unless given.
    """
    with Senders(load, deadline, processes) as senders:
        return _send(senders, time.monotonic() + START_S)


def _send(senders: Senders, start: float) -> Load:
    outcomes = senders.send(start)
    return Load(outcomes, time.monotonic() - start)


class Background:
    """A load that runs while the caller does something else. A context manager."""

    def __init__(self, load: Sequence[Request], deadline: float = 120.0, processes: int = 0) -> None:
        self._most = max((one.arrival for one in load), default=0.0) + deadline + 60.0
        self._senders = Senders(load, deadline, processes)
        self._result: list[Load] = []
        self._thread = threading.Thread(
            target=lambda: self._result.append(_send(self._senders, self.start)), daemon=True
        )
        self.start = math.nan
        """Of time.monotonic(): the moment that arrivals count from."""

    def __enter__(self) -> Background:
        self._senders.__enter__()
        self.start = time.monotonic() + START_S
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._thread.join(self._most)
        self._senders.__exit__(kind, error, at)

    def running(self) -> bool:
        return self._thread.is_alive()

    def wait(self) -> Load:
        self._thread.join(self._most)
        if not self._result:
            raise RuntimeError(f"the load did not end within {self._most:.0f} s")
        return self._result[0]
