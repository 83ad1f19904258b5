"""vLLM's block pool over the elastic one: the same answers as vLLM's own, and memory only where it should be."""

from __future__ import annotations

import gc
import random
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from elastickv._core import Ledger
from elastickv.config import Settings
from elastickv.errors import EngineRefused
from elastickv.memory import Cache, RankGeometry, RankMemory

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

BLOCK = 64 * 1024
BLOCKS = 65


class World:
    """A pool of vLLM's class made elastic, its memory, and as much of a device as the test gives it."""

    def __init__(self, directory: Path, *, capacity: int = BLOCKS, name: str = "one", **options: Any) -> None:
        from vllm.v1.core.block_pool import BlockPool

        from elastickv.engines.vllm.blockpool import ElasticBlockPool, adopt

        arguments = {"capacity": capacity * BLOCK, "device": "host", "directory": str(directory), "stock": 0}
        more = {key: options.pop(key) for key in ("max_extent", "cache_limit") if key in options}
        settings = Settings.load(arguments={**arguments, "idle_release": "1h", "name": name, **more})
        self.cache = Cache.create(settings, num_blocks=BLOCKS, ranks=[RankGeometry("host", 1, BLOCK)])
        self.memory = RankMemory.attach(self.cache.rank_spec(0))
        self.cache.wait_ready(10)
        made = BlockPool(BLOCKS, options.pop("enable_caching", True), 16, **options)
        self.pool: ElasticBlockPool = adopt(made, self.cache.pool, lambda: capacity - 1)

    def allocate(self, count: int) -> list[Any]:
        self.pool.ensure(count, patient=False)
        return self.pool.get_new_blocks(count)

    def maintain(self, idle: bool = False) -> None:
        self.pool.forget(self.cache.pool.maintain(idle))
        self.memory.fence(self.cache.pool.ticket())

    def close(self) -> None:
        self.cache.pool.check_integrity()
        self.memory.close()
        self.cache.close()


@pytest.fixture
def world(directory: Path) -> Iterator[World]:
    made = World(directory, enable_kv_cache_events=True)
    yield made
    made.close()


def give_hashes(pool: Any, blocks: list[Any], first: int = 0) -> None:
    """As if each block were full of tokens that nobody else has."""
    from vllm.v1.core.kv_cache_utils import BlockHash, make_block_hash_with_group_id

    for i, block in enumerate(blocks):
        key = make_block_hash_with_group_id(BlockHash((first + i).to_bytes(32, "big")), 0)
        pool._insert_block_hash(key, block, num_tokens=16)


def cached(pool: Any, number: int) -> Any:
    from vllm.v1.core.kv_cache_utils import BlockHash

    found = pool.get_cached_block(BlockHash(number.to_bytes(32, "big")), [0])
    return found[0] if found else None


def test_blocks_come_with_memory_and_references(world: World) -> None:
    before = world.memory.mapped_bytes
    assert before == BLOCK  # block 0
    blocks = world.allocate(10)
    assert [block.ref_cnt for block in blocks] == [1] * 10
    assert [block.block_id for block in blocks] == list(range(1, 11))
    assert world.memory.mapped_bytes == before + 10 * BLOCK
    assert world.cache.pool.num_used() == 10
    world.pool.free_blocks(blocks)
    assert [block.ref_cnt for block in blocks] == [0] * 10
    assert world.pool.get_num_free_blocks() == 10
    assert world.memory.mapped_bytes == before + 10 * BLOCK  # it stays until somebody needs it


def test_a_block_with_a_hash_stays_and_is_found_again(world: World) -> None:
    pool = world.pool
    blocks = world.allocate(3)
    give_hashes(pool, blocks)
    pool.free_blocks(reversed(blocks))
    assert world.cache.pool.stats()["cached_blocks"] == 3
    hit = cached(pool, 1)
    assert hit is blocks[1]
    pool.touch([hit])
    assert (hit.ref_cnt, world.cache.pool.num_used()) == (1, 1)
    pool.touch([hit])
    assert (hit.ref_cnt, world.cache.pool.num_used()) == (2, 1)
    pool.free_blocks([hit])
    assert world.cache.pool.num_used() == 1
    pool.free_blocks([hit])
    assert world.cache.pool.num_used() == 0


def test_it_grows_before_it_evicts(world: World) -> None:
    pool = world.pool
    first = world.allocate(30)
    give_hashes(pool, first)
    pool.free_blocks(first)
    second = world.allocate(30)
    assert {block.block_id for block in first}.isdisjoint(block.block_id for block in second)
    assert all(cached(pool, number) for number in range(30))


