"""What happens to requests, as figures: sliding windows for the page, counters and histograms for Prometheus.

Memory is bounded whatever comes: at most MOST_MODELS models, KEPT samples of a kind for each, one count a second over
the window. All calls are safe from any thread and cost microseconds; none raises.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from prometheus_client import CollectorRegistry

from elastickv.gateway.catalogue import Series

__all__ = ["ModelStats", "Percentiles", "Stats", "percentile"]

WINDOW_S: Final = 300.0
"""What percentiles are of: the answers of so many last seconds."""
RATE_S: Final = 10.0
"""What tokens a second are counted over."""
KEPT: Final = 2048
"""Samples of a model's TTFT, and as many of its TPOT: under more load the window is shorter."""
MOST_MODELS: Final = 256
"""Names beyond are counted together, as `other`."""
OTHER: Final = "other"
FAILED_FROM: Final = 500
"""Statuses that count as failures: 500 and above. A refused request (4xx) is its client's own."""


@dataclass(frozen=True)
class Percentiles:
    """Of the samples in the window, in seconds; None without any. `count`: how many there are."""

    p50: float | None = None
    p90: float | None = None
    p99: float | None = None
    count: int = 0


@dataclass(frozen=True)
class ModelStats:
    """One model: totals since the gateway started, and figures of the window."""

    requests: int = 0
    """That ended, however."""
    failed: int = 0
    """Of them, with a status of 500 or above."""
    output_tokens: int = 0
    tokens_per_s: float = 0.0
    requests_per_s: float = 0.0
    """That arrived."""
    ttft: Percentiles = Percentiles()
    tpot: Percentiles = Percentiles()


class Stats:
    """A Recorder (gateway/base.py) that keeps what it is told. `registry` serves the Prometheus side of it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.registry = CollectorRegistry()
        self._series = Series(self.registry)
        self._clock = clock
        self._lock = threading.Lock()
        self._models: dict[str, _Model] = {}
        self._total = _Model()

    def arrived(self, model: str, prompt_tokens: int) -> None:
        """A request for `model` was let in; its prompt's tokens as estimated from the body."""
        name, kept = self._of(model)
        with self._lock:
            for one in (kept, self._total):
                one.arrivals.add(self._clock(), 1)
        self._series.prompt_tokens.labels(name).inc(max(0, prompt_tokens))

    def first_byte(self, model: str, seconds: float) -> None:
        """The first byte of a streamed answer went to the client, so long after its request had arrived: the TTFT."""
        name, kept = self._of(model)
        with self._lock:
            for one in (kept, self._total):
                one.ttft.append((self._clock(), seconds))
        self._series.ttft.labels(name).observe(seconds)

    def produced(self, model: str, tokens: int) -> None:
        """About so many tokens of an answer passed just now: tokens a second come from this alone."""
        _, kept = self._of(model)
        with self._lock:
            for one in (kept, self._total):
                one.tokens.add(self._clock(), tokens)

    def finished(self, model: str, seconds: float, output_tokens: int, status: int, decode_s: float = 0.0) -> None:
        """A request ended, so long after it had arrived. `decode_s`: from the first byte of a streamed answer to its
        last; with two tokens or more that gives the time per output token (TPOT)."""
        name, kept = self._of(model)
        tpot = decode_s / (output_tokens - 1) if decode_s > 0 and output_tokens > 1 and status == 200 else None
        with self._lock:
            for one in (kept, self._total):
                one.requests += 1
                one.output_tokens += output_tokens
                one.failed += status >= FAILED_FROM
                if tpot is not None:
                    one.tpot.append((self._clock(), tpot))
        self._series.requests.labels(name, str(status)).inc()
        self._series.request.labels(name).observe(seconds)
        self._series.output_tokens.labels(name).inc(max(0, output_tokens))
        if tpot is not None:
            self._series.tpot.labels(name).observe(tpot)

    def forget(self, model: str) -> None:
        """A model that was removed: its window goes, its counters stay until the gateway ends."""
        with self._lock:
            self._models.pop(model, None)

    def model(self, name: str) -> ModelStats:
        """The figures of one model now; zeros for one that nothing came for."""
        now = self._clock()
        with self._lock:
            kept = self._models.get(name)
            return ModelStats() if kept is None else kept.figures(now)

    def total(self) -> ModelStats:
        """The figures of all requests together, those of models that are gone included."""
        now = self._clock()
        with self._lock:
            return self._total.figures(now)

    def _of(self, model: str) -> tuple[str, _Model]:
        with self._lock:
            kept = self._models.get(model)
            if kept is None:
                model = model if len(self._models) < MOST_MODELS else OTHER
                kept = self._models.setdefault(model, _Model())
            return model, kept


class _Model:
    """One model's windows; whoever calls holds the lock."""

    def __init__(self) -> None:
        self.requests = 0
        self.failed = 0
        self.output_tokens = 0
        self.arrivals = _Rate()
        self.tokens = _Rate()
        self.ttft: deque[tuple[float, float]] = deque(maxlen=KEPT)
        self.tpot: deque[tuple[float, float]] = deque(maxlen=KEPT)

    def figures(self, now: float) -> ModelStats:
        return ModelStats(
            requests=self.requests,
            failed=self.failed,
            output_tokens=self.output_tokens,
            tokens_per_s=self.tokens.rate(now),
            requests_per_s=self.arrivals.rate(now),
            ttft=_percentiles(self.ttft, now),
            tpot=_percentiles(self.tpot, now),
        )


class _Rate:
    """Counts in slots of a second over the last RATE_S seconds."""

    def __init__(self) -> None:
        self._slots: deque[tuple[int, int]] = deque(maxlen=math.ceil(RATE_S) + 1)  # second, count

    def add(self, now: float, count: int) -> None:
        second = int(now)
        if self._slots and self._slots[-1][0] >= second:
            last, before = self._slots.pop()
            self._slots.append((last, before + count))
        else:
            self._slots.append((second, count))

    def rate(self, now: float) -> float:
        """A second, over the last RATE_S seconds."""
        return sum(count for second, count in self._slots if second > now - RATE_S) / RATE_S


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Of values in ascending order, one or more: between the two nearest ranks by a straight line."""
    place = (len(ordered) - 1) * percent / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def _percentiles(samples: deque[tuple[float, float]], now: float) -> Percentiles:
    while samples and samples[0][0] < now - WINDOW_S:
        samples.popleft()
    if not samples:
        return Percentiles()
    ordered = sorted(value for _, value in samples)
    return Percentiles(percentile(ordered, 50), percentile(ordered, 90), percentile(ordered, 99), len(ordered))
