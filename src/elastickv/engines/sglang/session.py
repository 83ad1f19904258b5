"""One rank of a managed engine: from before its model is loaded until it ends."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any, Final

import torch

from elastickv.config import Settings
from elastickv.engines.sglang import entry, gate, ranks
from elastickv.engines.sglang.allocator import ElasticPagedAllocator, ElasticTokenAllocator, adopt
from elastickv.engines.sglang.bell import Bell
from elastickv.engines.sglang.channel import Channel
from elastickv.engines.sglang.holdings import Holdings
from elastickv.engines.sglang.layout import Rows
from elastickv.engines.sglang.occupation import Occupation
from elastickv.engines.sglang.queue import queued_tokens
from elastickv.engines.sglang.ration import Ration
from elastickv.engines.sglang.release import Release
from elastickv.errors import EngineRefused, Unavailable
from elastickv.memory import Cache, RankMemory, RankSpec, Tenancy, device_page
from elastickv.memory.asking import Asking
from elastickv.units import format_size

__all__ = ["Session", "current", "forget", "start"]

_logger = logging.getLogger("sglang.elastickv")

READY_S: Final = 60.0

_here: list[Session] = []


def start(settings: Settings, version: str, release: Release, scheduler: Any) -> Session:
    """The session of the one engine of this process."""
    if _here:
        raise EngineRefused("elastickv manages one SGLang scheduler a process, and there is one here already")
    session = Session(settings, version, release, scheduler)
    _here.append(session)
    return session


def current() -> Session:
    """The session of this process."""
    if not _here:
        raise EngineRefused(
            "a KV pool was made outside of a scheduler that elastickv knows; please report this with SGLang's version, "
            "or unset ELASTICKV to serve without it"
        )
    return _here[-1]


def forget() -> None:
    """Closes the session of this process, if there is one."""
    while _here:
        _here.pop().close()


class Session:
    """Used by the scheduler's thread."""

    def __init__(self, settings: Settings, version: str, release: Release, scheduler: Any) -> None:
        self.settings = settings
        self.version = version
        self.release = release
        self.scheduler = scheduler
        self.devices: list[str] = []
        """By rank."""
        self.rank = 0
        self.tenancy: Tenancy | None = None
        """Of the rank that decides."""
        self.cache: Cache | None = None
        self.memory: RankMemory | None = None
        self.holdings: Holdings | None = None
        self.occupation: Occupation | None = None
        self.channel = Channel()
        self._ration: Ration | None = None
        self._asking: Asking | None = None
        self._rows: Rows | None = None
        self._bell: Bell | None = None
        self._woken: Callable[[], None] = lambda: None
        self._longest = 0
        """Tokens of the longest request, where the budget bounds it."""
        self._fenced = 0
        self._fence_stream: Any = None

    # --- start

    def begin(self) -> None:
        """Refuses what cannot be managed, joins the ledgers, and leases the weights; nothing is loaded yet."""
        entry.check(self.scheduler.server_args)
        self.rank, self.devices = ranks.expected(self.settings, self.release.device())
        if self.rank == 0:
            self.tenancy = Tenancy.join(self.settings, self.devices, engine=f"sglang {self.version}")
            self.tenancy.watch_limits()
        self.holdings = Holdings.begin(self.tenancy, self.devices, self.rank, self.scheduler, self._while_waiting)
        self.occupation = Occupation(self, self.holdings)

    def engaged_occupation(self) -> Occupation:
        """What releases and resumes memory, once there is an engine."""
        occupation: Occupation = self._need(self.occupation)
        return occupation

    def _while_waiting(self) -> None:
        """While the engine waits for memory beside its cache."""
        if self.occupation is not None:
            self.occupation.while_waiting()

    def virtual_bytes(self) -> int:
        """How far the addresses of one rank reach, in bytes; the same on every rank. The model has been loaded."""
        self._need(self.holdings).loaded()
        mine = 0
        if self.tenancy is not None:
            shares = [
                (self.settings.virtual or self.tenancy.view(device).capacity) // self.devices.count(device)
                for device in set(self.devices)
            ]
            mine = min(shares)
        return ranks.from_first(mine)

    def attach_memory(self, rows: Rows) -> list[list[torch.Tensor]]:
        """The cache, made together with the other ranks, as this rank's buffers: by part, the tensors of all layers."""
        if self.memory is not None:
            raise EngineRefused(
                "this engine makes a second KV pool, and elastickv manages one; start without speculative decoding, "
                "or unset ELASTICKV to serve without it"
            )
        geometries = ranks.gather(rows.geometry(self.devices[self.rank]))
        blocks = 0
        specs: list[RankSpec] = []
        if self.tenancy is not None:
            page = device_page(self.devices[0], self.settings, self.tenancy.view(self.devices[0]).capacity)
            blocks = max(ranks.aligned(geometry, rows.blocks, page) for geometry in geometries)
            self.cache = self._make_cache(blocks, geometries, rows.name)
            specs = [self.cache.rank_spec(rank) for rank in range(len(geometries))]
        blocks, specs = ranks.from_first((blocks, specs))
        self.memory = self._need(self.holdings).memory = RankMemory.attach(specs[self.rank], allow_context=True)
        tensor = torch.from_dlpack(self.memory)
        self.memory.wait_block0(READY_S)
        pool = None
        if self.cache is not None:
            self.cache.wait_ready(READY_S)
            pool = self.cache.pool
            self._asking = Asking(pool)
        self._rows = rows
        self.channel = ranks.channel(self.rank)
        self._ration = Ration(pool, self.channel, rows.blocks - 1, self._ask)
        return rows.views(tensor, blocks)

    def _make_cache(self, blocks: int, geometries: list[Any], layout: str) -> Cache:
        tenancy = self._need(self.tenancy)
        until = time.monotonic() + self.settings.start_wait
        while True:
            try:
                return Cache.within(tenancy, num_blocks=blocks, ranks=geometries, layout=layout)
            except Unavailable as error:  # the neighbours have requests running in every page
                if time.monotonic() >= until:
                    raise
                _logger.warning("elastickv waits for its neighbours: %s", error)

    def _ask(self, blocks: int, patient: bool) -> None:
        asking = self._need(self._asking)
        # A queue is counted only where it does not move: then the neighbours are asked for all of it.
        queued = queued_tokens(self.scheduler.waiting_queue) if asking.starved else 0
        self._need(self.cache).pool.set_backlog(queued // self._need(self._rows).page_tokens)
        asking.ensure(blocks, patient=patient)

    def adopt_allocator(self, allocator: Any) -> Any:
        """SGLang's allocator, elastic."""
        return adopt(allocator, self._need(self._ration))

    def engaged(self, scheduler: Any) -> None:
        """Proves that everything is in place, or refuses; then begins to look after the engine."""
        ration = self._need(self._ration)
        holdings = self._need(self.holdings)
        gate.check_engaged(scheduler, self)
        holdings.ready()
        self._bound_requests(scheduler)
        ration.tree = scheduler.tree_cache
        ration.is_idle = scheduler.is_fully_idle
        ration.is_running = lambda: not scheduler.running_batch.is_empty()
        ration.on_more = self._open_admission
        if self.scheduler.device != "cpu":  # not before: nothing may be freed while graphs are captured
            self._need(self.memory).set_reclaimer(torch.cuda.empty_cache)
        if self.tenancy is None or self.cache is None:
            return
        self.tenancy.stop_watching()
        _logger.info("%s, %s", self.cache.describe(), holdings.describe())
        if scheduler.idle_sleeper is not None:
            self._bell = Bell(self.cache.pool)
            self._woken = self._bell.hang(scheduler.idle_sleeper)
            self._bell.start()

    def _bound_requests(self, scheduler: Any) -> None:
        """No request may be longer than what the budget holds; SGLang refuses such a one when it comes.

        It counts with the virtual cache, and a request that can never fit would hold up all that come after it.
        """
        tokens = ranks.from_first(self._budget_tokens())
        if tokens < self._need(self._rows).page_tokens:
            raise EngineRefused(
                "elastickv cannot manage this engine: its budget holds no page of its cache beside the null page; "
                "raise the limit or the capacity"
            )
        if scheduler.max_req_len > tokens:
            cut = scheduler.max_req_len - tokens
            scheduler.max_req_len -= cut
            scheduler.max_req_input_len = max(1, scheduler.max_req_input_len - cut)
            beams = getattr(scheduler, "beam_coordinator", None)
            if beams is not None:
                beams.max_req_len = scheduler.max_req_len
            self._longest = tokens
            if self.rank == 0:
                _logger.warning("elastickv: %s", self._why_longest())

    def _why_longest(self) -> str:
        budget = ""
        if self.tenancy is not None:
            budget = f" of {format_size(min(self.tenancy.budget(device) for device in self.devices))}"
        return (
            f"requests of {self.settings.tenant_name} may have {self._longest} tokens, as many as fit in the "
            f"budget{budget} that its limit, or the capacity, leaves the cache; for longer ones raise that and start "
            "the engine anew"
        )

    def explain_length(self, refusal: str) -> str:
        """SGLang's `refusal` of a request that is too long, with elastickv's part in it."""
        return f"{refusal} elastickv: {self._why_longest()}." if self._longest else refusal

    def _budget_tokens(self) -> int:
        """Tokens that the limit, or the capacity, holds as they are now."""
        if self.tenancy is None or self.cache is None:
            return 0
        geometry, rows = self.cache.geometry, self._need(self._rows)
        pages = min(self.tenancy.budget(device) // geometry.page_cost(device) for device in geometry.devices)
        blocks = min(pages * geometry.page_bytes // geometry.block_bytes, rows.blocks) - 1
        spare = 2 if blocks > 2 else 0  # SGLang counts a page more than a request has, and wants one to be left
        return int(max(0, blocks - spare) * rows.page_tokens)

    def holds(self, pool: Any) -> bool:
        """Whether every buffer of SGLang's pool lies in the elastic range."""
        memory = self._need(self.memory)
        low, high = memory.address, memory.address + memory.tensor_bytes
        buffers = [*(getattr(pool, "k_buffer", None) or []), *(getattr(pool, "v_buffer", None) or [])]
        buffers += list(getattr(pool, "kv_buffer", None) or [])
        return bool(buffers) and all(low <= buffer.data_ptr() < high for buffer in buffers)

    @staticmethod
    def allocators() -> tuple[type, ...]:
        """The classes that an engaged engine's allocator may be of."""
        return ElasticTokenAllocator, ElasticPagedAllocator

    # --- steps

    def tick(self) -> None:
        """Before each step, also where there is none to run."""
        ration = self._ration
        if ration is None or ration.tree is None:
            return
        self._woken()
        self._need(self.holdings).tick()
        ticket = ration.look()
        if ticket > self._fenced:
            self._fence(ticket)

    def _open_admission(self) -> None:
        """SGLang closes admission when a request finds no memory, until a running one ends. Here it comes otherwise,
        too: from a neighbour, or with a limit."""
        self.scheduler.running_batch.batch_is_full = False

    def _fence(self, ticket: int) -> None:
        """Pages of orders up to `ticket` go once the device has passed what is launched by now."""
        memory = self._need(self.memory)
        self._fenced = ticket
        if self.scheduler.device == "cpu":
            memory.fence(ticket, 0)
            return
        stream = self._fence_stream
        if stream is None:
            stream = self._fence_stream = torch.cuda.Stream()
        # Steps run on the forward stream, and without overlap on the current one; the list is cut on the current one.
        stream.wait_stream(torch.cuda.current_stream())
        stream.wait_stream(self.scheduler.forward_stream)
        memory.fence(ticket, stream.cuda_stream)

    def order_all_back(self) -> None:
        """All pages of the cache are to go: SGLang has dropped its prefixes, and nothing runs."""
        self._fence(self._need(self._ration).give_all())

    def close(self) -> None:
        """Leaves the ledger."""
        if self._bell is not None:
            self._bell.stop()
        self.channel.close()
        if self.cache is not None:
            cache, self.cache = self.cache, None
            cache.close()
        if self.memory is not None:
            memory, self.memory = self.memory, None
            memory.close()
        if self.holdings is not None:
            holdings, self.holdings = self.holdings, None
            holdings.close()
        if self.tenancy is not None:
            tenancy, self.tenancy = self.tenancy, None
            tenancy.close()

    @staticmethod
    def _need(part: Any) -> Any:
        if part is None:
            raise EngineRefused("elastickv was asked for a part of this engine before its start; please report this")
        return part
