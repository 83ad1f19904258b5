"""The scheduler's part: memory is leased before it is promised, and orders to unmap leave with the next step.

The hooks are a subclass of whatever scheduler class the user has configured, and wrappers of two methods of the one
KVCacheManager it makes.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from vllm.distributed.kv_events import KVEventBatch
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import RequestStatus

from elastickv.engines.vllm.blockpool import ElasticBlockPool, adopt
from elastickv.errors import EngineRefused
from elastickv.memory.asking import QUEUE_SEEN

if TYPE_CHECKING:
    from elastickv.engines.vllm.session import Session

__all__ = ["TICKET", "announce", "attach", "managed", "publish_events", "throttle"]

TICKET: Final = "elastickv_ticket"
"""The attribute of a SchedulerOutput that carries the newest order to unmap. Absent: nothing new."""

_STARVED_WAIT_US: Final = 10_000


def managed(base: type, find: Callable[[Any], Session]) -> type:
    """A subclass of the scheduler class `base` whose instances belong to the session that `find` names."""
    if not issubclass(base, Scheduler):
        raise EngineRefused(
            f"elastickv cannot manage the scheduler {base.__module__}.{base.__qualname__}: it is no subclass of vLLM's "
            "Scheduler; start without --scheduler-cls, or unset ELASTICKV to serve without it"
        )

    class ManagedScheduler(base):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.elastickv = find(self.vllm_config)
            self.elastickv.adopt_scheduler(self)

        def schedule(self, *args: Any, **kwargs: Any) -> Any:
            self.elastickv.before_step()
            output = super().schedule(*args, **kwargs)
            self.elastickv.after_step(output)
            return output

    ManagedScheduler.__name__ = f"Managed{base.__name__}"
    ManagedScheduler.__qualname__ = ManagedScheduler.__name__
    return ManagedScheduler


def attach(scheduler: Any, native: Any, budget_blocks: Callable[[], int], watermark: float) -> ElasticBlockPool:
    """Makes the block pool of `scheduler` elastic and has the pool asked before every admission."""
    manager = scheduler.kv_cache_manager
    pool = adopt(manager.block_pool, native, budget_blocks)
    # vLLM took the fraction of the virtual size, which memory never reaches.
    manager.watermark_blocks = int(watermark * budget_blocks())
    coordinator = manager.coordinator
    allocate, count = manager.allocate_slots, coordinator.get_num_blocks_to_allocate
    spare = tokens = 0
    patient = runs = True
    admitting = False

    @functools.wraps(allocate)
    def allocate_slots(request: Any, num_new_tokens: int, *args: Any, **kwargs: Any) -> Any:
        nonlocal spare, tokens, patient, runs, admitting
        spare = kwargs.get("reserved_blocks", 0) + manager.watermark_blocks
        runs = request.status == RequestStatus.RUNNING
        whole = kwargs.get("full_sequence_must_fit", False)
        tokens = request.num_tokens - request.num_computed_tokens if whole else num_new_tokens
        tokens = 0 if runs else tokens  # a running request takes a block for its next token
        # Waiting is worth it where the alternative is to preempt, and costs nothing where nothing else runs.
        patient = runs or not scheduler.running
        admitting = True
        try:
            return allocate(request, num_new_tokens, *args, **kwargs)
        finally:
            admitting = False

    @functools.wraps(count)
    def get_num_blocks_to_allocate(*args: Any, **kwargs: Any) -> int:
        # Called right before both of vLLM's checks of the number of free blocks, with the exact need. Mamba layers
        # count below 0 where drafts were dropped, and above all blocks for "not in this step"; and vLLM also counts
        # outside of an admission, to know a number.
        needed: int = count(*args, **kwargs)
        if admitting and 0 < needed <= pool.num_gpu_blocks:
            pool.ensure(needed + spare, patient=patient, growing=runs)
            if pool.starved and tokens:
                pool.blocks_per_token = needed / tokens
        return needed

    manager.allocate_slots = allocate_slots
    coordinator.get_num_blocks_to_allocate = get_num_blocks_to_allocate
    return pool


def announce(scheduler: Any, pool: ElasticBlockPool) -> None:
    """Before a step: how many blocks the waiting requests would take, if the last one that asked was refused.

    An estimate: a prefix that is found in the cache takes none.
    """
    if not pool.starved:
        pool.native.set_backlog(0)
        return
    room = min(QUEUE_SEEN, scheduler.max_num_running_reqs - len(scheduler.running))
    waiting = itertools.islice(scheduler.waiting, max(0, room))
    tokens = sum(max(0, request.num_tokens - request.num_computed_tokens) for request in waiting)
    pool.native.set_backlog(int(tokens * pool.blocks_per_token))


def throttle(scheduler: Any, output: Any, pool: ElasticBlockPool) -> None:
    """Waits a moment for memory when a starved engine has nothing to run; vLLM would ask again at once, for ever."""
    if output.total_num_scheduled_tokens or not pool.starved:
        return
    in_flight = any(getattr(request, "num_in_flight_tokens", 0) for request in scheduler.running)
    if in_flight:
        return
    native = pool.native
    native.wait_freed(native.freed_word(), _STARVED_WAIT_US)


def publish_events(scheduler: Any) -> None:
    """Publishes what the pool has to say now: in an idle engine no step would do it until the next request."""
    events = scheduler.kv_cache_manager.take_events()
    if events:
        scheduler.kv_event_publisher.publish(KVEventBatch(ts=time.time(), events=events))
