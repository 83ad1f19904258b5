"""A managed engine, whole: its answers are a plain one's, its memory comes and goes, and what cannot work is refused.

The same tests for every engine; where one of them is said or called otherwise, its Subject knows how.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import elastickv
from elastickv._core import Ledger
from elastickv.ledger import TenantView, order_limit
from engines.conftest import TINY_PROMPTS as PROMPTS
from engines.harness import Engine, EngineFailed, run, start
from engines.oracle import differences
from engines.subjects import BLOCK, EACH, SGLANG, VLLM, Subject, greedy_neighbour, look, until
from support import Outcome

pytestmark = pytest.mark.slow

ROUNDS = [PROMPTS, PROMPTS]


@pytest.fixture
def plain(subject: Subject, request: pytest.FixtureRequest) -> list[list[int]]:
    """What the plain engine answers to ROUNDS, with all the memory it could want."""
    tokens: list[list[int]] = request.getfixturevalue(f"plain_{subject.kind}").tokens
    return tokens


@pytest.mark.parametrize(
    ("subject", "caching"),
    [
        pytest.param(VLLM, True, marks=pytest.mark.vllm, id="vllm"),
        pytest.param(VLLM, False, marks=pytest.mark.vllm, id="vllm-no-prefix-caching"),
        pytest.param(SGLANG, True, marks=pytest.mark.sglang, id="sglang"),
    ],
)
def test_squeezed_by_a_neighbour_it_answers_as_a_plain_one(
    subject: Subject, caching: bool, tiny_llama: Path, plain: list[list[int]], directory: Path
) -> None:
    """Addresses for 32 MiB, memory for 4, and a neighbour who has 2.75 of those and takes up to 0.25 more.

    So there are 640 tokens for twelve requests of 160 on average. vLLM begins more of them than it can finish, and
    preempts; SGLang begins fewer, and whether it has to retract one depends on which ends first.
    """
    environment = subject.managed(directory, blocks=64, ELASTICKV_IDLE_RELEASE="0.2s")
    engine = subject.caching(caching)
    with start(subject.job(tiny_llama, ROUNDS, environment, engine=engine)) as running:
        running.wait_ready()
        assert running.blocks == 512 * 32 / subject.block_tokens
        with greedy_neighbour(directory, base=44, most=4) as got:
            running.go()
            running.wait_round()
            running.go()
            running.wait_round()
            seen = look(directory).tenant("one")
        # Between the calls of its process nobody steps a vLLM.
        until(lambda: look(directory).tenant("one").usage.mapped_free == 0, 0.2 + 0.5 + 1.0)
        result = running.finish()
    assert differences(plain, result.tokens) == []
    assert seen.counters.misses > 0
    if subject is VLLM:
        assert result.preemptions > 0
    assert (result.prefix_hits > 0) is caching
    assert sum(got) > 0
    assert seen.engine.startswith(subject.version)
    assert seen.layout == subject.layout
    assert f"elastickv manages the KV cache of 'one' on host: {subject.told[0]}" in result.log
    assert all(text in result.log for text in subject.told)


@pytest.mark.parametrize("subject", EACH)
def test_processes_of_its_own_idle_release_and_death(
    subject: Subject, tiny_llama: Path, plain: list[list[int]], directory: Path, cli: Callable[..., Outcome]
) -> None:
    """As it is served: what schedules is a process of its own."""
    settings = {"ELASTICKV_IDLE_RELEASE": "0.5s", "ELASTICKV_CACHE_RELEASE": "2s"}
    environment = subject.managed(directory, blocks=128, **subject.spread, **settings)
    rounds = [PROMPTS, PROMPTS, PROMPTS * 4]
    with start(subject.job(tiny_llama, rounds, environment, core=None)) as engine:
        engine.wait_ready()
        where = ("--dir", directory, "--device", "host")
        proof = cli("doctor", "--name", "one", *where)
        assert (proof.code, proof.out[:5]) == (0, "ok   "), proof.out
        assert subject.version in cli("status", *where, "--json").out
        engine.go()
        first = engine.wait_round()
        _watch_it_give_back(directory, subject.always)
        limit = 40 * BLOCK
        ledger = Ledger.open(str(directory), "host")
        order_limit(ledger, "one", limit, 1000)  # of an idle engine, which acknowledges it
        engine.go()
        until(lambda: look(directory).tenant("one").usage.used > 4 * BLOCK, 30)
        order_limit(ledger, "one", limit - 4 * BLOCK, 1000)  # of a busy one
        order_limit(ledger, "one", limit, 1000)
        second = engine.wait_round()
        assert look(directory).tenant("one").leased <= limit
        assert differences(plain, first.tokens + second.tokens) == []
        engine.go()
        until(lambda: look(directory).tenant("one").usage.used > 4 * BLOCK, 30)
        _kill_the_engine(engine, subject, directory)


def _watch_it_give_back(directory: Path, always: int) -> None:
    def tenant() -> TenantView:
        return look(directory).tenant("one")

    began = time.monotonic()
    until(lambda: (now := tenant().usage).mapped_free + now.transit == 0, 0.5 + 0.5 + 1.0)
    kept = tenant()
    assert kept.usage.cached > 0, "cached prefixes outlast idle_release"
    assert kept.leased == kept.usage.cached + always
    until(lambda: tenant().leased == always, 2.0 + 0.5 + 1.0)
    assert time.monotonic() - began > 1.0
    assert tenant().mapped == always


def _kill_the_engine(engine: Engine, subject: Subject, directory: Path) -> None:
    """SIGKILL of the process that schedules, under load: a worker goes with it, and so does the memory."""
    by_title = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in engine.pids}
    schedulers = [pid for pid, title in by_title.items() if title.startswith(subject.scheduler)]
    workers = [pid for pid, title in by_title.items() if subject.worker and title.startswith(subject.worker)]
    assert (len(schedulers), len(workers)) == (1, 1 if subject.worker else 0)
    os.kill(schedulers[0], signal.SIGKILL)
    assert until(lambda: look(directory).held == 0, 5) < 1.0
    until(lambda: not any(_runs(worker) for worker in workers), 1.0)
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


@pytest.mark.parametrize("form", ["tensor", "pipeline"])
@pytest.mark.parametrize("subject", EACH[:1])
def test_two_ranks(subject: Subject, tiny_llama: Path, plain: list[list[int]], directory: Path, form: str) -> None:
    """Each rank maps half of every block; both draw on one budget. SGLang's: sgl/test_parity.py."""
    environment = subject.managed(directory, blocks=40, **subject.rank_environment)
    job = subject.job(tiny_llama, ROUNDS, environment, engine=subject.two_ranks[form], core=None)
    result = run(job)
    assert differences(plain, result.tokens) == []
    assert result.preemptions > 0
    assert f"virtual in {result.blocks} blocks" in result.log


