"""One address that answers for a model: an engine of our own in a process, or a server that runs elsewhere."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Final

import httpx

from elastickv.config import Settings
from elastickv.engines import Server
from elastickv.errors import DeadlineExceeded, ElasticKVError, EngineRefused, InvalidArgument, Unavailable
from elastickv.gateway.base import ReplicaView
from elastickv.gateway.launch import HOST, choose_port, launch
from elastickv.gateway.process import EngineProcess, tail
from elastickv.gateway.records import Record, Store
from elastickv.gateway.spec import ModelSpec

__all__ = ["Engine", "Patience", "Surroundings"]

_logger = logging.getLogger("elastickv.gateway")

_PROBE_S: Final = 5.0
_SAY: Final = 200


@dataclass(frozen=True)
class Patience:
    """How the gateway deals with engines that fail. Seconds."""

    attempts: int = 3
    """Starts in a row, before a model is failed."""
    backoff: tuple[float, ...] = (2.0, 10.0)
    """Between two starts; the last one counts for all further ones."""
    retry: float = 30.0
    """After which a failed model is tried again by a request; doubled each time, up to `retry_most`."""
    retry_most: float = 600.0
    poll: float = 0.2
    """Between two looks whether a starting engine is ready."""
    look: float = 0.5
    """Between two looks at all models and the ledgers."""
    probe: float = 5.0
    """Between two probes of a ready engine's health."""
    hung: float = 60.0
    """An engine that has not answered a probe for so long is ended and started again."""
    wake_retry: float = 2.0
    """After a wake that found no memory."""

    def pause(self, attempt: int) -> float:
        """After failed attempt number `attempt`, the first being 0."""
        return self.backoff[min(attempt, len(self.backoff) - 1)] if self.backoff else 0.0


@dataclass(frozen=True)
class Surroundings:
    """What all models of a gateway share."""

    settings: Settings
    store: Store
    client: httpx.AsyncClient
    grace: float
    patience: Patience
    ports: Callable[[], Collection[int]]
    """Those that engines have already."""


