"""SGLang on a real GPU: Triton attention, CUDA graphs and the overlap schedule, managed and plain, token by token.

Kernels that are deterministic make an answer depend on the prompt alone, so that any difference is a fault of the
cache. A request that was sent back to wait is another matter: its answer so far is then computed as a prompt is, by
another kernel. A plain engine that sends requests back is the measure of that. There are no scratch pages: an access to
an address without memory ends the engine, and with it the test.
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from elastickv.ledger import TenantView, read_device
from elastickv.memory import gpu as nvml
from engines.harness import Engine, EngineFailed, Job, Result, Round, run, start
from engines.kinds import KINDS
from engines.oracle import Difference, differences, make_tiny_llama, tiny_prompts
from engines.subjects import SGLANG, until
from gpu.serving import MIB, ledger_of, managed, say

pytestmark = [pytest.mark.gpu, pytest.mark.sglang, pytest.mark.slow, pytest.mark.usefixtures("sglang_on_gpu")]

PROMPTS = tiny_prompts(64)
FULL = 256 * MIB
"""The 64 requests would like about 190 MiB of the cache, all at once."""
SCARCE = 160 * MIB
GRAIN = 32 * MIB
"""What the padding page may take: a page of the device in each of 16 spans, where the layout has so many."""
DAMAGED_AT = 40
ENGINE: dict[str, Any] = {
    "device": "cuda",
    "dtype": "bfloat16",
    "attention_backend": "triton",
    "disable_cuda_graph": False,
    "enable_deterministic_inference": True,
    "mem_fraction_static": 0.3,
    "max_total_tokens": None,
    "max_running_requests": 64,
    "chunked_prefill_size": 4096,
}
AMPLE = {"max_total_tokens": 65536, "mem_fraction_static": 0.8}
"""Of a plain engine: 1 GiB of cache. The fraction is of what is free at first, also where neighbours take some then."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 KiB of cache a token; 2 KiB of it a layer's."""
    return make_tiny_llama(tmp_path_factory.mktemp("model"), layers=8, heads=8, kv_heads=4, head_size=128, hidden=512)


def job(model: Path, settings: dict[str, str] | None = None, rounds: int = 2, **more: Any) -> Job:
    """Plain without `settings`."""
    engine = {**ENGINE, **more.pop("engine", {})}
    environment = {"CUDA_VISIBLE_DEVICES": "0", **(settings or {})}
    return Job(model, [PROMPTS] * rounds, max_tokens=128, kind="sglang", engine=engine, environment=environment, **more)


def of(directory: Path, name: str, **more: str) -> dict[str, str]:
    """Variables of a managed engine, with addresses for 1 GiB."""
    chosen = {KINDS["sglang"].plugin: SGLANG.plugins, "ELASTICKV_VIRTUAL": "1GiB"}
    return {**managed(directory, name), **chosen, **more}


def as_served(engine: Engine) -> None:
    """CUDA graphs and the overlap schedule are on: SGLang turns them off by itself where they cannot be."""
    info, error = engine.call("get_server_info")
    assert error is None
    assert (info["disable_overlap_schedule"], info["attention_backend"]) == (False, "triton")
    assert re.search(r"Capture .*graph end", engine.log(), re.IGNORECASE)


def parted(plain: Result, done: Round) -> tuple[list[Difference], list[Difference]]:
    """Where the answers of a round are not the plain engine's: of requests that ran through, of those sent back."""
    found = differences(plain.rounds[0].tokens, done.tokens)
    again = [one for one in found if done.retracted[one.request]]
    print(f"{sum(map(bool, done.retracted))} requests were sent back, {len(again)} of them answered otherwise then")
    return [one for one in found if one not in again], again


@pytest.fixture(scope="module")
def plain(model: Path) -> Result:
    with start(job(model, engine=AMPLE)) as engine:
        as_served(engine)
        result = engine.finish()
    say("plain", result)
    assert result.preemptions == 0
    return result


class Oracle:
    """Plain answers, and whether a plain engine answers otherwise where it sends a request back to wait."""

    def __init__(self, model: Path, plain: Result) -> None:
        self.plain = plain
        # SGLang's own switch for tests of itself, whatever the memory: every second step a request is sent back, and
        # waits until few run. Without that wait it would be the same one again and again.
        every = {
            "SGLANG_TEST_RETRACT": "1",
            "SGLANG_TEST_RETRACT_INTERVAL": "2",
            "SGLANG_TEST_RETRACT_NO_PREFILL_BS": "16",
        }
        squeezed = run(job(model, every, rounds=1, engine=AMPLE))
        assert squeezed.preemptions > 0
        through, again = parted(plain, squeezed.rounds[0])
        assert through == []
        self.rounds_otherwise = bool(again)

    def check(self, done: Round) -> None:
        through, again = parted(self.plain, done)
        assert through == []
        assert self.rounds_otherwise or again == []


@pytest.fixture(scope="module")
def oracle(model: Path, plain: Result) -> Oracle:
    return Oracle(model, plain)


def test_plain_answers_do_not_depend_on_the_round(plain: Result) -> None:
    """The oracle itself: the second round finds prefixes in the cache."""
    first, second = plain.rounds
    assert sum(second.cached) > sum(first.cached)
    assert sum(len(set(line)) for line in plain.tokens) / len(plain.tokens) > 16
    assert differences(first.tokens, second.tokens) == []