@pytest.mark.parametrize("subject", EACH)
def test_a_block_in_use_that_is_damaged_is_seen(
    subject: Subject, tiny_llama: Path, plain: list[list[int]], directory: Path
) -> None:
    """The control of parity: the tensors that it is measured on are the ones that the model reads.

    Other bytes in four blocks change the answers, and without memory behind them the engine ends.
    """
    environment = subject.managed(directory, blocks=256)
    damage = {"damage": ["corrupt", "unmap"], "damage_at": subject.busy_step}
    with start(subject.job(tiny_llama, ROUNDS, environment, **damage)) as engine:
        engine.go()
        hurt = engine.wait_round()
        assert len(hurt.damaged) > 0
        assert differences(plain[: len(PROMPTS)], hurt.tokens) != []
        engine.go()
        with pytest.raises(EngineFailed, match="before 'round'"):
            engine.wait_round()
        assert subject.faulted in engine.log() + f"ended with {engine.process.wait(10)}"
    assert look(directory).held == 0


@pytest.mark.parametrize("subject", EACH[:1])
def test_a_limit_below_one_request_is_refused(subject: Subject, tiny_llama: Path, directory: Path) -> None:
    """SGLang needs no such refusal: it takes no request that is longer than the budget."""
    with pytest.raises(EngineFailed) as caught:
        run(subject.job(tiny_llama, ROUNDS, subject.managed(directory, blocks=64, ELASTICKV_LIMIT="2MiB")))
    assert f"elastickv cannot manage this engine: {subject.limit_refused}" in str(caught.value)
    assert look(directory).held == 0


@pytest.mark.parametrize("subject", EACH[:1])
def test_a_block_larger_than_the_budget_is_refused(subject: Subject, tiny_llama: Path, directory: Path) -> None:
    engine = subject.large_blocks
    with pytest.raises(EngineFailed) as caught:
        run(subject.job(tiny_llama, ROUNDS, subject.managed(directory, blocks=24), engine=engine))
    assert f"elastickv cannot manage this engine: {subject.block_refused}" in str(caught.value)
