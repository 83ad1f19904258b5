"""A managed vLLM that sleeps: its memory is the neighbours' at once, and waking takes its lease before any memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import elastickv
from elastickv._core import Ledger
from elastickv.ledger import DeviceView, TenantView, order_limit, read_device
from engines.harness import CORES, Engine, Job, Result, run, start
from engines.oracle import differences, make_tiny_llama, tiny_prompts

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

MIB = 1024 * 1024
BLOCK = 64 * 1024
PROMPTS = tiny_prompts(24)
ONE_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
CAPACITY = 24 * MIB
TINY: dict[str, Any] = {"skip_tokenizer_init": True, "max_num_seqs": 12, "kv_cache_memory_bytes": 256 << 20}
WEIGHTS = 3_150_400
PACKED = WEIGHTS + 2 * 131_072
"""With what is there twice: the CPU's kernels have packed embedding and head, which stay as they were besides."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def plain(tiny: Path) -> Result:
    return run(Job(tiny, [PROMPTS], engine=TINY, environment=ONE_PROCESS, core=CORES[0]))


def job(tiny: Path, directory: Path, rounds: int, *, sleeps: bool = False, **settings: str) -> Job:
    environment = {
        "VLLM_PLUGINS": "elastickv",
        "VLLM_LOGGING_LEVEL": "INFO",
        "ELASTICKV": "1",
        "ELASTICKV_DIR": str(directory),
        "ELASTICKV_CAPACITY": str(CAPACITY),
        "ELASTICKV_NAME": "one",
        "ELASTICKV_PAGE": str(BLOCK // 4),
        "ELASTICKV_STATIC": "checkpoint",
        "ELASTICKV_START_WAIT": "1s",
        **settings,
    }
    engine = {**TINY, "enable_sleep_mode": sleeps}
    return Job(tiny, [PROMPTS] * rounds, engine=engine, environment=environment, core=CORES[0])


def look(directory: Path) -> DeviceView:
    return read_device(Ledger.open(str(directory), "host"))


def one(directory: Path) -> TenantView:
    return look(directory).tenant("one")


def good(engine: Engine, name: str, *args: Any) -> Any:
    result, error = engine.call(name, *args)
    assert error is None
    return result


def test_sleep_gives_all_and_waking_waits_its_turn(tiny: Path, plain: Result, directory: Path) -> None:
    """Three processes, as they are served."""
    with start(job(tiny, directory, 2, sleeps=True)) as engine:
        engine.go()
        first = engine.wait_round()
        awake = one(directory)
        assert awake.static_bytes == awake.static_used
        assert PACKED <= awake.static_bytes < PACKED + 4096, "and the odd number that a layer keeps"
        assert awake.leased > 10 * BLOCK

        good(engine, "sleep", 1)
        asleep = one(directory)
        assert (asleep.leased, asleep.mapped, asleep.usage.used) == (BLOCK, BLOCK, BLOCK)
        assert (asleep.static_bytes, asleep.static_used) == (0, 0)
        assert asleep.engine.endswith(", asleep: kv_cache, weights")
        order_limit(Ledger.open(str(directory), "host"), "one", 20 * MIB, 10_000)

        with elastickv.open_device("host", directory=str(directory)) as device:
            neighbour = device.join("neighbour", page=BLOCK).cache(num_blocks=512, block_bytes=BLOCK)
            ids = neighbour.alloc((CAPACITY - asleep.held) // BLOCK - 1)
            assert ids is not None
            _, error = engine.call("wake_up")
            assert error is not None
            assert "elastickv: the engine stays asleep: waited 1 s for" in error
            assert "of host for weights, graphs and activations: of 24 MiB, " in error
            assert "'neighbour' holds " in error
            assert one(directory).static_bytes == 0
            assert "asleep" in one(directory).engine
            neighbour.free(ids)

            assert good(engine, "wake_up", ["weights"]) is False
            back = one(directory)
            assert (back.static_bytes, back.static_used) == (awake.static_bytes, awake.static_bytes)
            assert one(directory).engine.endswith(", asleep: kv_cache")
            assert good(engine, "wake_up", ["kv_cache"]) is True
            assert "asleep" not in one(directory).engine
        second = engine.finish()
    assert differences(plain.tokens, first.tokens) == []
    assert differences(plain.tokens, second.rounds[1].tokens) == []


@pytest.mark.parametrize("now", [False, True], ids=["plain", "now"])
def test_a_limit_is_lowered_under_running_requests(tiny: Path, plain: Result, directory: Path, now: bool) -> None:
    """12 requests run when the limit is cut to what a few of them hold."""
    limit = WEIGHTS + 20 * BLOCK
    order = {"step": 40, "directory": str(directory), "device": "host", "name": "one", "limit": limit, "now": now}
    base = job(tiny, directory, 1, **ONE_PROCESS)
    result = run(Job(tiny, base.rounds, engine=base.engine, environment=base.environment, core=CORES[0], order=order))
    held, acknowledged, wanted, running = zip(*result.rounds[0].held, strict=True)
    before, after = 0, 1
    assert held[before] > limit
    assert running[before] == 12
    if now:
        reached = next(i for i, size in enumerate(held) if size <= limit)
        assert 0 < reached <= 5, "within a few steps"
        assert acknowledged[reached + 1] == wanted[reached + 1]
        assert running[reached] < 12
        assert max(held[reached:]) <= limit
        assert "requests: a limit was ordered to hold now" in result.log
    else:
        assert acknowledged[after] == wanted[after], "acknowledged at once"
        assert (held[after], running[after]) == (held[before], 12), "and nobody is preempted for it"
        assert "requests: a limit was ordered to hold now" not in result.log
    assert differences(plain.tokens, result.tokens) == []
