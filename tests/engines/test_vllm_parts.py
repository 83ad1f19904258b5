"""Parts of the vLLM plug-in against stand-ins: what is checked at the start, asked before admission, and waited for."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from elastickv._core import Ledger
from elastickv.config import Settings
from elastickv.errors import EngineRefused
from elastickv.ledger import read_device
from elastickv.memory import Cache, RankGeometry, RankMemory

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

BLOCK = 64 * 1024


@pytest.fixture
def cache(directory: Path) -> Iterator[tuple[Cache, RankMemory]]:
    arguments = {"capacity": 17 * BLOCK, "device": "host", "directory": str(directory), "stock": 0, "page": BLOCK}
    settings = Settings.load(arguments={**arguments, "name": "one", "idle_release": "1h"})
    made = Cache.create(settings, num_blocks=33, ranks=[RankGeometry("host", 1, BLOCK)])
    memory = RankMemory.attach(made.rank_spec(0))
    made.wait_ready(10)
    yield made, memory
    memory.close()
    made.close()


def scheduler(native: Any, *, reserved: int = 0) -> tuple[Any, Any]:
    """A stand-in with vLLM's own block pool, made elastic; its manager asks for `request.blocks` blocks."""
    from vllm.v1.core.block_pool import BlockPool

    from elastickv.engines.vllm.scheduler import attach

    coordinator = SimpleNamespace(get_num_blocks_to_allocate=lambda request: request.blocks)
    pool = BlockPool(33, True, 16)

    def allocate_slots(request: Any, num_new_tokens: int, reserved_blocks: int = 0) -> list[Any] | None:
        needed = coordinator.get_num_blocks_to_allocate(request)
        if needed + manager.watermark_blocks > pool.get_num_free_blocks() - reserved_blocks:
            return None
        return list(pool.get_new_blocks(needed))

    manager = SimpleNamespace(
        block_pool=pool, coordinator=coordinator, allocate_slots=allocate_slots, watermark_blocks=3
    )
    made = SimpleNamespace(kv_cache_manager=manager, running=[])
    return made, attach(made, native, lambda: 16, 0.0)


def request(blocks: int, status: str = "WAITING") -> Any:
    from vllm.v1.request import RequestStatus

    return SimpleNamespace(blocks=blocks, status=RequestStatus[status], num_in_flight_tokens=0)


def test_memory_is_there_before_vllm_counts(cache: tuple[Cache, RankMemory]) -> None:
    made, _ = scheduler(cache[0].pool)
    assert cache[0].pool.num_available() == 0
    assert len(made.kv_cache_manager.allocate_slots(request(5), 80)) == 5
    assert cache[0].pool.num_used() == 5


def test_what_vllm_keeps_free_besides_is_asked_for_too(cache: tuple[Cache, RankMemory]) -> None:
    made, _ = scheduler(cache[0].pool)
    assert len(made.kv_cache_manager.allocate_slots(request(5), 80, reserved_blocks=4)) == 5
    assert cache[0].pool.num_available() >= 4


def test_the_watermark_is_of_the_memory_and_not_of_the_addresses(cache: tuple[Cache, RankMemory]) -> None:
    made, _ = scheduler(cache[0].pool)
    assert made.kv_cache_manager.watermark_blocks == 0


def test_running_out_is_an_answer(cache: tuple[Cache, RankMemory]) -> None:
    made, pool = scheduler(cache[0].pool)
    held = made.kv_cache_manager.allocate_slots(request(16), 256)
    assert made.kv_cache_manager.allocate_slots(request(1), 16) is None
    assert pool.starved
    pool.free_blocks(held)
    assert len(made.kv_cache_manager.allocate_slots(request(1), 16)) == 1


def step(made: Any, pool: Any, tokens: int) -> list[int]:
    """The waits for memory of one step of so many tokens, in microseconds."""
    from elastickv.engines.vllm.scheduler import throttle

    waits = []

    def wait_freed(word: int, microseconds: int) -> Any:
        waits.append(microseconds)
        return pool.native.wait_freed(word, microseconds)

    native: Any = SimpleNamespace(freed_word=pool.native.freed_word, wait_freed=wait_freed)
    seen: Any = SimpleNamespace(starved=pool.starved, native=native)
    throttle(made, SimpleNamespace(total_num_scheduled_tokens=tokens), seen)
    return waits


