"""Plays SGLang's own allocators over elastic memory, without an engine: python lists.py DIRECTORY KIND SEED.

Requests come, grow, end, and leave prefixes behind; limits move and a neighbour comes and goes. After every step what
is counted must add up, and every token that was handed out is written to: without memory behind it, that is a fault.
"""

from __future__ import annotations

import json
import random
import sys
import time
import warnings
from collections import deque
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any, Final

import torch

from elastickv import _core
from elastickv.config import Settings
from elastickv.memory import Cache, RankGeometry, RankMemory
from elastickv.memory.asking import Asking

BLOCKS: Final = 256
BLOCK_BYTES: Final = 4096
PAGE: Final = 16384
CAPACITY: Final = 1 << 20


class Tree:
    """Prefixes in the order in which they were left."""

    def __init__(self, allocator: Any) -> None:
        self.allocator = allocator
        self.kept: deque[torch.Tensor] = deque()

    def supports_prefix_sharing(self) -> bool:
        return True

    def supports_mamba(self) -> bool:
        return False

    def evictable_size(self) -> int:
        return sum(len(ids) for ids in self.kept)

    def evict(self, params: Any) -> Any:
        gone = 0
        while gone < params.num_tokens and self.kept:
            ids = self.kept.popleft()
            gone += len(ids)
            self.allocator.free(ids)
        return SimpleNamespace(num_tokens_evicted=gone)