def test_it_evicts_the_oldest_and_says_so(world: World) -> None:
    from vllm.distributed.kv_events import BlockRemoved

    pool = world.pool
    blocks = world.allocate(BLOCKS - 1)
    give_hashes(pool, blocks)
    pool.take_events()
    pool.free_blocks(blocks)
    taken = world.allocate(3)
    assert taken == blocks[:3]
    assert [cached(pool, number) for number in range(3)] == [None] * 3
    assert cached(pool, 3) is blocks[3]
    events = pool.take_events()
    assert [type(event) for event in events] == [BlockRemoved] * 3
    assert all(block.block_hash is None for block in taken)


def removed(pool: Any) -> list[int]:
    """The numbers of give_hashes() whose blocks were said to be gone."""
    from vllm.distributed.kv_events import BlockRemoved

    events = pool.take_events()
    assert all(type(event) is BlockRemoved for event in events)
    hashes = [block for event in events for block in event.block_hashes]
    return [int.from_bytes(one, "big") if isinstance(one, bytes) else int(one) for one in hashes]


def test_a_neighbour_takes_the_thinly_filled_extent_and_its_blocks_are_told(directory: Path) -> None:
    world = World(directory, enable_kv_cache_events=True, max_extent=8 * BLOCK)
    pool = world.pool
    blocks = world.allocate(60)  # in extents of two blocks, behind block 0
    give_hashes(pool, blocks[:2])
    give_hashes(pool, blocks[2:3], 2)
    pool.take_events()
    pool.free_blocks(blocks[:2])  # an extent full of cached blocks, and older
    pool.free_blocks(blocks[2:4])  # one with a single cached block
    ledger = Ledger.open(str(directory), "host")
    neighbour = ledger.join("neighbour")
    wanted = ledger.view()["capacity"] - world.cache.pool.stats()["leased"] + BLOCK
    assert not neighbour.lease(wanted, ring=True)
    world.maintain()
    assert removed(pool) == [2]
    assert (cached(pool, 0), cached(pool, 1), cached(pool, 2)) == (blocks[0], blocks[1], None)
    until = time.monotonic() + 30
    while not neighbour.lease(wanted, ring=True):
        assert time.monotonic() < until
        time.sleep(0.001)
    neighbour.close()
    world.close()


def test_what_the_cache_limit_drops_is_told(directory: Path) -> None:
    world = World(directory, enable_kv_cache_events=True, cache_limit=4 * BLOCK)
    pool = world.pool
    blocks = world.allocate(10)
    give_hashes(pool, blocks)
    pool.take_events()
    pool.free_blocks(blocks[:7])
    assert world.cache.pool.attention()
    world.maintain()
    assert sorted(removed(pool)) == [0, 1, 2]
    assert all(cached(pool, number) is blocks[number] for number in range(3, 10))
    world.close()


def test_more_than_there_is(world: World) -> None:
    pool = world.pool
    held = world.allocate(BLOCKS - 1)
    pool.ensure(1, patient=False)
    assert pool.starved
    assert pool.get_num_free_blocks() == 0
    with pytest.raises(ValueError, match="Cannot get 1 free blocks from the pool"):
        pool.get_new_blocks(1)
    pool.free_blocks(held)
    pool.ensure(1, patient=True)
    assert not pool.starved


def test_a_caller_that_did_not_ask_before(world: World) -> None:
    assert len(world.pool.get_new_blocks(5)) == 5


def test_without_caching_hashes_keep_nothing(directory: Path) -> None:
    world = World(directory, enable_caching=False)
    blocks = world.allocate(3)
    world.pool.free_blocks(blocks)
    assert world.cache.pool.stats()["cached_blocks"] == 0
    world.close()


def test_the_null_block_is_nobodys(world: World) -> None:
    null = world.pool.null_block
    assert null.is_null
    world.pool.touch([null])
    world.pool.free_blocks([null, null])
    assert world.cache.pool.num_used() == 0
    assert null not in world.allocate(BLOCKS - 1)


def test_evicting_by_id_frees_what_only_the_hash_held(world: World) -> None:
    pool = world.pool
    blocks = world.allocate(4)
    give_hashes(pool, blocks)
    pool.free_blocks(blocks[:2])
    pool.evict_blocks({block.block_id for block in blocks})
    stats = world.cache.pool.stats()
    assert (stats["cached_blocks"], stats["used_blocks"]) == (0, 2)
    assert [cached(pool, number) for number in range(4)] == [None] * 4
    pool.free_blocks(blocks[2:])
    assert world.cache.pool.stats()["cached_blocks"] == 0