def test_a_starved_engine_does_not_spin(cache: tuple[Cache, RankMemory]) -> None:
    made, pool = scheduler(cache[0].pool)
    assert step(made, pool, 0) == []  # nothing was refused
    made.kv_cache_manager.allocate_slots(request(16), 256)
    assert made.kv_cache_manager.allocate_slots(request(1), 16) is None
    (waited,) = step(made, pool, 0)
    assert waited > 5_000
    assert step(made, pool, 7) == []
    flying = request(1, "RUNNING")
    flying.num_in_flight_tokens = 1
    made.running.append(flying)
    assert step(made, pool, 0) == []  # the answer of a step will free something


def test_what_waits_is_announced_once_a_request_was_refused(cache: tuple[Cache, RankMemory]) -> None:
    from elastickv.engines.vllm.scheduler import announce

    made, pool = scheduler(cache[0].pool)
    told: list[int] = []
    seen: Any = SimpleNamespace(native=SimpleNamespace(set_backlog=told.append))
    made.waiting = [SimpleNamespace(num_tokens=80, num_computed_tokens=16) for _ in range(300)]
    made.max_num_running_reqs = 10
    made.running = [request(1, "RUNNING")] * 3

    def announced() -> int:
        seen.starved, seen.blocks_per_token = pool.starved, pool.blocks_per_token
        announce(made, seen)
        return told[-1]

    held = made.kv_cache_manager.allocate_slots(request(16), 256)
    assert announced() == 0  # nothing was refused
    assert made.kv_cache_manager.allocate_slots(request(1), 16) is None
    assert announced() == 7 * 4  # of 64 tokens, and no more than may run
    assert made.kv_cache_manager.allocate_slots(request(1, "RUNNING"), 1) is None
    assert announced() == 7 * 4  # a block for its next token says nothing of those that wait
    made.max_num_running_reqs = 1000
    assert announced() == 256 * 4
    made.running = [request(1, "RUNNING")] * 1000
    assert announced() == 0
    pool.free_blocks(held)
    time.sleep(0.06)  # until the pool is asked again: what was refused a moment ago is not
    assert made.kv_cache_manager.allocate_slots(request(1), 16) is not None
    made.running = []
    assert announced() == 0


def test_a_neighbour_hears_of_all_that_waits(cache: tuple[Cache, RankMemory], directory: Path) -> None:
    made, pool = scheduler(cache[0].pool)
    made.kv_cache_manager.allocate_slots(request(16), 256)
    pool.native.set_backlog(6)
    assert made.kv_cache_manager.allocate_slots(request(2), 32) is None
    row = read_device(Ledger.open(str(directory), "host")).tenant("one")
    assert (row.demand, row.backlog) == (2 * BLOCK, 6 * BLOCK)


def test_a_scheduler_of_another_kind_is_refused() -> None:
    from elastickv.engines.vllm.scheduler import managed

    with pytest.raises(EngineRefused) as caught:
        managed(dict, lambda config: config)
    assert str(caught.value) == (
        "elastickv cannot manage the scheduler builtins.dict: it is no subclass of vLLM's Scheduler; start without "
        "--scheduler-cls, or unset ELASTICKV to serve without it"
    )


def test_a_worker_that_replaces_a_hooked_method_is_refused() -> None:
    from vllm.v1.worker.cpu_worker import CPUWorker

    from elastickv.engines.vllm.gate import check_worker_class

    check_worker_class(CPUWorker)
    other = type("Other", (CPUWorker,), {"execute_model": lambda self, scheduler_output: None})
    with pytest.raises(EngineRefused) as caught:
        check_worker_class(other)
    assert str(caught.value) == (
        f"elastickv cannot manage the worker {other.__module__}.Other: it has its own execute_model(); "
        "use vLLM's worker for CPU or CUDA, or unset ELASTICKV to serve without it"
    )


def report(**changes: Any) -> dict[str, Any]:
    return {"memory": True, "tensors": True, "tickets": 1, **changes}


