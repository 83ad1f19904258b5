"""A limit that was ordered to hold now: running requests are preempted until the tenant holds no more.

It is vLLM's own preemption: a request loses its blocks, waits at the head of the queue, and is computed again later, so
its answer stays the same. A plain limit preempts nobody, and neither does a neighbour.
"""

from __future__ import annotations

import time
from typing import Any

from vllm.logger import init_logger
from vllm.v1.core.sched.request_queue import SchedulingPolicy

from elastickv.engines.vllm.blockpool import ElasticBlockPool

__all__ = ["enforce"]

_logger = init_logger("vllm.elastickv")


def enforce(scheduler: Any, pool: ElasticBlockPool) -> int:
    """Preempts what must be, between two steps and on the engine's thread; returns how many requests it was.

    Blocks that a connector may still write to come back a step later; one such request a step is preempted.
    """
    count = 0
    while scheduler.running and pool.native.preempt_blocks():
        request = _last(scheduler)
        scheduler.running.remove(request)
        at_once = scheduler._request_blocks_can_be_freed(request)
        keeps_output = not getattr(scheduler, "requires_kv_delivery", False)
        scheduler._preempt_request(request, time.monotonic(), drop_stale_output=not keeps_output)
        # It may be resumed in the step that comes now, and must then look like one that was not in the last.
        scheduler.prev_step_scheduled_req_ids.discard(request.request_id)
        pool.forget(pool.native.maintain(False))
        count += 1
        if not at_once:
            break
    if count:
        _logger.info("elastickv has preempted %d requests: a limit was ordered to hold now", count)
    return count


def _last(scheduler: Any) -> Any:
    """Whom vLLM would preempt: of the lowest priority the youngest, or who came last."""
    if scheduler.policy == SchedulingPolicy.PRIORITY:
        return max(scheduler.running, key=lambda request: (request.priority, request.arrival_time))
    return scheduler.running[-1]