def test_reset_forgets_everything(world: World) -> None:
    from vllm.distributed.kv_events import AllBlocksCleared

    pool = world.pool
    blocks = world.allocate(8)
    give_hashes(pool, blocks)
    assert pool.reset_prefix_cache() is False  # blocks are in use
    pool.free_blocks(blocks)
    pool.take_events()
    assert pool.reset_prefix_cache() is True
    assert [type(event) for event in pool.take_events()] == [AllBlocksCleared]
    assert len(pool.cached_block_hash_to_block) == 0
    assert all(block.block_hash is None for block in blocks)
    assert world.cache.pool.stats()["cached_blocks"] == 0


def test_reset_after_memory_went_away(world: World) -> None:
    """vLLM counts free blocks against all blocks; most of ours have no memory, and the reset must still work."""
    world.pool.free_blocks(world.allocate(4))
    assert world.pool.get_num_free_blocks() == 4
    assert world.pool.reset_prefix_cache() is True


def test_two_blocks_with_one_hash(world: World) -> None:
    pool = world.pool
    blocks = world.allocate(2)
    give_hashes(pool, blocks[:1], 7)
    give_hashes(pool, blocks[1:], 7)
    pool.free_blocks(blocks)
    assert world.cache.pool.stats()["cached_blocks"] == 2
    pool.evict_blocks({blocks[0].block_id})
    assert cached(pool, 7) is blocks[1]
    assert pool.reset_prefix_cache()
    assert world.cache.pool.stats()["cached_blocks"] == 0


def test_moved_hashes(world: World) -> None:
    pool = world.pool
    source, target = world.allocate(2)
    give_hashes(pool, [source], 3)
    pool.move_block_hashes(source, target)
    assert cached(pool, 3) is target
    pool.free_blocks([source, target])
    stats = world.cache.pool.stats()
    assert (stats["cached_blocks"], stats["free_blocks"]) == (1, 1)


def test_unpinned_blocks_are_readable_until_they_go(world: World) -> None:
    pool = world.pool
    gone: list[int] = []
    blocks = world.allocate(BLOCKS - 1)
    pool.unpin_blocks(blocks[:2], lambda block: gone.append(block.block_id))
    assert pool.get_num_free_blocks() == 2
    assert gone == []
    world.allocate(1)
    assert gone == [blocks[0].block_id]
    pool.free_blocks(blocks[2:])
    pool.free_blocks([blocks[0]])
    assert pool.reset_prefix_cache()
    assert gone == [blocks[0].block_id, blocks[1].block_id]


def test_blocks_of_another_pool_go_home(world: World) -> None:
    from vllm.v1.core.block_pool import BlockPool

    other = BlockPool(8, True, 16)
    theirs = other.get_new_blocks(3)
    mine = world.allocate(2)
    world.pool.free_blocks([theirs[0], mine[0], theirs[1], mine[1], theirs[2]])
    assert other.get_num_free_blocks() == 7
    assert world.cache.pool.num_used() == 0


def test_usage_is_of_what_the_tenant_may_hold(directory: Path) -> None:
    world = World(directory, capacity=33)
    held = world.allocate(16)
    assert world.pool.get_usage() == 0.5
    world.pool.free_blocks(held)
    assert world.pool.get_usage() == 0.0
    world.close()


def test_nobody_walks_the_list_of_free_blocks(world: World) -> None:
    with pytest.raises(EngineRefused) as caught:
        _ = world.pool.free_block_queue.num_free_blocks
    assert str(caught.value) == (
        "something read BlockPool.free_block_queue.num_free_blocks: elastickv keeps the free blocks itself, and cannot "
        "manage an engine with a part that walks vLLM's own list"
    )


def test_a_pool_that_is_gone_leaves_nothing_behind(directory: Path) -> None:
    """As where a program makes one LLM after another: its hundred thousands of blocks, descriptors and threads go."""

    def descriptors() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    gc.collect()
    before, gone = descriptors(), []
    for _ in range(3):
        world = World(directory)
        blocks = world.allocate(10)
        give_hashes(world.pool, blocks[:3])
        world.pool.free_blocks(blocks)
        gone += [weakref.ref(world.pool)]
        world.close()
        del world, blocks
        gc.collect()
    assert [pool() for pool in gone] == [None] * 3
    assert descriptors() == before