@pytest.mark.parametrize("page", [16, 1])
def test_under_a_limit_that_moves(model: Path, oracle: Oracle, tmp_path: Path, page: int) -> None:
    """By turns of three steps all that it would like, and a quarter of it."""
    directory, device = tmp_path / "d", nvml.visible_devices({"CUDA_VISIBLE_DEVICES": "0"})[0]
    moves = {"directory": str(directory), "device": device, "name": "one", "every": 3, "limits": [FULL // 4, FULL]}
    with start(job(model, of(directory, "one"), engine={"page_size": page}, moves=moves)) as engine:
        as_served(engine)
        for _ in engine.job.rounds:
            engine.go()
            done = engine.wait_round()
        seen = read_device(ledger_of(directory)).tenant("one")
        result = engine.finish()
    say(f"managed, page size {page}", result)
    assert "strict" in result.log
    assert seen.engine.startswith("sglang ")
    for one in result.rounds:
        oracle.check(one)
    assert done.moved > 40
    assert sum(seen.histograms.unmap.counts) > 0


class Pair:
    """Two engines in less memory than one of them would like."""

    def __init__(self, stack: ExitStack, model: Path, directory: Path) -> None:
        more = {
            "ELASTICKV_CAPACITY": str(SCARCE),
            "ELASTICKV_IDLE_RELEASE": "0.5s",
            "ELASTICKV_CACHE_RELEASE": "1s",
        }
        jobs = {name: job(model, of(directory, name, **more), rounds=3) for name in ("left", "right")}
        self.engines = {name: stack.enter_context(start(one)) for name, one in jobs.items()}
        for engine in self.engines.values():
            engine.wait_ready()
        self.ledger = ledger_of(directory)

    def tenant(self, name: str) -> TenantView:
        return read_device(self.ledger).tenant(name)

    def round(self) -> dict[str, Round]:
        for engine in self.engines.values():
            engine.go()
        return {name: engine.wait_round() for name, engine in self.engines.items()}


@pytest.fixture(scope="module")
def pair(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with ExitStack() as stack:
        yield Pair(stack, model, tmp_path_factory.mktemp("pair") / "d")


def test_each_squeezed_by_the_other(pair: Pair, oracle: Oracle) -> None:
    rounds = [pair.round(), pair.round()]
    tenants = [pair.tenant(name) for name in pair.engines]
    for done in rounds:
        for one in done.values():
            oracle.check(one)
    assert sum(tenant.counters.misses for tenant in tenants) > 0
    assert read_device(pair.ledger).held <= SCARCE


def test_idle_it_gives_everything_back(pair: Pair) -> None:
    """Free pages after half a second, cached prefixes a second after the last step; the padding page stays."""
    until(lambda: all(pair.tenant(name).leased <= GRAIN for name in pair.engines), 30)
    for name in pair.engines:
        usage = pair.tenant(name).usage
        assert (usage.cached, usage.mapped_free) == (0, 0)


def test_killed_under_load_it_leaves_its_memory(pair: Pair, oracle: Oracle) -> None:
    """Runs last: it ends the left engine of the pair while both work."""
    device = nvml.visible_devices({"CUDA_VISIBLE_DEVICES": "0"})[0]
    for engine in pair.engines.values():
        engine.go()
    until(lambda: pair.tenant("left").usage.used > 2 * GRAIN, 120)
    doomed = pair.tenant("left").pid
    before = nvml.device_memory(device)[1]
    os.kill(doomed, signal.SIGKILL)
    seconds = until(lambda: not pair.tenant("left").alive and pair.tenant("left").held == 0, 20)
    print(f"leases back {seconds:.2f} s after SIGKILL")
    # Its context and weights go too, so the device has it back and not the ledger alone.
    until(lambda: nvml.device_memory(device)[1] < before, 20)
    oracle.check(pair.engines["right"].wait_round())


def test_a_page_in_use_without_memory_ends_the_engine(model: Path, plain: Result, tmp_path: Path) -> None:
    """The control: answers above were read from pages that were there, or the engine would have ended like this one."""
    damage = {"damage": "unmap", "damage_at": DAMAGED_AT}
    with start(job(model, of(tmp_path / "d", "one"), rounds=1, **damage)) as engine:
        engine.go()
        with pytest.raises(EngineFailed, match="before 'round'"):
            engine.wait_round(120)
        assert "illegal memory access" in engine.log()
    assert plain.rounds[0].steps > DAMAGED_AT


def test_started_alone_it_serves_with_what_sglang_chooses(model: Path, plain: Result, tmp_path: Path) -> None:
    """Kernels, page size and graphs of SGLang's own choice, prefill graphs among them, and no limit."""
    own = {"enable_deterministic_inference": False, "page_size": 1}
    result = run(job(model, of(tmp_path / "d", "one"), rounds=1, engine=own))
    say("managed, SGLang's own kernels", result)
    assert [len(line) for line in result.tokens] == [128] * len(PROMPTS)
    # Sums in another order part two answers where two tokens are nearly alike, and not at the first one.
    firsts = [line[0] == expected[0] for line, expected in zip(result.tokens, plain.rounds[0].tokens, strict=True)]
    assert sum(firsts) > 0.9 * len(firsts)
