"""A request that nothing is left for waits; SGLang would abort it.

SGLang retracts running requests while the next step has no memory, and aborts the last of them: in a cache of its own
that one can never fit. Here it does once the neighbours give back or a limit is raised, so it goes back to the queue
like the others and is computed again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

__all__ = ["keep_last"]

Outcome = tuple[list[Any], float, list[Any]]
"""Requests that were retracted, the share of new tokens to count on, and requests that were aborted."""

_ABORTED_LAST: Final = "Out of memory even after retracting all other requests"
"""How SGLang 0.5.23 begins the text of that abort (managers/schedule_batch.py, retract_decode)."""


def keep_last(original: Callable[[Any], Outcome], batch: Any) -> Outcome:
    """ScheduleBatch.retract_decode() of `batch`, with that request among the retracted ones.

    One that its client has aborted meanwhile stays among the aborted, and so does a beam group, whose rows are gone.
    """
    over = [request for request in batch.reqs if request.to_finish is not None]
    retracted, ratio, aborted = original(batch)
    kept = [request for request in aborted if request not in over and _is_last(request)]
    for request in kept:
        request.to_finish = None
    return [*retracted, *kept], ratio, [request for request in aborted if request not in kept]


def _is_last(request: Any) -> bool:
    if getattr(request, "beam_group", None) is not None:
        return False
    return str(getattr(request.to_finish, "message", "")).startswith(_ABORTED_LAST)
