"""Which of a model's replicas takes a request: the one with the fewest tokens on their way.

Requests differ a hundredfold in length, so tokens tell a replica's load and the number of requests does not.
"""

from __future__ import annotations

from collections.abc import Iterable

from elastickv.gateway.base import Replica

__all__ = ["choose"]


def choose(replicas: Iterable[Replica], concurrency: int) -> Replica | None:
    """The living replica with the fewest outstanding tokens, then requests, of those with fewer than `concurrency`
    requests; None if all are full."""
    free = [one for one in replicas if one.alive and one.outstanding < concurrency]
    return min(free, key=lambda one: (one.outstanding_tokens, one.outstanding), default=None)
