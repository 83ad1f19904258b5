"""Two real models in one memory: their answers, what they hold, and what is left when one of them dies.

SmolLM2-135M-Instruct in float32, real prompts, two vLLM engines at once. Plain vLLM with ample memory is the oracle;
test_oracle.py shows that its own answers do not depend on batches, preemption or prefix caching.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from elastickv.config import Settings
from elastickv.demo.model import ensure_model
from elastickv.demo.prompts import mixed
from elastickv.demo.watch import KernelMemory, Watch
from elastickv.ledger import DeviceView, read_device
from elastickv.memory import open_device_ledger
from engines.harness import CORES, Engine, Job, start
from engines.oracle import differences

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

MIB = 1024 * 1024
NAMES = ("left", "right")
PROMPTS = {"left": [p.text for p in mixed(64)], "right": [p.text for p in mixed(64, 64)]}
ONE_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
IDLE_S, CACHE_S = 1.0, 4.0


@pytest.fixture(scope="module")
def model() -> Path:
    return ensure_model()


@pytest.fixture(scope="module")
def plain(model: Path) -> dict[str, list[list[int]]]:
    """What plain vLLM answers, with all the memory that it could want."""
    with ExitStack() as stack:
        engines = {
            name: stack.enter_context(start(Job(model, [PROMPTS[name]], environment=ONE_PROCESS, core=core_of(name))))
            for name in NAMES
        }
        for engine in engines.values():
            engine.go()
        done = {name: engine.finish() for name, engine in engines.items()}
    assert [result.preemptions for result in done.values()] == [0, 0]
    return {name: result.tokens for name, result in done.items()}


def core_of(name: str) -> int:
    """A core for each engine; two engines on threads of both cores would wait for each other's."""
    return CORES[NAMES.index(name) % len(CORES)]


class Pair:
    """Two engines behind one budget. `view()` reads the ledger."""

    def __init__(self, stack: ExitStack, directory: Path, budget: int, jobs: dict[str, Job]) -> None:
        self.budget = budget
        self.directory = directory
        self.ledger = open_device_ledger("host", self.settings(directory, budget))
        self.engines: dict[str, Engine] = {name: stack.enter_context(start(job)) for name, job in jobs.items()}
        for engine in self.engines.values():
            engine.wait_ready()
        self.kernel = KernelMemory(lambda: [pid for e in self.engines.values() for pid in e.pids])
        assert self.kernel.find() == 2

    @staticmethod
    def settings(directory: Path, budget: int) -> Settings:
        return Settings.load(arguments={"directory": str(directory), "device": "host", "capacity": budget}, environ={})

    @staticmethod
    def environment(directory: Path, budget: int, name: str, **more: str) -> dict[str, str]:
        return {
            "VLLM_PLUGINS": "elastickv",
            "ELASTICKV": "1",
            "ELASTICKV_DIR": str(directory),
            "ELASTICKV_CAPACITY": str(budget),
            "ELASTICKV_NAME": name,
            **more,
        }

    def view(self) -> DeviceView:
        return read_device(self.ledger)

    def watch(self) -> Watch:
        return Watch(self.ledger, interval=0.02, kernel=self.kernel.bytes)


def never_over(watch: Watch, budget: int) -> None:
    assert watch.error is None
    assert watch.samples > 20
    assert watch.over_budget == 0
    assert 0 < watch.peak_sum <= budget
    assert 0 < watch.peak_kernel <= budget


@pytest.mark.parametrize("caching", [True, False], ids=["prefix-caching", "no-prefix-caching"])
def test_squeezed_engines_answer_as_plain_ones_do(
    model: Path, plain: dict[str, list[list[int]]], tmp_path: Path, caching: bool
) -> None:
    """64 prompts x 64 tokens an engine, both at once, in about a third of what they would like to have."""
    budget = 112 * MIB
    jobs = {
        name: Job(
            model,
            [PROMPTS[name]],
            engine={"enable_prefix_caching": caching},
            environment={**Pair.environment(tmp_path / "d", budget, name), **ONE_PROCESS},
            core=core_of(name),
        )
        for name in NAMES
    }
    with ExitStack() as stack:
        pair = Pair(stack, tmp_path / "d", budget, jobs)
        with pair.watch() as watch:
            for engine in pair.engines.values():
                engine.go()
            for engine in pair.engines.values():
                engine.wait_round()
            # Before they end: a tenant's counters leave the ledger with it.
            counters = {tenant.name: tenant.counters for tenant in pair.view().tenants}
            results = {name: engine.finish() for name, engine in pair.engines.items()}
    never_over(watch, budget)
    for name, result in results.items():
        assert differences(plain[name], result.tokens) == []
        assert result.preemptions > 0
        assert counters[name].misses > 0
        assert counters[name].evicted > 0 or not caching
    assert watch.peak_sum > 0.9 * budget


