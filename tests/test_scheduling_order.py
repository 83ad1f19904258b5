"""The order of waiting requests: never more late ones than the best order has, nothing lost, nobody starved."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastickv.errors import InvalidArgument
from elastickv.scheduling.order import Waiting, arrange

TIMES = st.integers(0, 20).map(float)


@st.composite
def queues(draw: st.DrawFn, most: int = 6) -> list[Waiting]:
    count = draw(st.integers(0, most))
    return [
        Waiting(key, draw(TIMES) - 20.0, draw(st.integers(1, 8).map(float)), draw(st.none() | TIMES))
        for key in range(count)
    ]


def late(order: list[Waiting], now: float, patience: float) -> int:
    end, count = now, 0
    for request in order:
        end += request.service_s
        due = request.arrival + (patience if request.target_s is None else request.target_s)
        count += end > due
    return count


@given(queues())
def test_no_order_has_fewer_late_requests(queue: list[Waiting]) -> None:
    patience = 1000.0  # so long that nothing ages
    ours = late(arrange(queue, 0.0, patience_s=patience), 0.0, patience)
    best = min(late(list(order), 0.0, patience) for order in itertools.permutations(queue))
    assert ours == best


@given(queues(most=30), st.sampled_from(["deadline", "fifo"]), st.floats(0, 50))
def test_nothing_is_lost_or_doubled(queue: list[Waiting], policy: str, patience: float) -> None:
    order = arrange(queue, 0.0, policy=policy, patience_s=patience)  # type: ignore[arg-type]
    assert sorted(request.key for request in order) == sorted(request.key for request in queue)


@given(queues(most=30))
def test_first_come_is_by_arrival(queue: list[Waiting]) -> None:
    arrivals = [request.arrival for request in arrange(queue, 0.0, policy="fifo")]
    assert arrivals == sorted(arrivals)


def test_who_has_waited_long_comes_first_and_the_oldest_of_them() -> None:
    old, older = Waiting(1, -31.0, 5.0), Waiting(2, -40.0, 5.0, target_s=1.0)
    eager = [Waiting(key, 0.0, 0.1, target_s=0.2) for key in range(3, 20)]
    assert [request.key for request in arrange([*eager, old, older], 0.0)][:2] == [2, 1]


def test_a_flood_of_short_targets_starves_nobody() -> None:
    """A request with a tight target always waits; a slow one without a target is served within its patience."""
    patient = Waiting(0, 0.0, 4.0)
    queue, now, key = [patient], 0.0, 1
    while patient in queue:
        assert now < 40.0
        queue.append(Waiting(key, now, 1.0, target_s=1.0))
        key += 1
        first = arrange(queue, now, patience_s=30.0)[0]
        queue.remove(first)
        now += first.service_s


def test_the_one_that_makes_others_late_goes_last() -> None:
    long = Waiting(1, 0.0, 10.0, target_s=10.0)
    short = [Waiting(key, 0.0, 1.0, target_s=11.0) for key in (2, 3, 4)]
    assert [request.key for request in arrange([long, *short], 0.0)] == [2, 3, 4, 1]


@pytest.mark.parametrize("service", [-1.0, math.nan, math.inf])
def test_a_request_that_takes_no_sensible_time_is_refused(service: float) -> None:
    with pytest.raises(InvalidArgument, match="service_s of request 1"):
        Waiting(1, 0.0, service)
