"""The queue in front of one model: bounded, with a deadline for each request, in the order that meets most targets.

A request waits while its model starts, wakes, drains, restarts, or has as many requests as it may. One task a model,
the pump, lives as long as somebody waits: it asks the model for replicas, and hands each free place to the request
that elastickv.scheduling.order puts first. Everything belongs to the event loop's thread.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

from elastickv.errors import DeadlineExceeded, ElasticKVError, Unavailable
from elastickv.gateway.balance import choose
from elastickv.gateway.base import Model, Replica, Ticket
from elastickv.gateway.errors import Refused
from elastickv.scheduling.order import Waiting, arrange

__all__ = ["Lane", "Place", "ServiceTimes"]

REMEMBERED: Final = 64
"""Answers whose first token tells how fast the engine reads prompts."""
FIRST_GUESS_S: Final = 0.0001
"""Seconds a token of a prompt until an answer has told: 10,000 tokens/s, a small model on a GPU. Order only."""
LATER_S: Final = 0.02
"""Between two questions to a model whose answer was of no use."""
LOOK_EVERY_S: Final = 0.5
"""Replicas may come while all that there are have enough to do."""


class ServiceTimes:
    """How long an engine is busy with a prompt, from the latest times to first token."""

    def __init__(self) -> None:
        self._seen: deque[tuple[int, float]] = deque(maxlen=REMEMBERED)
        self._tokens, self._seconds = 0, 0.0

    def add(self, tokens: int, seconds: float) -> None:
        """An engine has read `tokens` tokens and said its first one `seconds` after it was given the request."""
        if len(self._seen) == REMEMBERED:
            old_tokens, old_seconds = self._seen[0]
            self._tokens -= old_tokens
            self._seconds -= old_seconds
        self._seen.append((tokens, seconds))
        self._tokens += tokens
        self._seconds += seconds

    def estimate(self, tokens: int) -> float:
        """Seconds for a prompt of that many tokens."""
        a_token = self._seconds / self._tokens if self._tokens else FIRST_GUESS_S
        return max(0.0, a_token * tokens)


@dataclass(frozen=True)
class Place:
    """A request's place at a replica. Whoever has it calls `leave` once, however the request ends."""

    replica: Replica
    leave: Callable[[], None]


@dataclass
class _Waiter:
    key: int
    arrival: float
    prompt: int
    tokens: int
    target_s: float | None
    turn: asyncio.Future[Place] = field(repr=False)


class Lane:
    """One model's queue. `clock` is time.monotonic, which the event loop uses too."""

    def __init__(self, model: Model, clock: Callable[[], float] = time.monotonic) -> None:
        self.model = model
        self.service = ServiceTimes()
        self._clock = clock
        self._waiters: dict[int, _Waiter] = {}
        self._count = 0
        self._pump: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()

    async def enter(self, prompt: int, tokens: int, target_s: float | None, arrival: float, deadline: float) -> Place:
        """Waits for a place. `prompt`: its tokens; `tokens`: those and the answer's; `target_s`: from arrival.

        Refused (503) where the queue is full or the deadline passed; Unavailable where the model cannot be had.
        """
        spec = self.model.spec
        if len(self._waiters) >= spec.queue:
            raise Refused(
                f"{len(self._waiters)} requests already wait for model {spec.name}, as many as may; try again later",
                status=503,
                code="queue_full",
                retry_after_s=self._drain_time(),
            )
        loop = asyncio.get_running_loop()
        self._count += 1
        waiter = _Waiter(self._count, arrival, prompt, tokens, target_s, loop.create_future())
        self._waiters[waiter.key] = waiter
        self.model.queued = len(self._waiters)
        timer = loop.call_later(max(0.0, deadline - self._clock()), self._late, waiter)
        if self._pump is None:
            self._pump = loop.create_task(self._run())
        else:
            self._changed.set()
        try:
            return await waiter.turn
        except asyncio.CancelledError:
            if waiter.turn.done() and not waiter.turn.cancelled() and waiter.turn.exception() is None:
                waiter.turn.result().leave()  # the place came at the moment that nobody wanted it any more
            raise
        finally:
            timer.cancel()
            self._forget(waiter)

    async def close(self) -> None:
        """Ends the pump; those who wait are told that the gateway ends."""
        self._fail(Unavailable("the gateway is ending; try again in a moment"))
        if self._pump is not None:
            self._pump.cancel()
            await asyncio.wait([self._pump])

    def _forget(self, waiter: _Waiter) -> None:
        if self._waiters.pop(waiter.key, None) is not None:
            self.model.queued = len(self._waiters)
            self._changed.set()

    def _late(self, waiter: _Waiter) -> None:
        if not waiter.turn.done():
            view = self.model.view()
            waited = self._clock() - waiter.arrival
            waiter.turn.set_exception(
                Refused(
                    f"the request waited {waited:.1f} s for model {view.name}, which is {view.state.value}"
                    f" ({view.reason or 'no reason noted'}); try again later",
                    status=503,
                    code="queue_deadline",
                    retry_after_s=self._drain_time(),
                )
            )

    def _fail(self, error: ElasticKVError) -> None:
        for waiter in self._waiters.values():
            if not waiter.turn.done():
                waiter.turn.set_exception(error)

    def _drain_time(self) -> float:
        """Seconds until the queue of now has been served, more or less."""
        return min(60.0, max(1.0, sum(self.service.estimate(one.prompt) for one in self._waiters.values())))

    async def _run(self) -> None:
        """The pump."""
        try:
            while self._open():
                self._changed.clear()
                try:
                    replicas = await self.model.ready_replicas(self._clock() + self.model.spec.queue_deadline)
                except DeadlineExceeded:
                    await asyncio.sleep(LATER_S)  # each has a timer of its own and goes when it is late
                    continue
                except ElasticKVError as error:
                    self._fail(error)
                    return
                pause = self._hand_out(replicas)
                if pause:
                    with suppress(asyncio.TimeoutError):
                        await asyncio.wait_for(self._changed.wait(), pause)
        finally:
            self._pump = None
            if self._open():  # somebody came after the others had been failed
                self._pump = asyncio.get_running_loop().create_task(self._run())

    def _open(self) -> list[_Waiter]:
        return [one for one in self._waiters.values() if not one.turn.done()]

    def _hand_out(self, replicas: Sequence[Replica]) -> float:
        """Gives every free place away; seconds until the model is asked again if nothing happens before."""
        spec = self.model.spec
        for waiter in self._in_order(self._open()):
            replica = choose(replicas, spec.concurrency)
            if replica is None:
                return LOOK_EVERY_S
            try:
                ticket = self.model.enter(replica, waiter.tokens)
            except Unavailable:  # it has begun to drain; ready_replicas() returns when it is back
                return LATER_S
            waiter.turn.set_result(Place(replica, self._leaver(ticket)))
        return 0.0

    def _in_order(self, waiting: list[_Waiter]) -> list[_Waiter]:
        if len(waiting) < 2:
            return waiting
        known = {one.key: one for one in waiting}
        asked = [Waiting(one.key, one.arrival, self.service.estimate(one.prompt), one.target_s) for one in waiting]
        return [known[one.key] for one in arrange(asked, self._clock(), policy=self.model.spec.order)]

    def _leaver(self, ticket: Ticket) -> Callable[[], None]:
        def leave() -> None:
            ticket.leave()
            self._changed.set()

        return leave
