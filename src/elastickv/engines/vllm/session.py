"""One managed engine, in the process that schedules: from the first look at its configuration to its shutdown."""

from __future__ import annotations

import os
import threading
import time
from typing import Any, Final

from vllm.logger import init_logger

from elastickv.config import Settings
from elastickv.engines.vllm import budget, gate, geometry, scheduler
from elastickv.engines.vllm.blockpool import ElasticBlockPool
from elastickv.engines.vllm.idle import EngineSteward
from elastickv.errors import DeadlineExceeded, EngineRefused, Unavailable
from elastickv.memory import Cache, RankGeometry, device_page, open_device_ledger

__all__ = ["Session", "any_here", "close", "find", "leave"]

_logger = init_logger("vllm.elastickv")

READY_S: Final = 60.0
ROOM_S: Final = 120.0
"""How long a start waits until the neighbours leave room for the first page, in seconds."""
RPC_S: Final = 60.0

_sessions: list[Session] = []


def any_here() -> bool:
    """Whether an engine schedules in this process (one that was inherited by a fork does not)."""
    return any(session.pid == os.getpid() for session in _sessions)


def find(config: Any) -> Session:
    """The session of the engine with this VllmConfig (the object itself, not one like it)."""
    for session in _sessions:
        if session.config is config:
            return session
    raise EngineRefused(
        "elastickv does not know the engine that this part belongs to: its executor was made without the plug-in; "
        "please report this with vLLM's version, or unset ELASTICKV to serve without it"
    )


def leave(config: Any) -> None:
    """Stops looking after the engine with this VllmConfig: its workers are about to go."""
    for session in list(_sessions):
        if session.config is config:
            session.stop_steward()


def close(config: Any) -> None:
    """Closes the session of the engine with this VllmConfig, if it is still open."""
    for session in list(_sessions):
        if session.config is config:
            session.close()


