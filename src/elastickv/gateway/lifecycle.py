"""The life of one model: its replicas, its state, and the transactions between the states.

One transaction runs at a time: start, sleep, wake, stop. Each ends in a state that lasts, whatever happens in it, and
requests that come meanwhile wait for its end. Belongs to the event loop.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from elastickv.errors import (
    DeadlineExceeded,
    ElasticKVError,
    EngineRefused,
    IntegrityError,
    InvalidArgument,
    Unavailable,
)
from elastickv.gateway.asleep import Held, held_text, settled
from elastickv.gateway.launch import check, tenant_names
from elastickv.gateway.records import Record
from elastickv.gateway.replica import Engine, Surroundings
from elastickv.gateway.spec import ModelSpec
from elastickv.gateway.states import Machine, Move, State

__all__ = ["Lifecycle", "OnChange", "Task", "within"]

_logger = logging.getLogger("elastickv.gateway")

_SLEEP_S: Final = 120.0
"""For the engine's own part of going to sleep: weights are copied to host memory, some GB a second."""

_CANCEL_S: Final = 30.0
"""For a revival to end that was cancelled, which it does at once."""

_LOST_S: Final = 300.0
_LOST_MOST: Final = 3
"""An engine that ends by itself more often within _LOST_S seconds is not started again at once."""

OnChange = Callable[[], None]
Task = asyncio.Task[ElasticKVError | None]


