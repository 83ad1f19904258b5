"""All models of a gateway: added and removed, watched, put to sleep by the policy. Belongs to the event loop."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import httpx

from elastickv.config import Settings
from elastickv.errors import AlreadyExists, ElasticKVError, NotFound
from elastickv.gateway.asleep import HeldRow, held_rows
from elastickv.gateway.base import ModelView
from elastickv.gateway.launch import same_engine, tenant_names
from elastickv.gateway.model import ServedModel
from elastickv.gateway.policy import decide
from elastickv.gateway.process import EngineProcess
from elastickv.gateway.records import Record, Store, default_state
from elastickv.gateway.replica import Patience, Surroundings
from elastickv.gateway.spec import GatewaySpec, ModelSpec
from elastickv.ledger import DeviceView
from elastickv.telemetry.reader import LedgerReader

__all__ = ["EngineFleet"]

_logger = logging.getLogger("elastickv.gateway")

_TRIM_EVERY_S: Final = 60.0


class EngineFleet:
    """See the module and base.Fleet. Taking the state directory is the first thing it does: one gateway for each."""

    def __init__(
        self,
        spec: GatewaySpec,
        settings: Settings,
        *,
        state: Path | None = None,
        patience: Patience | None = None,
        on_removed: Callable[[str], None] | None = None,
    ) -> None:
        """Nothing is started yet. ConfigError, NotFound or AlreadyExists where the models cannot be served so.

        `on_removed` is told the name of a model that has gone.
        """
        self._on_removed = on_removed
        self.url = ""
        """Where the gateway listens, for those who look into its state directory."""
        self._models: dict[str, ServedModel] = {}
        self._patience = patience or Patience()
        self._reader = LedgerReader(settings.directory, "states of engines")
        self._watching: asyncio.Task[None] | None = None
        self._changed = True
        self._probing: asyncio.Task[None] | None = None
        # A connection for each question: servers close theirs after an answer that is an error.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        self._client = httpx.AsyncClient(trust_env=False, limits=limits)
        self._store = Store(state or default_state(settings.directory))
        self._around = Surroundings(settings, self._store, self._client, spec.orphan_grace, self._patience, self._ports)
        try:
            for model in spec.models:
                self._admit(model, live=False)
        except ElasticKVError:
            self._store.close()
            raise

    # --- what others see

    def models(self) -> list[ModelView]:
        """See base.Fleet."""
        return [model.view() for model in self._models.values()]

    def model(self, name: str) -> ServedModel:
        """See base.Fleet."""
        found = self._models.get(name)
        if found is None:
            there = f"there are: {', '.join(self._models)}" if self._models else "there is none"
            raise NotFound(f"there is no model {name[:64]!r}; {there}", model=name)
        return found

    # --- orders

    async def add(self, spec: ModelSpec) -> None:
        """See base.Fleet."""
        model = self._admit(spec, live=True)
        if spec.start:
            model.begin_start("it was added")

    async def remove(self, name: str) -> None:
        """See base.Fleet."""
        model = self.model(name)
        try:
            await model.close("being removed", model.spec.drain_deadline)
        finally:
            self._models.pop(name, None)
            self._changed = True
            if self._on_removed is not None:
                self._on_removed(name)

    async def sleep(self, name: str) -> None:
        """See base.Fleet."""
        await self.model(name).sleep("it was asked to")

    async def wake(self, name: str) -> None:
        """See base.Fleet."""
        await self.model(name).wake("it was asked to")

    async def start(self) -> None:
        """See base.Fleet."""
        found = await self._sort_out(self._store.read())
        for name, model in self._models.items():
            records = found.get(name, [])
            if records:
                model.begin_adopt(records)
            elif model.spec.start:
                model.begin_start("the gateway was started")
        self._watching = asyncio.create_task(self._watch(), name="fleet")
        self._watching.add_done_callback(_say_why)

    async def stop(self, drain_s: float) -> None:
        """See base.Fleet. A second call does nothing."""
        if self._client.is_closed:
            return
        for task in (self._watching, self._probing):
            if task is not None:
                task.cancel()
                await asyncio.wait({task})
        await asyncio.gather(*(model.close("being stopped", drain_s) for model in self._models.values()))
        await self._client.aclose()
        self._store.close()

    def _admit(self, spec: ModelSpec, *, live: bool) -> ServedModel:
        if spec.name in self._models:
            raise AlreadyExists(f"there is a model {spec.name!r} already; remove it first", model=spec.name)
        taken = {tenant for model in self._models.values() for tenant in model.tenants}
        for tenant in taken & set(tenant_names(spec)):
            raise AlreadyExists(
                f"model {spec.name}: another model's engine is named {tenant!r} already", model=spec.name
            )
        self._models[spec.name] = model = ServedModel(spec, self._around, self._held, self._on_change, live=live)
        self._changed = True
        return model

    def _ports(self) -> set[int]:
        return {replica.port for model in self._models.values() for replica in model.replicas}

    # --- engines of an earlier gateway

    async def _sort_out(self, records: Sequence[Record]) -> dict[str, list[Record]]:
        """Those to adopt, by model; the others are ended. Models that had been added live are served again."""
        found: dict[str, list[Record]] = {}
        for record in records:
            name = record.model.name
            if record.live and name not in self._models and self._runs(record):
                try:
                    self._admit(record.model, live=True)
                except ElasticKVError as error:
                    _logger.warning("%s, which had been added while a gateway ran, is not served: %s", name, error)
            model = self._models.get(name)
            if model is not None and record.replica in model.tenants and same_engine(record.model, model.spec):
                found.setdefault(name, []).append(record)
            else:
                await self._end(record)
        return found

    def _process(self, record: Record) -> EngineProcess | None:
        return EngineProcess.adopt(self._store.place(record.replica), self._store.log(record.replica))

    def _runs(self, record: Record) -> bool:
        process = self._process(record)
        if process is not None:
            process.let_go()
        return process is not None

    async def _end(self, record: Record) -> None:
        process = self._process(record)
        if process is not None:
            _logger.info("%s: found running, and not as it is to be served now; it is ended", record.replica)
            await process.stop()
        self._store.forget(record.replica)

    # --- watching

    async def _watch(self) -> None:
        probed = trimmed = time.monotonic()
        while True:
            try:
                now = time.monotonic()
                self._decide(await self._devices())
                if now - probed >= self._patience.probe and (self._probing is None or self._probing.done()):
                    self._probing = asyncio.create_task(self._probe(), name="probes")
                    probed = now
                if now - trimmed >= _TRIM_EVERY_S:
                    await asyncio.to_thread(self._trim_logs)
                    trimmed = now
            except (ElasticKVError, OSError) as error:
                _logger.error("the models cannot be watched: %s", error)
            await asyncio.sleep(self._patience.look)

    def _decide(self, devices: dict[str, DeviceView]) -> None:
        for action in decide([model.standing() for model in self._models.values()], devices):
            self._models[action.name].begin(action.what, action.reason)
        if self._changed:
            self._changed = False
            self._store.write_view(self.url, self.models())

    async def _probe(self) -> None:
        await asyncio.gather(*(model.probe() for model in list(self._models.values())))

    def _trim_logs(self) -> None:
        for model in list(self._models.values()):
            for replica in model.replicas:
                if replica.process is not None:
                    replica.process.trim_log()

    async def _devices(self) -> dict[str, DeviceView]:
        read = await asyncio.to_thread(lambda: dict(self._reader.read()))
        return {device: view for device, view in read.items() if view is not None}

    async def _held(self, tenants: Sequence[str]) -> list[HeldRow]:
        return held_rows(await self._devices(), tenants)

    def _on_change(self) -> None:
        self._changed = True


def _say_why(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and task.exception() is not None:
        _logger.critical("nobody watches the models any more", exc_info=task.exception())