def test_a_pool_of_another_class_is_refused(world: World) -> None:
    from elastickv.engines.vllm.blockpool import adopt

    with pytest.raises(EngineRefused) as caught:
        adopt(SimpleNamespace(), world.cache.pool, lambda: 1)
    assert str(caught.value) == (
        "elastickv cannot manage the block pool SimpleNamespace; it was written for vLLM's BlockPool"
    )


def test_metrics_see_blocks_come_and_go(directory: Path) -> None:
    calls: list[tuple[str, int]] = []

    class Collector:
        def __getattr__(self, name: str) -> Any:
            return lambda block: calls.append((name, block.block_id))

    world = World(directory, metrics_collector=cast(Any, Collector()))
    block = world.allocate(1)
    world.pool.touch(block)
    assert calls == [("on_block_evicted", 1), ("on_block_allocated", 1), ("on_block_accessed", 1)]
    world.pool.free_blocks(block * 2)
    world.close()


def test_a_neighbour_takes_the_cache_but_not_what_is_used(directory: Path) -> None:
    world = World(directory)
    used, kept = world.allocate(20), world.allocate(44)
    give_hashes(world.pool, kept, 100)
    world.pool.free_blocks(kept)
    with ThreadPoolExecutor(1) as thread:
        starting = thread.submit(World, directory, name="two")  # beside a neighbour that holds everything
        while not starting.done():
            world.maintain()
            time.sleep(0.001)
        neighbour = starting.result()
    neighbour.pool.ensure(30, patient=False)
    until = time.monotonic() + 30
    while neighbour.pool.starved and time.monotonic() < until:
        world.maintain()
        neighbour.pool.ensure(30, patient=True)
    assert len(neighbour.pool.get_new_blocks(30)) == 30
    forgotten = [number for number in range(100, 144) if cached(world.pool, number) is None]
    assert len(forgotten) >= 30
    assert all(block.ref_cnt == 1 for block in used)
    assert world.memory.mapped_bytes + neighbour.memory.mapped_bytes <= BLOCKS * BLOCK
    neighbour.close()
    world.close()


def test_a_wait_that_gained_nothing_is_not_repeated_soon(directory: Path) -> None:
    world = World(directory, capacity=9)
    held = world.allocate(8)
    began = time.monotonic()
    for _ in range(500):
        world.pool.ensure(1, patient=True)
    # One wait of 20 ms; five hundred would be ten seconds.
    assert time.monotonic() - began < 5
    assert world.pool.starved
    world.pool.free_blocks(held)
    world.close()


@pytest.mark.parametrize("seed", range(3))
def test_it_answers_as_vllms_own_does(directory: Path, seed: int) -> None:
    """The same random requests to both: the same hits while nothing had to be evicted, the same counts always."""
    from vllm.v1.core.block_pool import BlockPool

    world = World(directory)
    ours: Any = world.pool
    theirs: Any = BlockPool(BLOCKS, True, 16)
    rng = random.Random(seed)
    running: list[tuple[list[Any], list[Any]]] = []
    number = 0
    for _ in range(400):
        action = rng.random()
        if action < 0.5:
            count = rng.randint(1, 8)
            ours.ensure(count, patient=False)
            room = theirs.get_num_free_blocks()
            if count > room:
                assert ours.get_num_free_blocks() == room
                continue
            pair = ours.get_new_blocks(count), theirs.get_new_blocks(count)
            full = rng.randint(0, count)
            for pool, blocks in zip((ours, theirs), pair, strict=True):
                give_hashes(pool, blocks[:full], number)
            number += full
            running.append(pair)
        elif action < 0.85 and running:
            mine, his = running.pop(rng.randrange(len(running)))
            ours.free_blocks(reversed(mine))
            theirs.free_blocks(reversed(his))
        elif number:
            wanted = rng.randrange(number)
            found = cached(ours, wanted), cached(theirs, wanted)
            if all(found):
                ours.touch([found[0]])
                theirs.touch([found[1]])
                running.append(([found[0]], [found[1]]))
        assert world.cache.pool.num_used() == BLOCKS - 1 - theirs.get_num_free_blocks()
        assert all(block.ref_cnt > 0 for mine, _ in running for block in mine)
    world.cache.pool.check_integrity()
    for mine, _ in running:
        ours.free_blocks(mine)
    assert world.cache.pool.num_used() == 0
    world.close()