class Lifecycle:
    """See the module. `live`: it was added while the gateway ran. `on_change` is told of every move."""

    def __init__(self, spec: ModelSpec, around: Surroundings, held: Held, on_change: OnChange, *, live: bool) -> None:
        """ConfigError or NotFound where the model cannot be started as it is described; nothing was started."""
        server = check(spec, around.settings)
        self.spec = spec
        self.live = live
        self.queued = 0
        self.can_sleep = bool(server.sleep) and not spec.address
        self.replicas: list[Engine] = [
            *(Engine(spec, tenant, server, around, live=live) for tenant in tenant_names(spec)),
            *(Engine(spec, "", server, around, url=url.rstrip("/")) for url in spec.address),
        ]
        self._around = around
        self._held = held
        self._on_change = on_change
        deadlines = {
            State.STARTING: spec.start_deadline * around.patience.attempts + sum(around.patience.backoff),
            State.DRAINING: spec.drain_deadline,
            State.WAKING: spec.wake_deadline,
        }
        self._machine = Machine(deadlines, self._moved)
        self._active = time.monotonic()
        self._changed = asyncio.Event()
        self._empty = asyncio.Event()
        self._task: Task | None = None
        self._revivals: dict[str, asyncio.Task[None]] = {}
        self._closing = ""
        self._failures = 0
        self._retry_at = 0.0
        self._lost: list[float] = []

    @property
    def state(self) -> State:
        """Where it is."""
        return self._machine.state

    @property
    def outstanding(self) -> int:
        """Requests that engines work on."""
        return sum(replica.outstanding for replica in self.replicas)

    @property
    def tenants(self) -> tuple[str, ...]:
        """Its names on the ledgers."""
        return tuple(replica.tenant for replica in self.replicas if replica.tenant)

    def on_activity(self) -> None:
        """A request came, or ended."""
        self._active = time.monotonic()

    def running(self) -> bool:
        """Whether a transaction runs."""
        return self._task is not None and not self._task.done()

    # --- transactions

    def _begin(self, what: Callable[[str], Awaitable[None]], reason: str) -> Task:
        """Starts a transaction, or hands out the one that runs."""
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._guarded(what, reason), name=f"model {self.spec.name}")
        return self._task

    async def _guarded(self, what: Callable[[str], Awaitable[None]], reason: str) -> ElasticKVError | None:
        try:
            await what(reason)
            return None
        except ElasticKVError as error:
            return error
        except asyncio.CancelledError:
            return Unavailable(f"model {self.spec.name} is {self._closing or 'being stopped'}")
        except Exception as error:  # the border of a transaction: the model must not stay between two states
            _logger.exception("%s: a transaction failed", self.spec.name)
            await self._end_revivals()
            await asyncio.gather(*(replica.kill() for replica in self.replicas), return_exceptions=True)
            self._pause()
            if State.FAILED is not self.state is not State.STOPPED:
                self._machine.move(State.FAILED, f"the gateway failed: {type(error).__name__}")
            return IntegrityError(
                f"model {self.spec.name}: {type(error).__name__}: {error}; the gateway's log says more"
            )
        finally:
            asyncio.get_running_loop().call_soon(self._notify)

    async def _wake_or_start(self, reason: str) -> None:
        await (self._wake(reason) if self.state is State.ASLEEP else self._start(reason))

    async def _start(self, reason: str, found: dict[str, Record] | None = None) -> None:
        if self.state not in (State.STOPPED, State.FAILED):
            return
        self._machine.move(State.STARTING, reason)
        outcomes = await asyncio.gather(
            *(self._start_one(replica, (found or {}).get(replica.tenant)) for replica in self.replicas),
            return_exceptions=True,
        )
        errors = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
        for error in errors:
            if not isinstance(error, (ElasticKVError, OSError)):
                raise error
        if len(errors) == len(outcomes):
            await self._fail(str(errors[0]))
            raise Unavailable(
                f"model {self.spec.name} could not be started: {errors[0]}",
                retry_after_s=self._retry_at - time.monotonic(),
            )
        self._failures = 0
        self.on_activity()
        if any(outcome is True for outcome in outcomes):
            await self._all_asleep()
            self._machine.move(State.ASLEEP, "found asleep")
        else:
            self._machine.move(State.READY, "all replicas serve" if not errors else f"{len(errors)} replicas failed")
        for replica, outcome in zip(self.replicas, outcomes, strict=True):
            if not isinstance(outcome, BaseException):
                self._watch(replica)  # one may have ended already, while others still started

    async def _start_one(self, replica: Engine, record: Record | None) -> bool:
        """Whether it was found, and sleeps."""
        if record is not None and await replica.adopt(record):
            try:
                return await replica.settle()
            except ElasticKVError as error:
                _logger.warning("%s was found running, and does not serve: %s", replica.name, error)
                await replica.end()
        await replica.bring_up()
        return False

    async def _all_asleep(self) -> None:
        """Of replicas that were found, some slept and some did not: now all do."""
        await asyncio.gather(*(replica.sleep(_SLEEP_S) for replica in self.replicas if replica.ready))

    async def _fail(self, reason: str, *, pause: bool = True) -> None:
        await asyncio.gather(*(replica.end() for replica in self.replicas))
        if pause:
            self._pause()
        self._machine.move(State.FAILED, reason)

    def _pause(self) -> None:
        """Before it is tried again, longer after each failure."""
        patience = self._around.patience
        self._retry_at = time.monotonic() + min(patience.retry * 2**self._failures, patience.retry_most)
        self._failures += 1

    async def _drain(self, seconds: float) -> None:
        self._empty.clear()
        if self.outstanding and not await within(self._empty.wait(), seconds):
            raise Unavailable(f"{self.outstanding} requests of model {self.spec.name} still ran after {seconds:.0f} s")

    async def _sleep(self, reason: str) -> None:
        if self.state is not State.READY:
            return
        self._machine.move(State.DRAINING, reason)
        before = await self._held(self.tenants)
        try:
            await self._drain(self.spec.drain_deadline)
        except Unavailable as error:
            self._machine.move(State.READY, error.message)
            raise
        await self._end_revivals()
        replicas = [replica for replica in self.replicas if replica.ready]
        outcomes = await asyncio.gather(*(replica.sleep(_SLEEP_S) for replica in replicas), return_exceptions=True)
        errors = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
        if errors or not replicas:
            await self._stay_awake(replicas, errors)
            return
        after = await settled(self._held, self.tenants)
        self._machine.move(State.ASLEEP, f"{reason}; {held_text(before, after)}")
        if any(not row.clean for row in after):
            raise IntegrityError(f"model {self.spec.name} sleeps, and {held_text(before, after)}")

    async def _stay_awake(self, replicas: Sequence[Engine], errors: Sequence[BaseException]) -> None:
        """Sleep is all or nothing: those that sleep wake again."""
        error = errors[0] if errors else EngineRefused(f"no engine of model {self.spec.name} runs")
        if not isinstance(error, ElasticKVError):
            raise error
        if isinstance(error, InvalidArgument):
            self.can_sleep = False
        asleep = [replica for replica in replicas if not replica.ready]
        await asyncio.gather(*(replica.wake(self.spec.wake_deadline) for replica in asleep), return_exceptions=True)
        awake = await asyncio.gather(*(replica.healthy() for replica in replicas))
        for replica, well in zip(replicas, awake, strict=True):
            replica.ready = well and not await replica.is_asleep()
        self.on_activity()  # not again at once
        if any(replica.ready for replica in replicas):
            self._machine.move(State.READY, f"it did not go to sleep: {error.message}")
        else:
            await self._fail(f"it broke as it went to sleep: {error.message}", pause=False)
        raise error

    async def _wake(self, reason: str) -> None:
        self._machine.move(State.WAKING, reason)
        until = time.monotonic() + self.spec.wake_deadline
        woken: list[Engine] = []
        try:
            for replica in self.replicas:
                if replica.alive:
                    await replica.wake(max(0.1, until - time.monotonic()))
                    woken.append(replica)
            if not woken:
                raise EngineRefused(f"no engine of model {self.spec.name} runs any more")
        except (Unavailable, InvalidArgument) as error:
            if await self._back_to_sleep(woken):
                self._retry_at = time.monotonic() + self._around.patience.wake_retry
                self._machine.move(State.ASLEEP, f"it could not be woken: {error.message}")
                text = f"model {self.spec.name} sleeps, and there is no memory to wake it now: {error.message}"
                raise Unavailable(text, retry_after_s=self._around.patience.wake_retry) from None
            await self._start_anew(error.message)
        except (EngineRefused, DeadlineExceeded) as error:
            await self._start_anew(error.message)
        else:
            self._machine.move(State.READY, reason)
            self.on_activity()
            for replica in self.replicas:
                if not replica.ready:
                    self._revive(replica, "it ended while it slept")

    async def _back_to_sleep(self, woken: Sequence[Engine]) -> bool:
        """Undoes a wake that could not be finished; whether all sleep now."""
        await asyncio.gather(*(replica.sleep(_SLEEP_S) for replica in woken), return_exceptions=True)
        asleep = await asyncio.gather(*(replica.is_asleep() for replica in self.replicas if replica.alive))
        return bool(asleep) and all(asleep)

    async def _start_anew(self, reason: str) -> None:
        """Its engines are in no state that is known: they are ended and started again."""
        await self._end_revivals()
        await asyncio.gather(*(replica.kill() for replica in self.replicas))
        await asyncio.gather(*(replica.end() for replica in self.replicas))
        self._machine.move(State.FAILED, reason)
        await self._start("started again, because it could not be woken")

    async def _stop(self, reason: str, drain_s: float | None = None) -> None:
        if self.state is State.READY:
            self._machine.move(State.DRAINING, reason)
            try:
                await self._drain(self.spec.drain_deadline if drain_s is None else drain_s)
            except Unavailable as error:
                if not self._closing:
                    self._machine.move(State.READY, error.message)
                    raise
                _logger.warning("%s; they are cut off", error.message)
        await self._end_revivals()
        await asyncio.gather(*(replica.end() for replica in self.replicas))
        if self.state is not State.STOPPED:
            self._machine.move(State.STOPPED, reason)

    # --- supervision

    def _watch(self, replica: Engine) -> None:
        process = replica.process
        if process is not None:
            process.ended.add_done_callback(lambda ended: self._lost_one(replica, process, ended.result()))

    def _lost_one(self, replica: Engine, process: object, how: str) -> None:
        """An engine ended that nobody had told to."""
        if replica.process is not process or self._closing:
            return
        replica.ready = False
        _logger.warning("%s: %s", replica.name, how)
        if self.state is State.ASLEEP and not any(one.alive for one in self.replicas):
            self._around.store.forget(replica.tenant)
            self._machine.move(State.STOPPED, f"it ended while it slept: {how}")
        elif self.state is State.READY:
            self._revive(replica, how)

    def _revive(self, replica: Engine, how: str) -> None:
        """Starts a replica again beside the others, or the model if it was the last one."""
        if self.state is State.READY and not any(one.ready for one in self.replicas):
            self._begin(self._replace, how)
        elif self.state is State.READY and replica.name not in self._revivals:
            task = asyncio.create_task(self._revived(replica), name=f"replica {replica.name}")
            self._revivals[replica.name] = task
            task.add_done_callback(lambda _: self._revivals.pop(replica.name, None))

    def _count_loss(self) -> None:
        """Of an engine that was looked at: a connection that broke is none."""
        now = time.monotonic()
        self._lost = [*(at for at in self._lost if now - at < _LOST_S), now]

    async def _end_revivals(self) -> None:
        """The transaction that calls it has the replicas to itself: what revivals have begun is ended."""
        cut = dict(self._revivals)
        if not cut:
            return
        for task in cut.values():
            task.cancel()
        await asyncio.wait(cut.values(), timeout=_CANCEL_S)
        lost = [replica for replica in self.replicas if replica.name in cut and not replica.ready]
        await asyncio.gather(*(replica.kill() for replica in lost), return_exceptions=True)
        await asyncio.gather(*(replica.end() for replica in lost), return_exceptions=True)

    async def _replace(self, how: str) -> None:
        """The last replica is lost: look whether it really is, then start the model again, if it is not too often."""
        replicas = [replica for replica in self.replicas if replica.alive or replica.elsewhere]
        for replica in replicas:
            replica.ready = await replica.healthy() and not await replica.is_asleep()
        if any(replica.ready for replica in replicas):
            return
        self._count_loss()
        self._machine.move(State.FAILED, how)
        await self._end_revivals()
        await asyncio.gather(*(replica.kill() for replica in self.replicas))
        await asyncio.gather(*(replica.end() for replica in self.replicas))
        if len(self._lost) > _LOST_MOST:
            self._retry_at = time.monotonic() + self._around.patience.retry
            return
        await self._start("started again, because it was lost")

    async def _revived(self, replica: Engine) -> None:
        try:
            if replica.alive and await replica.healthy() and not await replica.is_asleep():
                replica.ready = True
                return
            self._count_loss()
            await replica.kill()
            await replica.end()
            await replica.bring_up()
            self._watch(replica)
        except (ElasticKVError, OSError) as error:
            replica.failed_since = time.monotonic()
            _logger.error("%s is lost and could not be started again: %s", replica.name, error)
        finally:
            self._notify()

    async def probe(self) -> None:
        """Looks whether ready replicas still serve, and at lost ones whether they may be tried again."""
        if self.state is not State.READY or self.running():
            return
        patience, now = self._around.patience, time.monotonic()
        for replica in self.replicas:
            if not replica.ready:
                if replica.failed_since is None or now - replica.failed_since >= patience.retry:
                    self._revive(replica, "it was lost")
            elif await replica.healthy():
                replica.failed_since = None
            else:
                replica.failed_since = replica.failed_since or now
                if now - replica.failed_since >= patience.hung and self.state is State.READY and replica.ready:
                    _logger.warning("%s has not been healthy for %.0f s", replica.name, now - replica.failed_since)
                    replica.ready = False
                    await replica.kill()
                    self._revive(replica, f"it was not healthy for {patience.hung:.0f} s")

    # --- news

    def _moved(self, move: Move) -> None:
        name, origin, to = self.spec.name, move.origin.value, move.to.value
        _logger.info("%s: %s -> %s after %.1f s: %s", name, origin, to, move.lasted, move.reason)
        self._notify()
        self._on_change()

    def _notify(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()


async def within(what: Awaitable[object], seconds: float) -> bool:
    """Whether it came to its end in time."""
    try:
        await asyncio.wait_for(what, seconds)
    except (TimeoutError, asyncio.TimeoutError):
        return False
    return True