class Engine:
    """A replica. Belongs to the event loop. `ready`: it answered its health question, and does not sleep."""

    def __init__(
        self, spec: ModelSpec, tenant: str, server: Server, around: Surroundings, *, url: str = "", live: bool = False
    ) -> None:
        """`url`: of a server elsewhere; `tenant` is then ""."""
        self.spec = spec
        self.tenant = tenant
        self.url = url
        self.elsewhere = bool(url)
        self.ready = False
        self.outstanding = 0
        self.outstanding_tokens = 0
        self.failed_since: float | None = None
        self.process: EngineProcess | None = None
        self.port = 0
        self._server = server
        self._around = around
        self._live = live
        self._record: Record | None = None

    @property
    def name(self) -> str:
        """For people."""
        return self.tenant or self.url

    @property
    def alive(self) -> bool:
        """Whether its process runs; of a server elsewhere, whether it answers."""
        return self.ready if self.elsewhere else self.process is not None and self.process.alive

    def view(self) -> ReplicaView:
        """As it is now."""
        pid = self.process.engine if self.process is not None and self.process.alive else None
        log = "" if self.elsewhere else str(self._around.store.log(self.tenant))
        return ReplicaView(
            self.name,
            self.url,
            self.tenant,
            self.alive,
            self.ready,
            self.outstanding,
            self.outstanding_tokens,
            pid,
            log,
        )

    # --- start and end

    async def bring_up(self) -> None:
        """Starts it and waits until it is ready, several times if need be. EngineRefused with its last lines."""
        patience = self._around.patience
        for attempt in range(patience.attempts):
            try:
                await self._start_once()
                return
            except (EngineRefused, DeadlineExceeded, Unavailable) as error:
                _logger.warning("%s: start %d of %d failed: %s", self.name, attempt + 1, patience.attempts, error)
                await self.end()
                if attempt + 1 == patience.attempts:
                    raise
                await asyncio.sleep(patience.pause(attempt))

    async def _start_once(self) -> None:
        if self.elsewhere:
            await self._wait_ready()
            return
        around = self._around
        self.port = choose_port(around.ports())
        what = launch(self.spec, self.tenant, self.port, around.settings)
        self.url = f"http://{HOST}:{self.port}"
        self._note(Record(self.spec, self.tenant, self.port, what.command, self._live))
        try:
            self.process = await EngineProcess.start(
                what.command,
                what.environment,
                lock=around.store.lock_path,
                place=around.store.place(self.tenant),
                log=around.store.log(self.tenant),
                grace=around.grace,
            )
        except (ElasticKVError, OSError) as error:
            raise EngineRefused(f"the engine {self.name} could not be started: {error}") from None
        await self._wait_ready()

    async def adopt(self, record: Record) -> bool:
        """Takes on an engine that an earlier gateway has started; whether it still runs."""
        store = self._around.store
        self.process = EngineProcess.adopt(store.place(self.tenant), store.log(self.tenant))
        if self.process is None:
            store.forget(self.tenant)
            return False
        self.port = record.port
        self.url = f"http://{HOST}:{record.port}"
        self._note(
            Record(self.spec, self.tenant, record.port, record.command, self._live, record.asleep, record.served)
        )
        return True

    async def settle(self) -> bool:
        """After adopt(): waits until it is ready as at a start; whether it sleeps."""
        await self._wait_ready(may_sleep=True)
        return not self.ready

    async def _wait_ready(self, *, may_sleep: bool = False) -> None:
        began = time.monotonic()
        until = began + self.spec.start_deadline
        while True:
            process = self.process
            if process is not None and process.ended.done():
                last = tail(process.log, 4)
                raise EngineRefused(
                    f"the engine {self.name} did not start: {process.ended.result()}; it said: {' | '.join(last)}",
                    lines=tail(process.log),
                )
            if may_sleep and await self.is_asleep():
                return  # and is not asked for its health, which some answer by generating a token
            if await self.healthy():
                self._served()
                return
            if time.monotonic() >= until:
                raise DeadlineExceeded(
                    f"waited {time.monotonic() - began:.0f} s for {self.name} to be ready"
                    + ("" if process is None else f"; its log {process.log} ends: {' | '.join(tail(process.log, 4))}")
                )
            waited = () if process is None else {process.ended}
            if waited:
                await asyncio.wait(waited, timeout=self._around.patience.poll)
            else:
                await asyncio.sleep(self._around.patience.poll)

    def _served(self) -> None:
        self.ready = True
        self.failed_since = None
        self._note_state(asleep=False)

    async def end(self) -> None:
        """Ends its process, if it is one of ours, and forgets it."""
        self.ready = False
        process, self.process = self.process, None
        if process is not None:
            await process.stop()
        if not self.elsewhere:
            self._around.store.forget(self.tenant)

    async def kill(self) -> None:
        """Ends it at once: it does not answer."""
        self.ready = False
        if self.process is not None:
            await self.process.kill()

    # --- questions and orders over HTTP

    async def healthy(self, timeout: float = _PROBE_S) -> bool:
        """Whether it says that it can serve."""
        try:
            answer = await self._around.client.get(f"{self.url}{self._server.health}", timeout=timeout)
        except (httpx.HTTPError, httpx.InvalidURL):
            return False
        return bool(answer.status_code == 200)

    async def is_asleep(self) -> bool:
        """Whether it says that it sleeps; where its server does not say, whether it was put to sleep and not woken."""
        if self.elsewhere:
            return False
        if not self._server.asleep:
            return self._record is not None and self._record.asleep
        try:
            answer = await self._around.client.get(f"{self.url}{self._server.asleep}", timeout=_PROBE_S)
            return answer.status_code == 200 and bool(answer.json().get("is_sleeping"))
        except (httpx.HTTPError, ValueError, AttributeError):
            return False

    async def sleep(self, within: float) -> None:
        """InvalidArgument where it cannot sleep at all; Unavailable where it would not now; DeadlineExceeded."""
        await self._order(self._server.sleep, within, "sleep")
        self.ready = False
        self._note_state(asleep=True)

    async def wake(self, within: float) -> None:
        """Unavailable where it sleeps on, for want of memory; DeadlineExceeded; EngineRefused where it has broken."""
        await self._order(self._server.wake, within, "wake up")
        if self._server.asleep and await self.is_asleep():
            raise Unavailable(f"the engine {self.name} was told to wake up and sleeps on")
        if not await self.healthy():
            raise EngineRefused(f"the engine {self.name} woke up and does not answer")
        self._served()

    async def _order(self, path: str, within: float, what: str) -> None:
        if self.elsewhere or not path:
            raise InvalidArgument(f"{self.name} runs elsewhere, or has no sleep; it cannot be told to {what}")
        try:
            answer = await self._around.client.post(
                f"{self.url}{path}",
                json={},  # some want a body, be it empty
                timeout=httpx.Timeout(within, connect=_PROBE_S),
            )
        except httpx.TimeoutException:
            raise DeadlineExceeded(f"waited {within:.0f} s for the engine {self.name} to {what}") from None
        except httpx.HTTPError as error:
            raise EngineRefused(f"the engine {self.name} broke off when it was told to {what}: {error}") from None
        if answer.status_code in (404, 405):
            raise InvalidArgument(f"the engine {self.name} knows no {path}; it cannot be told to {what}")
        if answer.status_code != 200:
            text = " ".join(answer.text.split())[:_SAY]
            raise Unavailable(f"the engine {self.name} did not {what}: status {answer.status_code}: {text}")

    # --- records

    def _note(self, record: Record) -> None:
        self._record = record
        self._around.store.write(record)

    def _note_state(self, *, asleep: bool) -> None:
        old = self._record
        if old is not None:
            self._note(dataclasses.replace(old, asleep=asleep, served=True))