@pytest.mark.parametrize(
    ("reports", "missing"),
    [
        ([report(), report(tensors=False)], "rank 1: no tensors"),
        ([report(tickets=0)], "rank 0: no tickets"),
        ([{"memory": False, "tensors": False, "tickets": 0}], "rank 0: no memory, tensors, tickets"),
    ],
)
def test_hooks_that_are_not_in_force_are_noticed(reports: list[dict[str, Any]], missing: str) -> None:
    """The check that runs before an engine serves."""
    from elastickv.engines.vllm.session import Session

    steps: list[Any] = []
    session = Session.__new__(Session)
    session.version = "0.32.0"
    session.executor = SimpleNamespace(execute_model=steps.append, collective_rpc=lambda name, timeout: reports)
    with pytest.raises(EngineRefused) as caught:
        session._check_engaged(SimpleNamespace(schedule=lambda: "an empty step"))
    assert steps == ["an empty step"]
    assert str(caught.value) == (
        f"elastickv is not in charge of {missing} of it (vLLM 0.32.0); please report this, "
        "or unset ELASTICKV to serve without it"
    )


def test_a_start_that_fails_leaves_the_ledger_as_it_was(directory: Path) -> None:
    """In the caller's process, which goes on: the name is free again, and nothing is leased."""
    from elastickv.engines.vllm import session
    from elastickv.memory import Tenancy
    from elastickv.memory.tenancy import attach_member

    made = session.Session.__new__(session.Session)
    made.settings = Settings.load(arguments={"capacity": 17 * BLOCK, "directory": str(directory), "name": "one"})
    made.cache = made._steward = None
    made.tenancy = Tenancy.join(made.settings, ["host"])
    made.tenancy.set_static({"host": 5 * BLOCK}, 0, "weights", print, lambda: None)
    made.members = [attach_member(place) for place in made.tenancy.place(["host", "host"], publishes=True)]
    made.close()
    made.close()
    view = read_device(Ledger.open(str(directory), "host"))
    assert (view.held, view.living) == (0, ())
    Tenancy.join(made.settings, ["host"]).close()


def test_the_one_allocation_is_answered(cache: tuple[Cache, RankMemory]) -> None:
    import torch

    from elastickv.engines.vllm.backing import Backing

    backing = Backing.__new__(Backing)
    backing.memory = cache[1]
    backing._answered = 0
    with backing.allocation():
        other = torch.zeros(5, dtype=torch.int8)
        floats = torch.zeros(33 * BLOCK, dtype=torch.float32)
        tensor = torch.zeros(33 * BLOCK, dtype=torch.int8, device="cpu")
    assert tensor.data_ptr() == cache[1].address
    assert tensor.untyped_storage().nbytes() == 33 * BLOCK
    assert int(tensor[:BLOCK].sum()) == 0
    assert backing.holds([tensor, tensor[BLOCK:]])
    assert not backing.holds([tensor, other])
    assert not backing.holds([floats])
    assert not backing.holds([])
    backing.check_allocated(33 * BLOCK)
    with pytest.raises(EngineRefused) as caught:
        backing.check_allocated(34 * BLOCK)
    assert str(caught.value) == (
        "elastickv answered 1 allocations of 2.06 MiB, and vLLM planned one of 2.12 MiB: the cache is not managed; "
        "please report this with vLLM's version"
    )


def test_a_cache_that_was_not_asked_for_is_noticed(cache: tuple[Cache, RankMemory]) -> None:
    from elastickv.engines.vllm.backing import Backing

    backing = Backing.__new__(Backing)
    backing.memory = cache[1]
    backing._answered = 0
    with backing.allocation():
        pass
    with pytest.raises(EngineRefused, match=r"^elastickv answered 0 allocations of 2\.06 MiB"):
        backing.check_allocated(33 * BLOCK)


def test_a_worker_without_an_engine_that_is_managed() -> None:
    from elastickv.engines.vllm.worker import WRAPPERS

    def original(*arguments: Any) -> None:
        raise AssertionError("it went on unmanaged")

    worker = SimpleNamespace(vllm_config=SimpleNamespace())
    for name, arguments in (("load_model", ()), ("initialize_from_config", (SimpleNamespace(),))):
        with pytest.raises(EngineRefused) as caught:
            WRAPPERS[name](original)(worker, *arguments)
        assert str(caught.value) == (
            "elastickv is on in this worker and off in its engine; give both the same environment, "
            "or unset ELASTICKV to serve without it"
        )


