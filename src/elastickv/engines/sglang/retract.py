"""A request that nothing is left for waits; SGLang would abort it.

SGLang retracts running requests while the next step has no memory, and aborts the last of them: in a cache of its own
that one can never fit. Here it does once the neighbours give back or a limit is raised, so it goes back to the queue
like the others and is computed again.
"""

from __future__ import annotations

from typing import Any, Final

__all__ = ["keep_last"]

_ABORTED_LAST: Final = "Out of memory even after retracting all other requests"
"""How SGLang 0.5.23 begins the text of that abort (managers/schedule_batch.py, retract_decode)."""


def keep_last(result: tuple[list[Any], float, list[Any]]) -> tuple[list[Any], float, list[Any]]:
    """What ScheduleBatch.retract_decode() returns, with that request among the retracted ones."""
    retracted, ratio, aborted = result
    kept = [request for request in aborted if _is_last(request)]
    for request in kept:
        request.to_finish = None
    return [*retracted, *kept], ratio, [request for request in aborted if request not in kept]


def _is_last(request: Any) -> bool:
    return str(getattr(request.to_finish, "message", "")).startswith(_ABORTED_LAST)
