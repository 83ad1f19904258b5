"""One managed engine, in the process that schedules: from the first look at its configuration to its shutdown."""

from __future__ import annotations

import os
import threading
import time
from typing import Any, Final, TypeVar

from vllm.logger import init_logger

from elastickv.config import Settings
from elastickv.engines.static import Footprint, StaticLease
from elastickv.engines.vllm import budget, cpu_sleep, gate, geometry, preempt, ranks, scheduler, weights, window
from elastickv.engines.vllm.blockpool import ElasticBlockPool
from elastickv.engines.vllm.idle import EngineSteward
from elastickv.errors import DeadlineExceeded, EngineRefused, Unavailable
from elastickv.memory import Cache, RankGeometry, Tenancy, device_page
from elastickv.planning.static import static_bytes

__all__ = ["Session", "any_here", "close", "find", "leave", "newest_here"]

_logger = init_logger("vllm.elastickv")

READY_S: Final = 60.0
RPC_S: Final = 60.0

_Part = TypeVar("_Part")

_sessions: list[Session] = []


def any_here() -> bool:
    """Whether an engine schedules in this process (one that was inherited by a fork does not)."""
    return newest_here() is not None


def newest_here() -> Session | None:
    """The session of the engine that is being made in this process, or None in a worker's own."""
    here = [session for session in _sessions if session.pid == os.getpid()]
    return here[-1] if here else None


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
        self.ranks: list[str] = []
        self.tenancy: Tenancy | None = None
        self._static: StaticLease | None = None
        self.members: list[Any] = []
        """Of workers in this process; they leave the ledger with the session."""
        self.devices: list[budget.Device] = []
        self.shapes: list[RankGeometry] = []
        self.cache: Cache | None = None
        self.pool: ElasticBlockPool | None = None
        self.scheduler: Any = None
        self.windows: window.Rule | None = None
        self._steward: EngineSteward | None = None
        self.was_paused = False
        """Whether the scheduler had been paused before the engine was last told to sleep."""
        self._sent = 0
        self._prove = False
        _sessions.append(self)

    # --- start

    def begin(self) -> None:
        """Joins the ledgers and leases what the engine will hold besides its cache; nothing is loaded yet."""
        self.ranks = ranks.expected(self.config, self.settings)
        self.tenancy = Tenancy.join(self.settings, self.ranks, engine=f"vllm {self.version}")
        self.tenancy.watch_limits()
        self._static = static = StaticLease(self.tenancy, self.ranks, self._while_waiting, _logger)
        self.config.elastickv_place = self.tenancy.place(self.ranks, publishes=static.counted)
        if static.counted:
            on_gpu = "host" not in self.ranks
            needs = weights.of_ranks(self.config) if static.fixed is None else [0] * len(self.ranks)
            besides = cpu_sleep.packed_besides(self.config)
            static.reserve([static_bytes(size, on_gpu=on_gpu) + besides for size in needs])

    def look_at_ranks(self, executor: Any) -> None:
        """Learns each rank's device and backends, and what it has taken; called once the models are loaded."""
        self.executor = executor
        tenancy, static = self._need(self.tenancy), self.static_lease
        reports = executor.collective_rpc("elastickv_look", timeout=RPC_S)
        ranks.check(self.ranks, [report["device"] for report in reports])
        for report in reports:
            gate.check_backends(report["backends"])
        eager = bool(self.config.model_config.enforce_eager) or "host" in self.ranks
        static.true_up([report["footprint"] for report in reports], more_to_come=not eager)
        known = {name: self._device(tenancy, name) for name in tenancy.tenants}
        self.devices = [known[name] for name in self.ranks]

    def warmed_up(self, executor: Any) -> None:
        """Corrects what is leased besides the cache once graphs are captured."""
        self.executor = executor
        self.static_lease.true_up(self.footprints(), more_to_come=False)

    @property
    def static_lease(self) -> StaticLease:
        """What is leased besides the cache."""
        return self._need(self._static)

    def footprints(self) -> list[Footprint]:
        """What each rank has besides its cache now; the ranks publish it on the ledger too."""
        reports: list[Footprint] = self.executor.collective_rpc("elastickv_footprint", timeout=RPC_S)
        return reports

    def describe(self, state: str) -> None:
        """Puts the engine, its version and its state on the ledger, for people."""
        text = f"vllm {self.version}" + (f", {state}" if state else "")
        for tenant in self._need(self.tenancy).tenants.values():
            tenant.describe(engine=text)

    def _device(self, tenancy: Tenancy, name: str) -> budget.Device:
        view = tenancy.view(name)
        tenant = tenancy.tenants[name]
        page = device_page(name, self.settings, view.capacity)
        firm = sum(max(row.floor, row.static_bytes) for row in view.living if row.incarnation != tenant.incarnation)
        limit, others = tenant.limit_wanted[0], firm + view.unmanaged
        return budget.Device(name, page, view.capacity, limit, tenant.static_bytes, others)

    def _while_waiting(self) -> None:
        """What must go on while the engine's thread waits for its neighbours."""
        if self.pool is None:
            self._need(self.tenancy).acknowledge_limits()
        else:
            self.maintain_idle()

    def plan(self, planner: budget.Planner, specs: list[dict[str, Any]]) -> list[Any]:
        """The configuration of each rank's cache, sized by the tenant's budget."""
        from vllm.v1.core.kv_cache_utils import get_max_concurrency_for_kv_cache_config as concurrency

        on_cpu = all(device.name == "host" for device in self.devices)
        always = self.settings.hold_windows == "always"
        self.windows = window.Rule(self.config, self.version, on_cpu=on_cpu, always=always)
        counted = window.concurrency(concurrency, self.windows)
        planned = budget.plan(planner, self.config, specs, self.devices, self.wish, counted)
        gate.check_groups(planned.configs[0].kv_cache_groups, on_cpu=on_cpu)
        self.shapes = planned.ranks
        if planned.warning:
            _logger.warning("elastickv: %s", planned.warning)
        return planned.configs

    def create_cache(self, configs: list[Any]) -> None:
        """Makes the cache and puts on each rank's configuration what the rank needs to attach."""
        layout = geometry.describe(self.shapes, configs[0].kv_cache_layout)
        tenancy = self._need(self.tenancy)
        until = time.monotonic() + self.settings.start_wait
        while self.cache is None:
            try:
                blocks = configs[0].num_blocks
                self.cache = Cache.within(tenancy, num_blocks=blocks, ranks=self.shapes, layout=layout)
            except Unavailable as error:  # the neighbours have requests running in every page
                if time.monotonic() >= until:
                    raise
                _logger.warning("elastickv waits for its neighbours: %s", error)
        for rank, config in enumerate(configs):
            config.elastickv = self.cache.rank_spec(rank)

    def adopt_scheduler(self, made: Any) -> None:
        """Makes the scheduler's pool elastic, proves that everything is hooked, and starts looking after it."""
        try:
            cache = self._need(self.cache)
            cache.wait_ready(READY_S)
            watermark = self.config.scheduler_config.watermark
            self.pool = scheduler.attach(made, cache.pool, self.budget_blocks, watermark)
            self._hold_windows(made.kv_cache_manager)
            self.scheduler = made
            self._check_engaged(made)
        except BaseException:  # the engine will not be; its place on the ledger must not stay
            self.close()
            raise
        _logger.info("%s, %s", cache.describe(), self.static_lease.describe())
        self._need(self.tenancy).stop_watching()
        self._steward = EngineSteward(self, self.pool.native)
        self._steward.start()

    def _hold_windows(self, manager: Any) -> None:
        rule, groups = self._need(self.windows), manager.kv_cache_config.kv_cache_groups
        window.hold(manager.coordinator, rule.groups(groups))
        text = rule.describe(groups)
        if text:
            _logger.info("elastickv: %s", text)

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
        cache = self._need(self.cache)
        room = cache.geometry.num_blocks
        for device in self.devices:
            tenant = cache.tenants[device.name]
            now = device._replace(limit=tenant.limit_wanted[0], static=tenant.static_bytes)
            per_block = sum(s.spans * s.block_bytes for s in self.shapes if s.device == device.name)
            room = min(room, now.budget // per_block)
        return max(1, room - 1)

    @staticmethod
    def _need(part: _Part | None) -> _Part:
        if part is None:
            raise EngineRefused("elastickv was asked for a part of this engine before its start; please report this")
        return part

    # --- steps

    def before_step(self) -> None:
        """Does what neighbours and limits ask; cheap when they ask nothing."""
        pool = self.pool
        if pool is None:
            return
        scheduler.announce(self.scheduler, pool)
        if pool.native.attention():
            pool.forget(pool.native.maintain(False))
            preempt.enforce(self.scheduler, pool)

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
            preempt.enforce(self.scheduler, pool)  # a paused engine keeps requests that do not run
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
        for member in self.members:
            member.close()
        self.members.clear()
        if self.tenancy is not None:
            tenancy, self.tenancy = self.tenancy, None
            tenancy.close()


def _resolve(name: str) -> type:
    from vllm.utils.import_utils import resolve_obj_by_qualname

    found: type = resolve_obj_by_qualname(name)
    return found