class Requests:
    """vLLM's scheduler as far as preemption goes: each request holds so many blocks of the pool."""

    def __init__(self, pool: Any, held: list[int], policy: str = "fcfs", deferred: bool = False) -> None:
        from vllm.v1.core.sched.request_queue import SchedulingPolicy

        self.pool, self.policy, self.deferred = pool, SchedulingPolicy(policy), deferred
        self.running = [
            SimpleNamespace(request_id=str(i), priority=i % 2, arrival_time=-i, blocks=pool.get_new_blocks(count))
            for i, count in enumerate(held)
        ]
        self.prev_step_scheduled_req_ids = {request.request_id for request in self.running}
        self.preempted: list[str] = []

    def _request_blocks_can_be_freed(self, request: Any) -> bool:
        return not self.deferred

    def _preempt_request(self, request: Any, timestamp: float, drop_stale_output: bool) -> None:
        assert request not in self.running
        assert not drop_stale_output
        self.preempted.append(request.request_id)
        if not self.deferred:
            self.pool.free_blocks(request.blocks)


def lowered(cache: tuple[Cache, RankMemory], blocks: int, *, now: bool) -> Any:
    """The cache's pool with 12 blocks available, under a limit of so many and the null block's."""
    made, pool = scheduler(cache[0].pool)
    assert made.kv_cache_manager.allocate_slots(request(12), 192) is not None
    pool.free_blocks([block for block in pool.blocks if block.ref_cnt == 1 and not block.is_null])
    ledger = Ledger.open(str(cache[0].settings.directory), "host")
    ledger.order_limit("one", (blocks + 1) * BLOCK, now)
    return pool


def test_a_limit_that_is_to_hold_now_preempts_who_came_last(cache: tuple[Cache, RankMemory]) -> None:
    from elastickv.engines.vllm.preempt import enforce

    pool = lowered(cache, 7, now=True)
    requests = Requests(pool, [3, 3, 3, 3])
    assert enforce(requests, pool) == 2
    assert requests.preempted == ["3", "2"]
    assert [request.request_id for request in requests.running] == ["0", "1"]
    assert requests.prev_step_scheduled_req_ids == {"0", "1"}
    assert enforce(requests, pool) == 0


def test_the_lowest_priority_goes_first(cache: tuple[Cache, RankMemory]) -> None:
    """vLLM's number: the larger, the less urgent; then who arrived last."""
    from elastickv.engines.vllm.preempt import enforce

    pool = lowered(cache, 7, now=True)
    requests = Requests(pool, [3, 3, 3, 3], policy="priority")
    assert enforce(requests, pool) == 2
    assert requests.preempted == ["1", "3"]


def test_a_plain_limit_preempts_nobody(cache: tuple[Cache, RankMemory]) -> None:
    from elastickv.engines.vllm.preempt import enforce

    pool = lowered(cache, 1, now=False)
    assert enforce(Requests(pool, [3, 3]), pool) == 0


def test_blocks_that_are_still_written_to_come_back_a_step_later(cache: tuple[Cache, RankMemory]) -> None:
    """Their request is preempted, and no further one until it shows what that gave."""
    from elastickv.engines.vllm.preempt import enforce

    pool = lowered(cache, 1, now=True)
    requests = Requests(pool, [3, 3, 3], deferred=True)
    assert enforce(requests, pool) == 1
    assert requests.preempted == ["2"]


def test_sleep_beside_a_neighbour_that_grows() -> None:
    from elastickv.engines.vllm.sleep import worker_sleep

    def fails(text: str) -> Any:
        def original(self: Any, level: int = 1) -> None:
            raise AssertionError(text)

        return worker_sleep(original)

    assert fails("Memory usage increased after sleeping.")(None) is None
    with pytest.raises(AssertionError, match="something else"):
        fails("something else")(None)


def test_an_idle_engine_says_what_it_forgets() -> None:
    from elastickv.engines.vllm.scheduler import publish_events

    batches: list[Any] = []
    waiting = [["removed"], []]
    made = SimpleNamespace(
        kv_cache_manager=SimpleNamespace(take_events=waiting.pop),
        kv_event_publisher=SimpleNamespace(publish=batches.append),
    )
    publish_events(made)
    assert batches == []
    publish_events(made)
    assert [batch.events for batch in batches] == [["removed"]]
    assert abs(batches[0].ts - time.time()) < 60