@pytest.fixture(scope="module")
def pair(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """Two engines as they are served: scheduler and worker in processes of their own."""
    budget, directory = 160 * MIB, tmp_path_factory.mktemp("pair") / "d"
    more = {"ELASTICKV_IDLE_RELEASE": f"{IDLE_S}", "ELASTICKV_CACHE_RELEASE": f"{CACHE_S}"}
    jobs = {
        name: Job(
            model,
            [PROMPTS[name][:32], PROMPTS[name][:32]],
            max_tokens=48,
            core=core_of(name),
            engine={"max_num_seqs": 32},
            environment=Pair.environment(directory, budget, name, **more),
        )
        for name in NAMES
    }
    with ExitStack() as stack:
        yield Pair(stack, directory, budget, jobs)


def test_each_alone_takes_most_of_the_budget_and_gives_it_back(pair: Pair, plain: dict[str, list[list[int]]]) -> None:
    for name in NAMES:
        with pair.watch() as watch:
            pair.engines[name].go()
            done = pair.engines[name].wait_round()
            ended = time.monotonic()
        never_over(watch, pair.budget)
        assert watch.peaks[name] > 0.8 * pair.budget
        assert [line[:48] for line in plain[name][:32]] == done.tokens
        # From outside, while the engine sleeps: first what holds no cached prefix, later that too.
        free_gone = cache_gone = None
        while cache_gone is None and time.monotonic() < ended + CACHE_S + 2:
            now, tenant = time.monotonic(), pair.view().tenant(name)
            if free_gone is None and tenant.usage.mapped_free + tenant.usage.transit == 0:
                free_gone = now - ended
            if tenant.leased <= tenant.page_bytes:  # block 0 alone
                cache_gone = now - ended
            time.sleep(0.02)
        assert free_gone is not None
        assert free_gone <= IDLE_S + 0.5
        assert cache_gone is not None
        assert CACHE_S - 0.5 < cache_gone <= CACHE_S + 0.5
        assert pair.kernel.bytes() == sum(tenant.leased for tenant in pair.view().tenants)


def test_a_killed_engine_leaves_its_memory_and_a_truthful_ledger(pair: Pair, plain: dict[str, list[list[int]]]) -> None:
    """Runs last: it kills the left engine of the pair while both work."""
    probe = pair.ledger.join("probe")
    for name in NAMES:
        pair.engines[name].go()
    until = time.monotonic() + 60
    while (view := pair.view()).free > pair.budget / 10 or view.tenant("left").leased < pair.budget / 5:
        assert time.monotonic() < until, "the engines did not fill the budget"
        time.sleep(0.01)
    doomed = view.tenant("left")
    wanted = doomed.leased // 2
    assert not probe.lease(wanted, ring=False)
    os.kill(doomed.pid, signal.SIGKILL)
    killed = time.monotonic()
    while not probe.lease(wanted, ring=True):
        assert time.monotonic() < killed + 1.0, "its bytes could not be leased within a second"
        time.sleep(0.005)
    probe.give(wanted)
    probe.close()
    while pair.view().tenant("left").alive:
        assert time.monotonic() < killed + 1.0, "the ledger still shows it as running after a second"
        time.sleep(0.005)
    left = pair.view().tenant("left")
    assert (left.leased, left.mapped) == (0, 0)
    with pair.watch() as watch:
        done = pair.engines["right"].wait_round()
    never_over(watch, pair.budget)
    assert [line[:48] for line in plain["right"][:32]] == done.tokens
    assert [tenant.name for tenant in pair.view().living] == ["right"]
