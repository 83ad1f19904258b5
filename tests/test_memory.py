"""The library without an engine: real pages, real processes, the kernel's own accounting."""

from __future__ import annotations

import multiprocessing as mp
import os
import re
import signal
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest

import elastickv
from elastickv.errors import AlreadyExists, ElasticKVError, InvalidArgument
from elastickv.memory import BlockCache, Device

MIB = 1024 * 1024
BLOCK = 256 * 1024


def mapped_by_kernel(pid: int | str = "self") -> int:
    """Resident bytes of the process's elastic memory, as smaps has them."""
    total, ours = 0, False
    for line in Path(f"/proc/{pid}/smaps").read_text(encoding="ascii", errors="replace").splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            ours = "/memfd:elastickv (" in line or line.endswith("/memfd:elastickv")
        elif ours and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Device]:
    with elastickv.open_device("host", capacity=64 * MIB, directory=str(tmp_path / "d")) as opened:
        yield opened


def make(device: Device, name: str = "one", **options: object) -> BlockCache:
    return device.join(name, idle_release=0.2, **options).cache(num_blocks=4096, block_bytes=BLOCK)


def wait_for(what: str, check: object, timeout: float = 5.0) -> None:
    until = time.monotonic() + timeout
    while not check():  # type: ignore[operator]
        assert time.monotonic() < until, f"not within {timeout} s: {what}"
        time.sleep(0.005)


def test_memory_is_there_while_blocks_are_held_and_not_otherwise(device: Device) -> None:
    before = mapped_by_kernel()
    with make(device) as cache:
        array = np.from_dlpack(cache)  # type: ignore[arg-type]
        assert array.shape == (4096 * BLOCK,)
        assert array.dtype == np.int8
        assert mapped_by_kernel() - before <= 2 * BLOCK
        ids = cache.alloc(40)
        assert ids == list(range(1, 41))
        assert mapped_by_kernel() - before == cache.mapped_bytes >= 41 * BLOCK
        for block in ids:
            part = array[block * BLOCK : (block + 1) * BLOCK]
            assert not part.any()
            part[:] = block % 100
        assert all((array[block * BLOCK : (block + 1) * BLOCK] == block % 100).all() for block in ids)
        cache.check_integrity()
        cache.free(ids)
        wait_for("idle release", lambda: mapped_by_kernel() - before <= BLOCK)
        (tenant,) = device.view().tenants
        assert tenant.leased == tenant.mapped == mapped_by_kernel() - before
        cache.check_integrity()
    assert device.view().living == ()


def test_none_now_is_an_answer(device: Device) -> None:
    with make(device) as cache:
        assert cache.alloc(10_000) is None
        got = cache.alloc(200)
        assert got is not None
        assert cache.alloc(100) is None
        cache.free(got[:100])
        assert cache.alloc(100) is not None
        cache.check_integrity()


def test_cached_blocks_keep_their_contents_until_a_neighbour_needs_the_memory(device: Device) -> None:
    lost: list[int] = []
    first = device.join("first").cache(num_blocks=4096, block_bytes=BLOCK, on_evict=lost.extend)
    second = make(device, "second")
    ids = first.alloc(220)
    assert ids is not None
    array = np.from_dlpack(first)  # type: ignore[arg-type]
    array[BLOCK : 221 * BLOCK] = 7
    first.free(ids, cached=True)
    time.sleep(0.3)
    assert not lost
    got: list[int] | None = None

    def grew() -> bool:
        nonlocal got
        got = got or second.alloc(120)
        return got is not None

    wait_for("the neighbour's cached blocks", grew)
    assert len(lost) >= 80
    for block in sorted(set(ids) - set(lost)):
        first.reuse(block)
        assert (array[block * BLOCK : (block + 1) * BLOCK] == 7).all()
    with pytest.raises(InvalidArgument, match=f"block {lost[0]} was touched but is not cached"):
        first.reuse(lost[0])
    view = device.view()
    assert sum(tenant.leased for tenant in view.tenants) <= view.capacity
    first.check_integrity()
    second.check_integrity()


