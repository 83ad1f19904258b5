"""Memory of a real GPU without an engine: what is mapped, what the driver says of it, fences, faults, neighbours."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import elastickv
from elastickv.memory import BlockCache, Device

pytestmark = pytest.mark.gpu

MIB = 1024 * 1024
GIB = 1024 * MIB
BLOCK = 2 * MIB
BLOCKS = 4096
CAPACITY = 4 * GIB
SLACK = 64 * MIB
"""What other users of the driver in this process may take between two looks at the free memory."""


@pytest.fixture(scope="module")
def torch() -> Any:
    found = pytest.importorskip("torch")
    if not found.cuda.is_available():
        pytest.skip("no GPU here, or a torch without CUDA")
    found.cuda.init()
    found.zeros(1, device="cuda")
    return found


@pytest.fixture
def device(torch: Any, tmp_path: Path) -> Iterator[Device]:
    with elastickv.open_device("0", capacity=CAPACITY, directory=str(tmp_path / "d")) as opened:
        yield opened


def make(device: Device, name: str = "one", **options: Any) -> BlockCache:
    return device.join(name, **{"idle_release": 0.2, "stock": 0, **options}).cache(num_blocks=BLOCKS, block_bytes=BLOCK)


def blocks_of(torch: Any, cache: BlockCache) -> Any:
    return torch.from_dlpack(cache).view(BLOCKS, BLOCK)


def need(ids: list[int] | None) -> list[int]:
    assert ids is not None
    return ids


def wait_for(what: str, check: Callable[[], bool], seconds: float = 5.0) -> float:
    began = time.monotonic()
    while not check():
        assert time.monotonic() < began + seconds, f"not within {seconds} s: {what}"
        time.sleep(0.001)
    return time.monotonic() - began


def taken(torch: Any) -> int:
    free, total = torch.cuda.mem_get_info()
    return int(total - free)


def test_a_number_and_a_uuid_name_the_same_device(torch: Any, tmp_path: Path) -> None:
    uuid = f"GPU-{torch.cuda.get_device_properties(0).uuid}"
    for name in ("0", "cuda:0", uuid):
        with elastickv.open_device(name, capacity=CAPACITY, directory=str(tmp_path / "d")) as opened:
            assert opened.settings.device == uuid
    assert [path.name for path in (tmp_path / "d").glob("*.ledger")] == [f"{uuid}.ledger"]


def test_the_tensor_is_the_range_itself(torch: Any, device: Device) -> None:
    with make(device) as cache:
        tensor = torch.from_dlpack(cache)
        assert tensor.device == torch.device("cuda", 0)
        assert tensor.dtype == torch.int8
        assert tensor.shape == (BLOCKS * BLOCK,)
        assert tensor.untyped_storage().nbytes() == BLOCKS * BLOCK
        assert tensor[:BLOCK].any().item() is False  # block 0 is there from the start
        assert cache.mapped_bytes == BLOCK


def test_new_memory_is_zero_and_contents_stay(torch: Any, device: Device) -> None:
    with make(device) as cache:
        blocks = blocks_of(torch, cache)
        for _ in range(3):
            ids = need(cache.alloc(200))
            assert not blocks[ids[0] : ids[-1] + 1].any().item()
            for block in ids:
                blocks[block].fill_(block % 127 + 1)
            more = need(cache.alloc(300))
            assert not blocks[more[0] : more[-1] + 1].any().item()
            cache.free(more)
            wait_for("idle release", lambda: cache.mapped_bytes <= 220 * BLOCK)
            for block in ids:
                assert (blocks[block] == block % 127 + 1).all().item()
            cache.check_integrity()
            cache.free(ids)
            wait_for("idle release", lambda: cache.mapped_bytes <= BLOCK)


def test_the_driver_sees_memory_come_and_go(torch: Any, device: Device) -> None:
    with make(device) as cache:
        before = taken(torch)
        ids = need(cache.alloc(1024))
        grown = taken(torch) - before
        assert abs(grown - 2 * GIB) <= SLACK, grown
        assert cache.mapped_bytes >= 2 * GIB
        cache.free(ids)
        assert taken(torch) - before >= 2 * GIB - SLACK  # it stays until the idle clock, or until somebody needs it
        seconds = wait_for("idle release", lambda: cache.mapped_bytes <= BLOCK)
        assert seconds < 1.0
        assert abs(taken(torch) - before) <= SLACK
        (tenant,) = device.view().tenants
        assert tenant.leased == tenant.mapped == BLOCK


def test_extents_grow_with_use_and_go_back_whole(torch: Any, device: Device) -> None:
    """Each extent is at most 1/16 of what is held, so a cache that grew step by step has many small ones below."""
    with make(device) as cache:
        blocks = blocks_of(torch, cache)
        ids: list[int] = []
        while len(ids) < 1500:
            ids += need(cache.alloc(20))
        stats = cache.stats()
        assert 16 <= stats["extents"] < 400
        assert stats["leased"] <= 1.07 * (len(ids) + 1) * BLOCK
        for block in ids:
            blocks[block].fill_(block % 127)
        low, high = ids[:700], ids[700:]
        cache.free(high)
        wait_for("the high extents", lambda: cache.mapped_bytes < 1.08 * 701 * BLOCK)
        for block in low:
            assert (blocks[block] == block % 127).all().item()
        again = need(cache.alloc(800))
        assert not set(again) & set(low)
        assert not blocks[again[-1]].any().item()
        cache.check_integrity()
        # Holes: every third block is given back. No page of it can go while its extent holds others.
        cache.free(low[::3])
        time.sleep(0.4)
        for block in sorted(set(low) - set(low[::3])):
            assert (blocks[block] == block % 127).all().item()
        cache.check_integrity()


def test_nothing_is_unmapped_before_the_work_that_uses_it_is_done(torch: Any, device: Device) -> None:
    with make(device, idle_release=0.01) as cache:
        blocks = blocks_of(torch, cache)
        ids = need(cache.alloc(64))
        blocks[ids[0] : ids[-1] + 1].fill_(3)
        torch.cuda.synchronize()
        mapped = cache.mapped_bytes
        done = torch.cuda.Event()
        torch.cuda._sleep(1_500_000_000)  # cycles: about a second
        copy = blocks[ids[0] : ids[-1] + 1].clone()
        done.record()
        cache.free(ids)
        looked = 0
        while not done.query():
            assert cache.mapped_bytes == mapped or done.query()
            looked += 1
            time.sleep(0.001)
        assert looked > 100
        seconds = wait_for("unmapping behind the fence", lambda: cache.mapped_bytes <= BLOCK)
        assert seconds < 0.2
        assert (copy == 3).all().item()


def test_work_on_a_stream_of_its_own_is_waited_for(torch: Any, device: Device) -> None:
    stream = torch.cuda.Stream()
    member = device.join("one", idle_release=0.01, stock=0)
    with member.cache(num_blocks=BLOCKS, block_bytes=BLOCK, stream=stream.cuda_stream) as cache:
        blocks = blocks_of(torch, cache)
        ids = need(cache.alloc(8))
        mapped = cache.mapped_bytes
        done = torch.cuda.Event()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(600_000_000)
            blocks[ids[0]].fill_(5)
            copy = blocks[ids[0]].clone()
            done.record()
        cache.free(ids)
        time.sleep(0.1)
        assert not done.query()
        assert cache.mapped_bytes == mapped
        wait_for("unmapping behind the fence", lambda: cache.mapped_bytes <= BLOCK)
        assert done.query()
        assert (copy == 5).all().item()


class Process:
    """A tenant in a process of its own, see tenant.py. Every wait has a deadline."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def answer(self, seconds: float = 30.0) -> dict[str, Any]:
        assert self.process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            assert selector.select(seconds), f"no answer in {seconds} s"
        line = self.process.stdout.readline()
        assert line, f"it ended with {self.process.wait(10)}"
        return dict(json.loads(line))

    def send(self, *words: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(" ".join(map(str, words)) + "\n")
        self.process.stdin.flush()

    def ask(self, *words: object) -> dict[str, Any]:
        self.send(*words)
        return self.answer()


@contextmanager
def neighbour(directory: Path, name: str, capacity: int = CAPACITY) -> Iterator[Process]:
    script = str(Path(__file__).with_name("tenant.py"))
    command = [sys.executable, script, str(directory), name, str(capacity), str(BLOCKS), str(BLOCK)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            found = Process(process)
            assert found.answer(60)["ready"] == BLOCK
            yield found
        finally:
            process.kill()
            process.wait(20)


def test_touching_memory_that_is_gone_is_a_fault(torch: Any, tmp_path: Path) -> None:
    """In a process of its own, for the fault ends its CUDA context."""
    with neighbour(tmp_path / "d", "lost") as process:
        assert process.ask("alloc", 50)["got"] == 50
        assert process.ask("fill", 1) == {}
        answer = process.ask("fault")
        assert answer["mapped"] == BLOCK
        assert answer["fault"] is not None, answer
        assert "illegal" in answer["fault"] or "fault" in answer["fault"].lower(), answer


def test_cached_memory_moves_to_a_neighbour_in_another_process(torch: Any, device: Device) -> None:
    directory = Path(device.settings.directory)
    with make(device, "here") as cache, neighbour(directory, "there") as there:
        blocks = blocks_of(torch, cache)
        assert there.ask("alloc", 1500)["got"] == 1500
        there.ask("fill", 2)
        assert cache.alloc(1500) is None  # the neighbour has it in use
        there.ask("free", "cached")
        got: list[int] | None = None

        def grew() -> bool:
            nonlocal got
            got = got or cache.alloc(1500)
            return got is not None

        wait_for("the neighbour's cached blocks", grew)
        ids = need(got)
        assert not blocks[ids[0] : ids[-1] + 1].any().item()  # nothing of the neighbour's is to be seen
        assert there.ask("mapped")["lost"] >= 900
        view = device.view()
        assert sum(tenant.leased for tenant in view.tenants) <= view.capacity
        cache.check_integrity()


def test_a_killed_process_leaves_nothing(torch: Any, device: Device) -> None:
    directory = Path(device.settings.directory)
    with make(device, "survivor") as cache:
        blocks = blocks_of(torch, cache)
        mine = need(cache.alloc(400))
        for block in mine:
            blocks[block].fill_(9)
        before = taken(torch)
        with neighbour(directory, "doomed") as doomed:
            assert doomed.ask("alloc", 1600)["got"] == 1600
            assert cache.alloc(1000) is None
            assert taken(torch) - before > 3 * GIB
            os.kill(doomed.process.pid, signal.SIGKILL)
            leased = wait_for("the dead process's leases", lambda: cache.alloc(1000) is not None, 2.0)
            freed = wait_for("its memory", lambda: taken(torch) - before <= 1000 * BLOCK * 1.07 + SLACK, 5.0)
            print(f"SIGKILL: leases after {leased * 1000:.0f} ms, memory after {(leased + freed) * 1000:.0f} ms")
        assert leased < 1.0
        assert [tenant.name for tenant in device.view().living] == ["survivor"]
        for block in mine:
            assert (blocks[block] == 9).all().item()
        cache.check_integrity()