class Play:
    def __init__(self, directory: str, kind: str, seed: int) -> None:
        from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator
        from sglang.srt.mem_cache.allocator.token import TokenToKVPoolAllocator

        from elastickv.engines.sglang.allocator import adopt
        from elastickv.engines.sglang.channel import Channel
        from elastickv.engines.sglang.ration import Ration

        arguments = {"directory": directory, "device": "host", "capacity": CAPACITY, "page": PAGE, "name": "one"}
        settings = Settings.load(arguments={**arguments, "idle_release": "0.2", "give_back_wait": 1})
        self.cache = Cache.create(settings, num_blocks=BLOCKS + 1, ranks=[RankGeometry("host", 1, BLOCK_BYTES)])
        self.memory = RankMemory.attach(self.cache.rank_spec(0))
        self.cache.wait_ready(20)
        self.bytes = torch.from_dlpack(self.memory)
        asking = Asking(self.cache.pool)
        self.ration = Ration(self.cache.pool, Channel(), BLOCKS, lambda n, patient: asking.ensure(n, patient=patient))
        page = 16 if kind == "paged" else 1
        stock: Any = (
            PagedTokenToKVPoolAllocator(BLOCKS * page, page, torch.float32, "cpu", None, False)
            if page > 1
            else TokenToKVPoolAllocator(BLOCKS, torch.float32, "cpu", None, False)
        )
        self.allocator = adopt(stock, self.ration)
        self.page = page
        self.tree = self.ration.tree = Tree(self.allocator)
        self.running: list[torch.Tensor] = []
        self.random = random.Random(seed)
        self.fenced = 0
        self.refused = self.evictions = 0

    def look(self) -> None:
        ticket = self.ration.look()
        if ticket > self.fenced:
            self.fenced = ticket
            self.memory.fence(ticket)

    def begin(self, blocks: int) -> None:
        tokens = blocks * self.page
        before = self.tree.evictable_size()
        self.allocator.evict_to_free_tokens(self.tree, tokens)
        self.evictions += before - self.tree.evictable_size()
        ids = self.allocator.alloc(tokens)
        if ids is None:
            self.refused += 1
            return
        assert len(ids) == tokens
        for block in sorted({int(one) // self.page for one in ids}):
            assert block != 0
            self.bytes[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES] = 1
        self.running.append(ids)
        every = torch.cat([*self.running, *self.tree.kept])
        assert len(every.unique()) == len(every), "a token was handed out twice"

    def end(self) -> None:
        ids = self.running.pop(self.random.randrange(len(self.running)))
        if self.random.random() < 0.6:
            self.tree.kept.append(ids)
        else:
            self.allocator.free(ids)

    def check(self) -> None:
        used = sum(len(ids) for ids in self.running)
        counted = used + self.tree.evictable_size() + self.allocator.available_size() + self.allocator.withheld_size()
        assert counted == BLOCKS * self.page, (counted, used)
        assert self.allocator.withheld_size() >= 0
        assert self.ration.held <= BLOCKS

    def moves(self, ledger: Any, steps: int) -> None:
        for step in range(steps):
            if step % 7 == 0:
                ledger.order_limit("one", self.random.choice([CAPACITY // 4, CAPACITY // 2, CAPACITY]))
            self.look()
            self.check()
            if self.running and self.random.random() < 0.5:
                self.end()
            else:
                self.begin(self.random.choice([1, 1, 2, 5, 20]))
            self.check()

    def wanted_again(self, ledger: Any) -> None:
        """Demand comes back while memory is on its way out: it is out of reach under the limit, and then taken back."""
        pool = self.cache.pool
        ledger.order_limit("one", CAPACITY)
        end = time.monotonic() + 30
        while not self.running:  # one that waits for a millisecond only
            assert time.monotonic() < end, pool.stats()
            self.look()
            self.begin(200)
        self.allocator.free(self.running.pop())
        ledger.order_limit("one", CAPACITY // 4)
        while pool.stats()["transit"] < CAPACITY // 2:  # ordered, and no rank has recorded a fence for it
            assert time.monotonic() < end
            self.ration.look()
        refused, before = self.refused, pool.stats()
        self.begin(200)
        self.check()
        assert self.refused == refused + 1
        assert pool.stats()["transit"] > CAPACITY // 2
        ledger.order_limit("one", CAPACITY)
        while not self.running:  # there is no other memory: it is all on the way out
            assert time.monotonic() < end, pool.stats()
            self.ration.look()
            self.begin(200)
            self.check()
        after = pool.stats()
        assert after["recalled_extents"] > before["recalled_extents"]
        assert after["returned_extents"] == before["returned_extents"]
        self.fenced = self.ration.ticket
        self.memory.fence(self.fenced)
        self.until("the rest's way out", lambda: pool.poll() is None and pool.stats()["transit"] == 0)
        self.allocator.free(self.running.pop())
        self.check()

    def refuse_pages(self, blocks: int) -> None:
        """More pages than can be had: SGLang 0.5.16 must not get to its kernels, which it calls before it counts."""
        if self.page == 1:
            return
        tokens, none = torch.tensor([blocks * self.page]), torch.tensor([0])
        assert self.allocator.alloc_extend(none, none, tokens, tokens, none - 1, blocks * self.page) is None
        lengths = torch.full([blocks], self.page + 1)
        assert self.allocator.alloc_decode(lengths, lengths, lengths - 2) is None

    def turned_away(self, ledger: Any) -> None:
        """A request that does not fit beside the neighbour waits, and has asked for the memory."""

        def misses() -> int:
            (mine,) = (row["counters"]["misses"] for row in ledger.view()["tenants"] if row["name"] == "one")
            return int(mine)

        before = misses()
        # SGLang's estimate of what running requests may need yet is no whole number.
        self.allocator.demand(self.tree, promised=0.3, tokens=150 * self.page)
        assert misses() > before
        asked_again: list[bool] = []
        self.ration.on_more = lambda: asked_again.append(True)
        self.until("another try", lambda: bool(asked_again))
        self.check()

    def let_a_chunk_wait(self) -> None:
        """Nobody else begins in a pass in which a request that has begun waits for memory."""
        if find_spec("sglang.srt.mem_cache.prefill_budget") is None:
            return  # 0.5.16 has no such class
        budget = self.allocator.create_prefill_budget(self.tree)
        asked = {"total_tokens": 1, "max_new_tokens": 0, "input_tokens": 1, "swa_host_hit_length": 0}
        assert budget.check_prefill(extend_input_len=1, chunk_limit=None, **asked) == (True, None)
        promised, budget.current_offset = budget.current_offset, (BLOCKS + 1) * self.page
        assert budget.available_chunk_tokens(64) is None
        budget.current_offset = promised
        assert budget.check_prefill(extend_input_len=1, chunk_limit=None, **asked) == (False, None)

    def until(self, what: str, done: Any) -> None:
        limit = time.monotonic() + 30
        while not done():
            assert time.monotonic() < limit, (what, self.cache.pool.stats())
            self.look()
            self.check()
            time.sleep(0.001)


def main() -> None:
    directory, kind, seed = sys.argv[1], sys.argv[2], int(sys.argv[3])
    play = Play(directory, kind, seed)
    pool = play.cache.pool
    neighbour = Cache.create(
        Settings.load(arguments={"directory": directory, "device": "host", "name": "two", "page": PAGE}),
        num_blocks=BLOCKS,
        ranks=[RankGeometry("host", 1, BLOCK_BYTES)],
    )
    other = RankMemory.attach(neighbour.rank_spec(0))
    neighbour.wait_ready(20)
    ledger = _core.Ledger.open(directory, "host")
    play.moves(ledger, 600)
    moved = pool.stats()
    while play.running:
        play.end()
    play.until(
        "the limit", lambda: ledger.order_limit("one", CAPACITY // 4) and pool.stats()["leased"] <= CAPACITY // 4
    )
    refused = play.refused
    play.begin(CAPACITY // 4 // BLOCK_BYTES + 1)  # beyond the limit: it has to wait, whatever else is going on
    assert play.refused == refused + 1
    play.refuse_pages(CAPACITY // 4 // BLOCK_BYTES + 1)
    play.let_a_chunk_wait()
    play.wanted_again(ledger)
    play.begin(200)
    play.end()
    taken = 0

    def squeeze() -> bool:
        nonlocal taken
        got = neighbour.pool.alloc(8)
        taken += 8 if got is not None else 0
        return taken >= 200

    play.until("a neighbour", squeeze)
    play.turned_away(ledger)
    play.ration.is_idle = lambda: True
    while play.tree.kept:
        play.tree.evict(SimpleNamespace(num_tokens=1))
    play.until("idle release", lambda: pool.stats()["leased"] <= 2 * PAGE)
    pool.check_integrity()
    play.allocator.clear()
    play.check()
    facts = {"grown": moved["grown_extents"], "returned": moved["returned_extents"], "evicted": moved["evicted"]}
    print(json.dumps({**facts, "refused": play.refused, "own": play.evictions, "taken": taken}))
    other.close()
    neighbour.close()
    play.memory.close()
    play.cache.close()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
