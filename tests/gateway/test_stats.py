"""Figures of requests: windows, percentiles, rates, bounds."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastickv.gateway import stats as module
from elastickv.gateway.stats import ModelStats, Stats, percentile


@dataclass
class Clock:
    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=50), st.floats(0, 100))
def test_a_percentile_lies_between_its_neighbours(values: list[float], percent: float) -> None:
    ordered = sorted(values)
    found = percentile(ordered, percent)
    assert ordered[0] <= found <= ordered[-1] * (1 + 1e-9)
    assert sum(value <= found * (1 + 1e-9) for value in ordered) >= len(ordered) * percent / 100 - 1
    assert percentile(ordered, 0) == ordered[0]
    assert percentile(ordered, 100) == ordered[-1]


def test_percentiles_of_known_values(clock: Clock) -> None:
    stats = Stats(clock)
    for value in range(1, 102):
        stats.first_byte("chat", value / 100)
    ttft = stats.model("chat").ttft
    assert (ttft.p50, ttft.p90, ttft.p99) == pytest.approx((0.51, 0.91, 1.0))
    assert ttft.count == 101


def test_tpot_is_of_the_tokens_after_the_first(clock: Clock) -> None:
    stats = Stats(clock)
    stats.finished("chat", 2.0, 11, 200, decode_s=1.0)
    stats.finished("chat", 2.0, 1, 200, decode_s=1.0)  # one token has no time between tokens
    stats.finished("chat", 2.0, 11, 200)  # not streamed
    stats.finished("chat", 2.0, 11, 499, decode_s=1.0)  # cut off by its client
    found = stats.model("chat")
    assert found.tpot.count == 1
    assert found.tpot.p50 == pytest.approx(0.1)
    assert found.requests == 4


def test_what_is_older_than_the_window_does_not_count(clock: Clock) -> None:
    stats = Stats(clock)
    stats.first_byte("chat", 9.0)
    clock.now += module.WINDOW_S - 1
    stats.first_byte("chat", 1.0)
    assert stats.model("chat").ttft.count == 2
    clock.now += 2
    assert stats.model("chat").ttft.p99 == 1.0
    clock.now += module.WINDOW_S
    assert stats.model("chat").ttft == module.Percentiles()


def test_tokens_a_second_are_of_the_last_seconds(clock: Clock) -> None:
    stats = Stats(clock)
    for _ in range(20):
        stats.produced("chat", 5)
        clock.now += 0.5
    assert stats.model("chat").tokens_per_s == pytest.approx(10, rel=0.1)
    clock.now += 2 * module.RATE_S
    assert stats.model("chat").tokens_per_s == 0


def test_failures_are_the_servers_own(clock: Clock) -> None:
    stats = Stats(clock)
    for status in (200, 400, 404, 429, 499, 500, 503):
        stats.arrived("chat", 10)
        stats.finished("chat", 0.1, 0, status)
    assert (stats.model("chat").requests, stats.model("chat").failed) == (7, 2)


def test_memory_is_bounded(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_MODELS", 4)
    stats = Stats(clock)
    for number in range(50):
        stats.arrived(f"m{number}", 1)
        stats.finished(f"m{number}", 0.1, 0, 200)
    assert stats.model("m0").requests == 1
    assert stats.model("m40") == ModelStats()
    assert stats.model(module.OTHER).requests == 46
    for _ in range(2 * module.KEPT):
        stats.first_byte("m0", 0.1)
    assert stats.model("m0").ttft.count == module.KEPT
    stats.forget("m0")
    assert stats.model("m0") == ModelStats()
    stats.forget("m0")
    assert stats.total().requests == 50
    assert stats.total().ttft.count == module.KEPT


def test_threads_lose_nothing() -> None:
    stats = Stats()

    def work() -> None:
        for _ in range(1000):
            stats.arrived("chat", 1)
            stats.produced("chat", 2)
            stats.finished("chat", 0.01, 2, 200, decode_s=0.01)
            stats.model("chat")

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    found = stats.model("chat")
    assert (found.requests, found.output_tokens) == (4000, 8000)
    assert stats.registry.get_sample_value("elastickv_gateway_requests_total", {"model": "chat", "code": "200"}) == 4000
