"""The order of waiting requests: as many as possible meet their deadline, and nobody waits for ever.

Moore and Hodgson's algorithm (1968) finds, for one machine and jobs with a deadline, an order with the fewest late
jobs: take the jobs by deadline; whenever one would end too late, put the longest one taken so far aside. What was put
aside is late in any case and comes last, by arrival. It is optimal as long as `service_s` predicts how long the engine
is busy with a request's prompt; decoding runs beside other prompts and does not count.

A request without a target is due `patience_s` after its arrival. A request that has waited that long comes first,
oldest first, whatever it was promised: so a flood of requests with short targets cannot starve the others.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from elastickv.errors import InvalidArgument

__all__ = ["Policy", "Waiting", "arrange"]

Policy = Literal["deadline", "fifo"]


@dataclass(frozen=True)
class Waiting:
    """A request that waits. Times are seconds on one clock; `target_s` is the wanted time to first token, from arrival.

    `service_s`: how long the engine is expected to be busy with its prompt.
    """

    key: int
    arrival: float
    service_s: float
    target_s: float | None = None

    def __post_init__(self) -> None:
        for name, value in (("service_s", self.service_s), ("target_s", self.target_s or 0.0)):
            if not (math.isfinite(value) and value >= 0):
                raise InvalidArgument(f"{name} of request {self.key} is {value}; it must be 0 or more seconds")


def arrange(
    requests: Iterable[Waiting], now: float, *, policy: Policy = "deadline", patience_s: float = 30.0
) -> list[Waiting]:
    """All of `requests`, in the order in which to send them. O(n log n); equal requests keep the order of arrival.

    `policy` "fifo" is by arrival alone. `patience_s`: see the module.
    """
    by_arrival = sorted(requests, key=lambda request: (request.arrival, request.key))
    if policy == "fifo":
        return by_arrival
    aged = [request for request in by_arrival if now - request.arrival >= patience_s]
    others = [request for request in by_arrival if now - request.arrival < patience_s]
    start = now + sum(request.service_s for request in aged)
    on_time, late = _fewest_late(others, start, patience_s)
    return [*aged, *on_time, *late]


def _fewest_late(by_arrival: Sequence[Waiting], start: float, patience_s: float) -> tuple[list[Waiting], list[Waiting]]:
    """Those that meet their deadlines, by deadline, and the rest, by arrival."""

    def due(request: Waiting) -> float:
        return request.arrival + (patience_s if request.target_s is None else request.target_s)

    by_deadline = sorted(by_arrival, key=due)  # stable: equal deadlines by arrival
    longest: list[tuple[float, int]] = []  # a heap of (-service, position)
    aside: set[int] = set()
    end = start
    for position, request in enumerate(by_deadline):
        heapq.heappush(longest, (-request.service_s, position))
        end += request.service_s
        if end > due(request):
            service, dropped = heapq.heappop(longest)
            aside.add(dropped)
            end += service
    on_time = [request for position, request in enumerate(by_deadline) if position not in aside]
    put_aside = {by_deadline[position].key for position in aside}
    return on_time, [request for request in by_arrival if request.key in put_aside]
