"""Weights on the ledger: engines that start at one moment, beside a busy neighbour, in a queue, or not at all."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

import elastickv
from elastickv._core import Ledger
from elastickv.errors import NotFound
from elastickv.ledger import DeviceView, order_limit, read_device
from engines.harness import Engine, EngineFailed, Job, Result, run, start
from engines.oracle import differences, make_tiny_llama, tiny_prompts

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

MIB = 1024 * 1024
BLOCK = 64 * 1024
CORES = sorted(os.sched_getaffinity(0))
PROMPTS = tiny_prompts(24)
ONE_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
CAPACITY = 12 * MIB
WEIGHTS = 3_150_400
"""Of the tiny model in memory: 2.5 MiB of matrices, and half a MiB of rotations that no file holds."""
TINY: dict[str, Any] = {"skip_tokenizer_init": True, "max_num_seqs": 12, "kv_cache_memory_bytes": 256 << 20}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def plain(tiny: Path) -> Result:
    return run(Job(tiny, [PROMPTS], engine=TINY, environment=ONE_PROCESS, core=CORES[0]))


def job(tiny: Path, directory: Path, name: str, core: int = 0, **settings: str) -> Job:
    environment = {
        "VLLM_PLUGINS": "elastickv",
        "VLLM_LOGGING_LEVEL": "INFO",
        "ELASTICKV": "1",
        "ELASTICKV_DIR": str(directory),
        "ELASTICKV_CAPACITY": str(CAPACITY),
        "ELASTICKV_NAME": name,
        "ELASTICKV_PAGE": str(BLOCK // 4),
        "ELASTICKV_STATIC": "checkpoint",
        **ONE_PROCESS,
        **settings,
    }
    return Job(tiny, [PROMPTS], engine=TINY, environment=environment, core=CORES[core % len(CORES)])


def look(directory: Path) -> DeviceView:
    return read_device(Ledger.open(str(directory), "host"))


def demand(directory: Path, name: str) -> int:
    try:
        return look(directory).tenant(name).demand
    except NotFound:
        return 0


def until(what: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, f"not so after {seconds} s"
        time.sleep(0.01)


def test_two_start_at_one_moment_and_a_third_finds_no_room(tiny: Path, plain: Result, directory: Path) -> None:
    """The third says who holds what, while the two go on serving."""
    with ExitStack() as stack:
        pair = [stack.enter_context(start(job(tiny, directory, name, i))) for i, name in enumerate(("left", "right"))]
        for engine in pair:
            engine.wait_ready()
        view = look(directory)
        assert [tenant.static_bytes for tenant in view.living] == [WEIGHTS, WEIGHTS]
        assert sorted(tenant.name for tenant in view.living) == ["left", "right"]
        for engine in pair:
            engine.go()
        third = job(tiny, directory, "third", ELASTICKV_STATIC="7MiB", ELASTICKV_START_WAIT="1s")
        with pytest.raises(EngineFailed) as caught:
            run(third)
        text = str(caught.value)
        assert "elastickv does not start this engine: waited 1 s for 7 MiB of host for weights, graphs and act" in text
        assert "activations: of 12 MiB, '" in text
        for name in ("left", "right"):
            assert re.search(rf"'{name}' holds [\d.]+ MiB \(3 MiB static, [\d.]+ \w+ in use\), ", text)
        assert "'third' (this one) holds 0 bytes" in text
        results = [engine.finish() for engine in pair]
    for result in results:
        assert differences(plain.tokens, result.tokens) == []
        assert "elastickv has leased 2.5 MiB static for weights, graphs and activations" in result.log
        assert "extent up to 64 KiB, strict (no scratch pages), 3 MiB static" in result.log
    assert look(directory).held == 0


def test_it_waits_beside_a_neighbour_and_obeys_limits_meanwhile(tiny: Path, plain: Result, directory: Path) -> None:
    """The neighbour has pages in use, so nothing can be asked of it: the engine waits until they are freed."""
    options = {"page": BLOCK, "idle_release": "0.05s"}
    with elastickv.open_device("host", capacity=CAPACITY, directory=str(directory)) as device:
        cache = device.join("neighbour", **options).cache(num_blocks=512, block_bytes=BLOCK)
        ids = cache.alloc(170)
        assert ids is not None
        with start(job(tiny, directory, "one", ELASTICKV_LIMIT="12MiB")) as engine:
            until(lambda: demand(directory, "one") > 0)
            limit = 9 * MIB
            order_limit(Ledger.open(str(directory), "host"), "one", limit, 10_000)
            assert look(directory).tenant("one").applied.bytes == limit
            cache.free(ids)
            engine.wait_ready()
            row = look(directory).tenant("one")
            assert (row.static_bytes, row.wanted.bytes) == (WEIGHTS, limit)
            result = engine.finish()
        assert differences(plain.tokens, result.tokens) == []
        assert "elastickv waits for 2.5 MiB of host for weights, graphs and activations: of 12" in result.log
        ledger = Ledger.open(str(directory), "host")
        assert look(directory).tenant("one").wanted.bytes == limit, "kept for its restart"
        with pytest.raises(NotFound, match="does not run, so nobody can acknowledge its limit; the limit is kept"):
            order_limit(ledger, "one", limit - MIB, 100)
        with start(job(tiny, directory, "one")) as engine:
            engine.wait_ready()
            assert look(directory).tenant("one").applied.bytes == limit - MIB
            restarted = engine.finish()
    assert f"limit {(limit - MIB) // MIB} MiB" in restarted.log
    assert differences(plain.tokens, restarted.tokens) == []


def test_killed_while_it_loads_it_leaves_nothing(tiny: Path, directory: Path) -> None:
    """The process that schedules dies while the worker has loaded nothing yet: the worker ends, the lease returns."""
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_WORKER_MULTIPROC_METHOD": "spawn"}
    with start(job(tiny, directory, "one", **environment)) as engine:
        until(lambda: _static(directory) > 0)
        row = look(directory).tenant("one")
        os.kill(row.pid, signal.SIGKILL)
        until(lambda: look(directory).held == 0)
        until(lambda: _gone(engine))
    assert not look(directory).tenant("one").alive


def _static(directory: Path) -> int:
    try:
        return look(directory).tenant("one").static_bytes
    except NotFound:
        return 0


def _gone(engine: Engine) -> bool:
    return engine.process.poll() is not None