def test_wrong_use_is_refused_and_changes_nothing(device: Device) -> None:
    with make(device) as cache:
        ids = cache.alloc(3)
        assert ids is not None
        with pytest.raises(InvalidArgument, match="block 1 was released twice"):
            cache.free([1, 2, 1])
        with pytest.raises(InvalidArgument, match="block 0 was released but is the null block"):
            cache.free([0])
        with pytest.raises(InvalidArgument, match="-1 blocks cannot be allocated; ask for 0 or more"):
            cache.alloc(-1)
        cache.check_integrity()
        with pytest.raises(AlreadyExists, match="one"):
            make(device)
    with pytest.raises(InvalidArgument, match="raise --limit or --capacity, or lower the engine's block size"):
        device.join("large").cache(num_blocks=8, block_bytes=128 * MIB)
    assert device.view().living == ()


def _hold(directory: str, name: str, blocks: int, pipe: Connection) -> None:
    device = elastickv.open_device("host", directory=directory)
    cache = device.join(name).cache(num_blocks=4096, block_bytes=BLOCK)
    ids = cache.alloc(blocks)
    pipe.send(None if ids is None else len(ids))
    pipe.poll(30)


def test_the_memory_of_a_killed_process_is_leasable_at_once(device: Device) -> None:
    context = mp.get_context("spawn")
    mine, theirs = context.Pipe()
    process = context.Process(target=_hold, args=(str(device.settings.directory), "doomed", 200, theirs))
    process.start()
    assert mine.poll(20)
    assert mine.recv() == 200
    with make(device, "survivor") as cache:
        assert cache.alloc(100) is None
        assert process.pid is not None
        assert mapped_by_kernel(process.pid) >= 200 * BLOCK
        os.kill(process.pid, signal.SIGKILL)
        start = time.monotonic()
        wait_for("the dead process's memory", lambda: cache.alloc(100) is not None, 1.0)
        assert time.monotonic() - start < 1.0
        assert [tenant.name for tenant in device.view().living] == ["survivor"]
        cache.check_integrity()
    process.join(5)


def mapped_at_one_moment(pids: list[int]) -> int:
    """The page moves thousands of times a second: both processes stand still while they are read."""
    try:
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        return sum(map(mapped_by_kernel, pids))
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


def _fight(directory: str, name: str, rounds: int, pipe: Connection) -> None:
    wins = 0
    try:
        device = elastickv.open_device("host", directory=directory)
        cache = device.join(name, give_back_wait=1, stock=0).cache(num_blocks=64, block_bytes=64 * 1024)
        pipe.send("ready")
        pipe.recv()
        for _ in range(rounds):
            got = cache.alloc(1)
            if got is not None:
                wins += 1
                cache.free(got)
        cache.check_integrity()
        pipe.send(wins)
        pipe.poll(60)
    except ElasticKVError as error:
        pipe.send(repr(error))


def test_two_fight_for_the_last_page_and_neither_starves(tmp_path: Path) -> None:
    directory, rounds = str(tmp_path / "d"), 10_000
    # Three pages: one for each tenant's block 0, and one that both want.
    watcher = elastickv.open_device("host", capacity=3 * 64 * 1024, directory=directory)
    context = mp.get_context("spawn")
    pairs = []
    for name in ("left", "right"):
        mine, theirs = context.Pipe()
        process = context.Process(target=_fight, args=(directory, name, rounds, theirs))
        process.start()
        pairs.append((process, mine))
    for _, pipe in pairs:
        assert pipe.poll(20)
        assert pipe.recv() == "ready"
    for _, pipe in pairs:
        pipe.send("go")
    answers: list[object] = []
    while len(answers) < 2:
        view = watcher.view()
        assert sum(tenant.leased for tenant in view.tenants) <= view.capacity
        assert mapped_at_one_moment([process.pid or 0 for process, _ in pairs]) <= view.capacity
        answers = [pipe.poll(0) for _, pipe in pairs if pipe.poll(0)]
        time.sleep(0.05)
    wins = [pipe.recv() for _, pipe in pairs]
    for process, pipe in pairs:
        pipe.send("end")
        process.join(10)
    assert all(isinstance(count, int) for count in wins), wins
    assert min(wins) >= 0.3 * sum(wins), wins
    assert min(wins) > 1000, wins
