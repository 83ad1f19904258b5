"""A managed engine, whole: its answers are a plain one's, its memory comes and goes, and what cannot work is refused.

The same tests for every engine; where one of them is said or called otherwise, its Subject knows how.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from elastickv._core import Ledger
from elastickv.ledger import TenantView, order_limit
from engines.conftest import TINY_PROMPTS as PROMPTS
from engines.harness import Engine, EngineFailed, run, start
from engines.oracle import differences
from engines.subjects import (
    BLOCK,
    EACH,
    SGLANG,
    VLLM,
    Subject,
    greedy_neighbour,
    kill,
    look,
    nothing_left,
    titled,
    until,
)
from support import Outcome

pytestmark = pytest.mark.slow

ROUNDS = [PROMPTS, PROMPTS]
CACHE_LIMIT = 16 * BLOCK
"""Bytes of prefixes that an engine may keep; a round leaves more."""


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
        until(lambda: look(directory).tenant("one").usage.mapped_free == 0, 30)
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
    settings = {
        "ELASTICKV_IDLE_RELEASE": "0.5s",
        "ELASTICKV_CACHE_RELEASE": "4s",
        "ELASTICKV_CACHE_LIMIT": str(CACHE_LIMIT),
    }
    environment = subject.managed(directory, blocks=128, **subject.spread, **settings)
    rounds = [PROMPTS, PROMPTS, PROMPTS, PROMPTS * 4]
    with start(subject.job(tiny_llama, rounds, environment, core=None)) as engine:
        engine.wait_ready()
        where = ("--dir", directory, "--device", "host")
        proof = cli("doctor", "--name", "one", *where)
        assert (proof.code, proof.out[:5]) == (0, "ok   "), proof.out
        assert subject.version in cli("status", *where, "--json").out
        engine.go()
        first = engine.wait_round()
        _watch_it_give_back(directory, subject.always, lambda size: cli("trim", "one", size, *where, "--json"))
        limit = 40 * BLOCK
        ledger = Ledger.open(str(directory), "host")
        order_limit(ledger, "one", limit, 30_000)  # of an idle engine, which acknowledges it
        engine.go()
        until(lambda: look(directory).tenant("one").usage.used > 4 * BLOCK, 30)
        order_limit(ledger, "one", limit - 4 * BLOCK, 30_000)  # of a busy one
        until(lambda: look(directory).tenant("one").usage.used > 16 * BLOCK, 30)
        order_limit(ledger, "one", 10 * BLOCK, 30_000, now=True)  # of one that has to send requests back to wait
        assert look(directory).tenant("one").leased <= 10 * BLOCK
        order_limit(ledger, "one", limit, 30_000)
        second = engine.wait_round()
        assert second.preemptions > first.preemptions == 0
        assert look(directory).tenant("one").leased <= limit
        assert differences(plain, first.tokens + second.tokens) == []
        with nothing_left(directory, subject.always):
            refused = look(directory).tenant("one").counters.misses
            engine.go()
            until(lambda: look(directory).tenant("one").counters.misses > refused, 30)
            assert look(directory).tenant("one").leased == subject.always
        third = engine.wait_round()
        assert differences(plain[: len(PROMPTS)], third.tokens) == []
        engine.go()
        until(lambda: look(directory).tenant("one").usage.used > 4 * BLOCK, 30)
        _kill_the_engine(engine, subject, directory)


def _watch_it_give_back(directory: Path, always: int, trim: Callable[[str], Outcome]) -> None:
    """After a round: prefixes above their budget at once, then free memory, a part for a trim, and the rest later."""
    seen: list[TenantView] = []

    def tenant() -> TenantView:
        seen.append(look(directory).tenant("one"))
        return seen[-1]

    until(lambda: (now := tenant().usage).mapped_free + now.transit == 0, 30)
    kept = seen[-1]
    assert 0 < kept.usage.cached <= CACHE_LIMIT, "cached prefixes outlast idle_release"
    assert kept.leased == kept.usage.cached + always
    assert kept.counters.evicted_budget > 0
    assert kept.counters.evicted_limit == 0
    done = trim(str(4 * BLOCK))
    assert (done.code, json.loads(done.out)["given"]) == (0, 4 * BLOCK), done
    until(lambda: tenant().leased <= kept.leased - 4 * BLOCK, 30)
    assert seen[-1].counters.evicted_limit > 0
    until(lambda: tenant().leased == always, 30)
    assert seen[-1].counters.evicted_idle > 0
    assert seen[-1].mapped == always


def _kill_the_engine(engine: Engine, subject: Subject, directory: Path) -> None:
    """SIGKILL of the process that schedules, under load: a worker goes with it, and so does the memory."""
    workers = titled(engine, subject.worker) if subject.worker else []
    assert len(workers) == (1 if subject.worker else 0)
    kill(engine, subject.scheduler, directory)
    until(lambda: not any(_runs(worker) for worker in workers), 30)


def _runs(pid: int) -> bool:
    try:
        return " Z " not in Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False


@pytest.mark.parametrize("form", ["tensor", "pipeline"])
@pytest.mark.parametrize("subject", EACH[:1])
def test_two_ranks(subject: Subject, tiny_llama: Path, plain: list[list[int]], directory: Path, form: str) -> None:
    """Each rank maps half of every block; both draw on one budget; one is killed in the end. SGLang: test_parity.py."""
    environment = subject.managed(directory, blocks=40, **subject.rank_environment)
    rounds = [*ROUNDS, PROMPTS * 4]
    tokens: list[list[int]] = []
    with start(subject.job(tiny_llama, rounds, environment, engine=subject.two_ranks[form], core=None)) as engine:
        for _ in ROUNDS:
            engine.go()
            tokens += (done := engine.wait_round()).tokens
        assert differences(plain, tokens) == []
        assert done.preemptions > 0
        assert f"virtual in {engine.blocks} blocks" in engine.log()
        assert look(directory).held > 0
        engine.go()
        kill(engine, b"VLLM::Worker_TP1" if form == "tensor" else b"VLLM::Worker_PP1", directory)


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
