"""One model as the front and the fleet use it. What happens to it is in lifecycle.py. Belongs to the event loop."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from typing import Final

from elastickv.errors import DeadlineExceeded, ElasticKVError, InvalidArgument, Unavailable
from elastickv.gateway.base import ModelView, Replica, Ticket
from elastickv.gateway.lifecycle import Lifecycle, Task, within
from elastickv.gateway.policy import Standing
from elastickv.gateway.records import Record
from elastickv.gateway.replica import Engine
from elastickv.gateway.states import State

__all__ = ["ServedModel"]

_logger = logging.getLogger("elastickv.gateway")

_SHOWN_MOVES: Final = 16


class _Ticket:
    def __init__(self, model: ServedModel, replica: Engine, tokens: int) -> None:
        self._model, self._replica, self._tokens = model, replica, tokens
        self._inside = True
        replica.outstanding += 1
        replica.outstanding_tokens += tokens

    def leave(self) -> None:
        if self._inside:
            self._inside = False
            self._replica.outstanding -= 1
            self._replica.outstanding_tokens -= self._tokens
            self._model.left()


class ServedModel(Lifecycle):
    """See the module."""

    def view(self) -> ModelView:
        """As it is now."""
        machine = self._machine
        return ModelView(
            name=self.spec.name,
            state=machine.state,
            reason=machine.reason,
            since=machine.since,
            policy=self.spec.sleep,
            replicas=tuple(replica.view() for replica in self.replicas),
            tenants=self.tenants,
            queued=self.queued,
            outstanding=self.outstanding,
            moves=tuple(machine.history)[-_SHOWN_MOVES:],
        )

    def standing(self) -> Standing:
        """For the policy. A transaction that runs is its own matter: then it is not idle."""
        busy = self.outstanding or self.queued or self.running()
        idle = 0.0 if busy else time.monotonic() - self._active
        return Standing(self.spec, self.state, self._machine.lasted, idle, self.can_sleep, self.tenants)

    # --- requests

    async def ready_replicas(self, deadline: float) -> Sequence[Replica]:
        """See base.Model. `deadline` is of time.monotonic()."""
        began = time.monotonic()
        while True:
            if self._closing:
                raise Unavailable(f"model {self.spec.name} is {self._closing}", retry_after_s=5.0)
            if self.state is State.READY:
                ready: list[Replica] = [replica for replica in self.replicas if replica.ready]
                if ready:
                    return ready
            elif not self.running():
                self._refuse_in_vain()
                self._begin(self._wake_or_start, "a request")
            changed = self._changed
            left = deadline - time.monotonic()
            if left <= 0 or not await within(changed.wait(), left):
                raise DeadlineExceeded(
                    f"waited {time.monotonic() - began:.1f} s for model {self.spec.name}, which is {self.state.value}",
                    retry_after_s=self._around.patience.wake_retry,
                )

    def _refuse_in_vain(self) -> None:
        """Where a start or a wake failed a moment ago, another would only keep the request waiting."""
        left = self._retry_at - time.monotonic()
        if left <= 0:
            return
        if self.state is State.FAILED:
            text = f"model {self.spec.name} has failed and is tried again in {left:.0f} s; its operator sees why"
            raise Unavailable(text, retry_after_s=left)
        if self.state is State.ASLEEP:
            text = f"model {self.spec.name} sleeps, and there is no memory to wake it now"
            raise Unavailable(text, retry_after_s=max(1.0, left))

    def enter(self, replica: Replica, tokens: int) -> Ticket:
        """See base.Model."""
        if self.state is not State.READY or not isinstance(replica, Engine) or not replica.ready:
            raise Unavailable(f"model {self.spec.name} is {self.state.value}", retry_after_s=1.0)
        self.on_activity()
        return _Ticket(self, replica, tokens)

    def left(self) -> None:
        """A request has ended."""
        self.on_activity()
        if not self.outstanding:
            self._empty.set()

    def unreachable(self, replica: Replica, reason: str) -> None:
        """See base.Model."""
        if isinstance(replica, Engine) and replica.ready and replica in self.replicas:
            _logger.info("%s: %s cannot be reached: %s", self.spec.name, replica.name, reason)
            replica.ready = False
            self._revive(replica, f"it cannot be reached: {reason}")

    # --- what the fleet orders

    def begin_start(self, reason: str) -> None:
        """Begins a start, unless a transaction runs."""
        if self.state in (State.STOPPED, State.FAILED):
            self._begin(self._start, reason)

    def begin_adopt(self, records: Sequence[Record]) -> None:
        """Begins to take on the engines that still run, and starts the others."""
        found = {record.replica: record for record in records}
        self._begin(lambda reason: self._start(reason, found), "engines were found running")

    def begin(self, what: str, reason: str) -> None:
        """A "sleep" or "stop" of the policy's; it looks again whether the model still is idle."""
        if not (self.outstanding or self.queued or self.running() or self._closing):
            self._begin(self._sleep if what == "sleep" else self._stop, reason)

    async def sleep(self, reason: str) -> None:
        """See base.Fleet."""
        await self._after_running()
        if self.state in (State.ASLEEP, State.STOPPED):
            return
        if self.state is not State.READY:
            raise Unavailable(f"model {self.spec.name} is {self.state.value}, not ready; it cannot be put to sleep")
        if not self.can_sleep:
            raise InvalidArgument(f"the engine of model {self.spec.name} cannot sleep; remove the model instead")
        await self._through(self._begin(self._sleep, reason))

    async def wake(self, reason: str) -> None:
        """See base.Fleet."""
        await self._after_running()
        if self.state is not State.READY:
            self._retry_at = 0.0
            await self._through(self._begin(self._wake_or_start, reason))

    async def close(self, why: str, drain_s: float) -> None:
        """Admits no more, drains, ends its engines, at once if there is no time. `why`: as in "being removed"."""
        self._closing = why
        self._notify()
        task = self._task
        if task is not None and not task.done():
            task.cancel()
            await asyncio.wait({task})
        await self._end_revivals()
        if drain_s <= 0:
            await asyncio.gather(*(replica.kill() for replica in self.replicas))
        if self.state is not State.STOPPED:
            error = await self._through(self._begin(lambda reason: self._stop(reason, drain_s), why), quiet=True)
            if error is not None:
                _logger.warning("%s: %s", self.spec.name, error)
        await asyncio.gather(*(replica.end() for replica in self.replicas))

    async def _after_running(self) -> None:
        if self._task is not None and not self._task.done():
            await asyncio.wait({self._task})

    async def _through(self, task: Task, *, quiet: bool = False) -> ElasticKVError | None:
        error = await asyncio.shield(task)
        if error is not None and not quiet:
            raise error
        return error
