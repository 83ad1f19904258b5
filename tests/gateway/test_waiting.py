"""Requests that wait: how many, how long, in which order, and that none is lost."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import httpx
import pytest

from elastickv.errors import Unavailable
from elastickv.gateway.balance import choose
from elastickv.gateway.errors import Refused
from elastickv.gateway.spec import ModelSpec
from elastickv.gateway.waiting import FIRST_GUESS_S, REMEMBERED, Lane, Place, ServiceTimes
from gateway.front import FakeModel, FakeReplica, Front
from gateway.raw_engine import RawEngine, hang, stream, wait_until

URL = "http://127.0.0.1:1"
Work = Callable[[Lane, FakeModel], Coroutine[Any, Any, None]]


def with_lane(work: Work, urls: tuple[str, ...] = (URL,), **changes: Any) -> None:
    async def run() -> None:
        model = FakeModel(replace(ModelSpec("chat", address=urls), **changes), urls)
        lane = Lane(model)
        try:
            await asyncio.wait_for(work(lane, model), 30)
        finally:
            await lane.close()
        assert model.queued == 0
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(run())


async def enter(lane: Lane, prompt: int = 10, target: float | None = None, wait: float = 20.0) -> Place:
    now = time.monotonic()
    return await lane.enter(prompt, prompt + 5, target, now, now + wait)


def test_a_place_is_had_at_once_and_given_back_once() -> None:
    async def work(lane: Lane, model: FakeModel) -> None:
        place = await enter(lane)
        assert model.entered == [(URL, 15)]
        place.leave()
        place.leave()
        assert model.replicas[0].outstanding == 0

    with_lane(work)


def test_no_more_run_than_may_and_the_next_comes_when_one_leaves() -> None:
    async def work(lane: Lane, model: FakeModel) -> None:
        places = [await enter(lane), await enter(lane)]
        third = asyncio.create_task(enter(lane))
        await asyncio.sleep(0.05)
        assert not third.done()
        assert model.queued == 1
        places[0].leave()
        (await third).leave()

    with_lane(work, concurrency=2)


def test_a_full_queue_refuses_with_the_time_to_try_again() -> None:
    async def work(lane: Lane, model: FakeModel) -> None:
        model.open.clear()
        waiting = [asyncio.create_task(enter(lane)) for _ in range(3)]
        await asyncio.sleep(0)
        with pytest.raises(Refused, match="3 requests already wait for model chat") as caught:
            await enter(lane)
        assert (caught.value.status, caught.value.code) == (503, "queue_full")
        assert (caught.value.retry_after_s or 0) >= 1
        model.open.set()
        for place in await asyncio.gather(*waiting):
            place.leave()

    with_lane(work, queue=3)


def test_a_deadline_ends_the_waiting() -> None:
    async def work(lane: Lane, model: FakeModel) -> None:
        model.open.clear()
        with pytest.raises(Refused, match="which is ready") as caught:
            await enter(lane, wait=0.05)
        assert (caught.value.status, caught.value.code) == (503, "queue_deadline")

    with_lane(work)


def test_a_model_that_cannot_be_had_refuses_all_that_wait_and_none_that_comes_later() -> None:
    async def work(lane: Lane, model: FakeModel) -> None:
        model.error = Unavailable("no memory", retry_after_s=9)
        found = await asyncio.gather(enter(lane), enter(lane), return_exceptions=True)
        assert found == [model.error, model.error]
        model.error = None
        (await enter(lane)).leave()

    with_lane(work)


def test_a_model_that_begins_to_drain_makes_requests_wait_not_fail() -> None:
    async def work(lane: Lane, model: FakeModel) -> None:
        model.shut = 3
        (await enter(lane)).leave()
        assert model.asked == 4

    with_lane(work)


def test_who_gives_up_leaves_nothing_behind() -> None:
    async def work(lane: Lane, model: FakeModel) -> None:
        model.open.clear()
        waiting = [asyncio.create_task(enter(lane)) for _ in range(4)]
        await asyncio.sleep(0.01)
        waiting[0].cancel()
        model.open.set()
        while not model.entered:
            await asyncio.sleep(0)
        for one in waiting:  # places have been given, and nobody has had the time to take one
            one.cancel()
        found = await asyncio.gather(*waiting, return_exceptions=True)
        assert all(isinstance(one, asyncio.CancelledError) for one in found)
        assert len(model.entered) == 3
        assert model.replicas[0].outstanding == 0

    with_lane(work)


@pytest.mark.parametrize(("order", "expected"), [("deadline", [1, 2, 0]), ("fifo", [0, 1, 2])])
def test_the_order_of_those_that_wait(order: str, expected: list[int]) -> None:
    async def work(lane: Lane, model: FakeModel) -> None:
        busy = await enter(lane)
        done: list[int] = []

        async def one(number: int, prompt: int, target: float | None) -> None:
            place = await enter(lane, prompt, target)
            done.append(number)
            await asyncio.sleep(0)
            place.leave()

        lane.service.add(1000, 1.0)  # a millisecond a token
        # The first one would make both others late, and is set aside; the others go by deadline.
        tasks = [
            asyncio.create_task(one(0, 4000, 4.5)),
            asyncio.create_task(one(1, 500, 4.0)),
            asyncio.create_task(one(2, 500, 4.1)),
        ]
        await asyncio.sleep(0.05)
        busy.leave()
        await asyncio.gather(*tasks)
        assert done == expected

    with_lane(work, concurrency=1, order=order)


def test_the_time_of_a_prompt_is_learnt_from_the_latest_answers() -> None:
    times = ServiceTimes()
    assert times.estimate(100) == pytest.approx(100 * FIRST_GUESS_S)
    times.add(100, 10.0)
    for _ in range(REMEMBERED):
        times.add(200, 0.4)
    assert times.estimate(1000) == pytest.approx(2.0)


def test_the_replica_with_the_fewest_tokens_takes_the_next_request() -> None:
    a, b, c = FakeReplica("a", "", 1, 900), FakeReplica("b", "", 9, 100), FakeReplica("c", "", 0, 0, alive=False)
    assert choose([a, b, c], 10) is b
    assert choose([a, b, c], 9) is a
    assert choose([a, b, c], 1) is None
    assert choose([], 1) is None


@pytest.fixture
def engine() -> Iterator[RawEngine]:
    with RawEngine() as engine:
        yield engine


def test_over_http_all_that_came_while_a_model_slept_are_answered(engine: RawEngine) -> None:
    with Front() as front, ThreadPoolExecutor(20) as pool:
        model = front.add("chat", engine.url, concurrency=3, queue=20)
        model.open = asyncio.Event()
        answers = [pool.submit(httpx.post, f"{front.url}/v1/completions", json={"model": "chat"}) for _ in range(20)]
        wait_until(lambda: model.queued == 20, "all wait")
        refused = httpx.post(f"{front.url}/v1/completions", json={"model": "chat"})
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["type"] == "service_unavailable_error"
        assert engine.requests == []
        model.shut = 5  # it goes back to sleep in between
        loop = next(iter(front.server.server_state.tasks)).get_loop()
        loop.call_soon_threadsafe(model.open.set)
        assert [answer.result().status_code for answer in answers] == [200] * 20
        front.quiet()
        assert sorted(front.recorded.statuses()) == [200] * 20 + [503]


def test_tokens_balance_replicas_and_targets_are_read(engine: RawEngine) -> None:
    with RawEngine(hang) as other, Front() as front:
        model = front.add("chat", other.url, engine.url)
        long = {"model": "chat", "max_tokens": 5000}
        with ThreadPoolExecutor(1) as pool:
            pending = pool.submit(httpx.post, f"{front.url}/v1/completions", json=long, timeout=30)
            other.wait_for_requests(1)
            for _ in range(3):
                headers = {"x-ttft-target-ms": "250"}
                answer = httpx.post(f"{front.url}/v1/completions", json={"model": "chat"}, headers=headers)
                assert answer.status_code == 200
            assert len(engine.requests) == 3
            other.default = stream(b"data: {}\n\n")
            wrong = {"x-ttft-target-ms": "soon"}
            bad = httpx.post(f"{front.url}/v1/completions", json={"model": "chat"}, headers=wrong)
            assert bad.status_code == 400
            front.server.stop(0)  # the one that hangs is let go
            pending.exception(20)
        assert model.entered[0][1] > 5000