class Session:
    """Used by the engine's thread. `lock` is for an engine without a thread of its own, see idle.py."""

    def __init__(self, config: Any, settings: Settings, version: str) -> None:
        """Refuses what `config` shows to be impossible, and sets the sizes in it."""
        gate.check_config(config)
        gate.check_worker_class(_resolve(config.parallel_config.worker_cls))
        self.config = config
        self.pid = os.getpid()
        self.settings = settings
        self.version = version
        self.wish = budget.silence_vllm(config, settings.virtual)
        self.lock = threading.RLock()
        self.engine: Any = None
        self.executor: Any = None
        self.devices: list[budget.Device] = []
        self.shapes: list[RankGeometry] = []
        self.cache: Cache | None = None
        self.pool: ElasticBlockPool | None = None
        self.scheduler: Any = None
        self._steward: EngineSteward | None = None
        self._capacity: dict[str, int] = {}
        self._sent = 0
        self._prove = False
        _sessions.append(self)

    # --- start

    def look_at_ranks(self, executor: Any) -> None:
        """Learns each rank's device and backends; called once the models are loaded."""
        self.executor = executor
        reports = executor.collective_rpc("elastickv_look", timeout=RPC_S)
        for report in reports:
            gate.check_backends(report["backends"])
        self._capacity = {report["device"]: report["capacity"] for report in reports if report["capacity"]}
        known = {name: self._device(name) for name in dict.fromkeys(report["device"] for report in reports)}
        self.devices = [known[report["device"]] for report in reports]

    def _device(self, name: str) -> budget.Device:
        settings = self.settings
        if settings.device not in ("auto", name) and not settings.device.isdecimal():
            raise EngineRefused(
                f"elastickv was told to manage {settings.device}, and this engine runs on {name}; "
                "correct ELASTICKV_DEVICE or leave it out"
            )
        view = open_device_ledger(name, settings, self._capacity.get(name)).view()
        limit = settings.limit
        if not settings.set_limit:
            kept = [row["limit_wanted"] for row in view["tenants"] if row["name"] == settings.tenant_name]
            limit = kept[0] if kept else None
        capacity = int(view["capacity"])
        return budget.Device(name, device_page(name, settings, capacity), capacity, limit)

    def plan(self, planner: budget.Planner, specs: list[dict[str, Any]]) -> list[Any]:
        """The configuration of each rank's cache, sized by the tenant's budget."""
        from vllm.v1.core.kv_cache_utils import get_max_concurrency_for_kv_cache_config as concurrency

        planned = budget.plan(planner, self.config, specs, self.devices, self.wish, concurrency)
        on_cpu = all(device.name == "host" for device in self.devices)
        gate.check_groups(self.config, planned.configs[0].kv_cache_groups, on_cpu=on_cpu)
        self.shapes = planned.ranks
        return planned.configs

    def create_cache(self, configs: list[Any]) -> None:
        """Joins the ledger and puts on each rank's configuration what the rank needs to attach."""
        layout = geometry.describe(self.shapes, configs[0].kv_cache_layout)
        until = time.monotonic() + ROOM_S
        while self.cache is None:
            try:
                self.cache = Cache.create(
                    self.settings,
                    num_blocks=configs[0].num_blocks,
                    ranks=self.shapes,
                    engine=f"vllm {self.version}",
                    layout=layout,
                    capacity=self._capacity,
                )
            except Unavailable as error:  # the neighbours have requests running in every page
                if time.monotonic() >= until:
                    raise
                _logger.warning("elastickv waits for its neighbours: %s", error)
        for rank, config in enumerate(configs):
            config.elastickv = self.cache.rank_spec(rank)

    def adopt_scheduler(self, made: Any) -> None:
        """Makes the scheduler's pool elastic, proves that everything is hooked, and starts looking after it."""
        try:
            cache = self._need_cache()
            cache.wait_ready(READY_S)
            watermark = self.config.scheduler_config.watermark
            self.pool = scheduler.attach(made, cache.pool, self.budget_blocks, watermark)
            self.scheduler = made
            self._check_engaged(made)
        except BaseException:  # the engine will not be; its place on the ledger must not stay
            self.close()
            raise
        _logger.info("%s", cache.describe())
        self._steward = EngineSteward(self, self.pool.native)
        self._steward.start()

    def _check_engaged(self, made: Any) -> None:
        """Sends an empty step through, as a real one goes, and looks whether its order arrived everywhere."""
        self._prove = True
        self.executor.execute_model(made.schedule())
        for rank, report in enumerate(self.executor.collective_rpc("elastickv_report", timeout=RPC_S)):
            missing = [what for what in ("memory", "tensors", "tickets") if not report[what]]
            if missing:
                raise EngineRefused(
                    f"elastickv is not in charge of rank {rank}: no {', '.join(missing)} of it "
                    f"(vLLM {self.version}); please report this, or unset ELASTICKV to serve without it"
                )

    def budget_blocks(self) -> int:
        """How many blocks the tenant may hold under its limit as it is now."""
        cache = self._need_cache()
        room = cache.geometry.num_blocks
        for device in self.devices:
            limit = cache.tenants[device.name].limit_wanted[0]
            budget_bytes = device.capacity if limit is None else min(limit, device.capacity)
            per_block = sum(s.spans * s.block_bytes for s in self.shapes if s.device == device.name)
            room = min(room, budget_bytes // per_block)
        return max(1, room - 1)

    def _need_cache(self) -> Cache:
        if self.cache is None:
            raise EngineRefused("elastickv was asked for the cache before vLLM planned it; please report this")
        return self.cache

    # --- steps

    def before_step(self) -> None:
        """Does what neighbours and limits ask; cheap when they ask nothing."""
        pool = self.pool
        if pool is not None and pool.native.attention():
            pool.forget(pool.native.maintain(False))

    def after_step(self, output: Any) -> None:
        """Puts the newest order on the step, and slows a starved engine down."""
        pool = self.pool
        if pool is None:
            return
        ticket = pool.native.ticket()
        if ticket > self._sent or self._prove:
            self._prove = False
            output.elastickv_ticket = ticket
            self._sent = ticket
        scheduler.throttle(self.scheduler, output, pool)

    # --- outside of steps

    def maintain_idle(self) -> None:
        """The same between steps, with the idle clock; the order goes by itself."""
        pool = self.pool
        if pool is not None and self.cache is not None:
            evicted = pool.native.maintain(True)
            pool.forget(evicted)
            self.flush()
            if evicted:
                scheduler.publish_events(self.scheduler)

    def flush(self) -> None:
        """Sends an order that no step has taken along yet."""
        pool = self.pool
        if pool is None or self.cache is None:
            return
        ticket = pool.native.ticket()
        if ticket > self._sent:
            self.executor.collective_rpc("elastickv_fence", timeout=RPC_S, args=(ticket,))
            self._sent = ticket

    @property
    def idle(self) -> bool:
        """Whether no request is in the engine. May be asked from any thread.

        Requests that have finished do not count: in the caller's process they stay noted until its next step.
        """
        return self.pool is not None and not self.scheduler.has_unfinished_requests()

    def stop_steward(self) -> None:
        """Ends the thread that looks after the idle engine; it may be asked twice."""
        steward, self._steward = self._steward, None
        if steward is not None and not steward.stop():
            _logger.warning("elastickv's thread did not end in time; process %d goes on without it", os.getpid())

    def close(self) -> None:
        """Leaves the ledger. The workers are gone by now, or go with this process."""
        if self in _sessions:
            _sessions.remove(self)
        self.stop_steward()
        if self.cache is not None:
            cache, self.cache = self.cache, None
            try:
                cache.close()
            except DeadlineExceeded as error:
                _logger.warning("elastickv: %s", error)


def _resolve(name: str) -> type:
    from vllm.utils.import_utils import resolve_obj_by_qualname

    found: type = resolve_obj_by_qualname(name)
    return found
