"""Weights on the ledger: engines that start at one moment, beside a busy neighbour, in a queue, or not at all."""

from __future__ import annotations

import os
import re
import signal
from contextlib import ExitStack
from pathlib import Path

import pytest

import elastickv
from elastickv._core import Ledger
from elastickv.errors import NotFound
from elastickv.ledger import order_limit
from engines.conftest import TINY_PROMPTS as PROMPTS
from engines.harness import CORES, Engine, EngineFailed, Job, start
from engines.oracle import differences
from engines.subjects import BLOCK, EACH, VLLM, Subject, look, until

pytestmark = pytest.mark.slow

MIB = 1024 * 1024
BLOCKS = 192
CAPACITY = BLOCKS * BLOCK
ESTIMATE = "2.5 MiB"
"""Of the tiny model's matrices. In memory it has half a MiB of rotations besides, which no file holds."""
TAKEN = range(3_150_000, 3_151_000)


@pytest.fixture
def plain(subject: Subject, request: pytest.FixtureRequest) -> list[list[int]]:
    """What the plain engine answers to PROMPTS."""
    tokens: list[list[int]] = request.getfixturevalue(f"plain_{subject.kind}").tokens
    return tokens[: len(PROMPTS)]


def job(subject: Subject, model: Path, directory: Path, name: str, core: int = 0, **settings: str) -> Job:
    settings = {"ELASTICKV_STATIC": "checkpoint", **settings}
    environment = subject.managed(directory, blocks=BLOCKS, name=name, **settings)
    return subject.job(model, [PROMPTS], environment, core=CORES[core % len(CORES)])


def demand(directory: Path, name: str) -> int:
    try:
        return look(directory).tenant(name).demand
    except NotFound:
        return 0


@pytest.mark.parametrize("subject", EACH)
def test_two_start_at_one_moment_and_a_third_finds_no_room(
    subject: Subject, tiny_llama: Path, plain: list[list[int]], directory: Path
) -> None:
    """The third says who holds what, while the two go on serving."""
    with ExitStack() as stack:
        made = [job(subject, tiny_llama, directory, name, i) for i, name in enumerate(("left", "right"))]
        pair = [stack.enter_context(start(one)) for one in made]
        for engine in pair:
            engine.wait_ready()
        view = look(directory)
        assert all(tenant.static_bytes in TAKEN for tenant in view.living)
        assert all(tenant.static_used == tenant.static_bytes for tenant in view.living)
        assert sorted(tenant.name for tenant in view.living) == ["left", "right"]
        for engine in pair:
            engine.go()
        greedy = {"ELASTICKV_STATIC": "7MiB", "ELASTICKV_START_WAIT": "1s"}
        with start(job(subject, tiny_llama, directory, "third", **greedy)) as third:
            with pytest.raises(EngineFailed):
                third.wait_ready()
            text = third.log()
        assert "elastickv does not start this engine: waited 1 s for 7 MiB of host for weights, graphs and act" in text
        assert "activations: of 12 MiB, '" in text
        for name in ("left", "right"):
            assert re.search(rf"'{name}' holds [\d.]+ MiB \(3 MiB static, [\d.]+ \w+ in use\), ", text)
        assert "'third' (this one) holds 0 bytes" in text
        results = [engine.finish() for engine in pair]
    for result in results:
        assert differences(plain, result.tokens) == []
        assert f"elastickv has leased {ESTIMATE} static for weights, graphs and activations" in result.log
        assert "strict (no scratch pages), 3 MiB static" in result.log
    assert look(directory).held == 0


@pytest.mark.parametrize("subject", EACH)
def test_it_waits_beside_a_neighbour_and_obeys_limits_meanwhile(
    subject: Subject, tiny_llama: Path, plain: list[list[int]], directory: Path
) -> None:
    """The neighbour has pages in use, so nothing can be asked of it: the engine waits until they are freed."""
    options = {"page": BLOCK, "idle_release": "0.05s"}
    with elastickv.open_device("host", capacity=CAPACITY, directory=str(directory)) as device:
        cache = device.join("neighbour", **options).cache(num_blocks=512, block_bytes=BLOCK)
        ids = cache.alloc(170)
        assert ids is not None
        with start(job(subject, tiny_llama, directory, "one", ELASTICKV_LIMIT="12MiB")) as engine:
            until(lambda: demand(directory, "one") > 0, 120)
            limit = 9 * MIB
            order_limit(Ledger.open(str(directory), "host"), "one", limit, 10_000)
            assert look(directory).tenant("one").applied.bytes == limit
            cache.free(ids)
            engine.wait_ready()
            row = look(directory).tenant("one")
            assert row.static_bytes in TAKEN
            assert row.wanted.bytes == limit
            _nothing_sleeps_but_the_cache(engine, subject, directory)
            result = engine.finish()
    assert differences(plain, result.tokens) == []
    assert f"elastickv waits for {ESTIMATE} of host for weights, graphs and activations: of 12" in result.log
    assert look(directory).tenant("one").wanted.bytes == limit, "kept for its restart"


def _nothing_sleeps_but_the_cache(engine: Engine, subject: Subject, directory: Path) -> None:
    """Without the engine's own option for sleep the weights stay, and stay leased."""
    assert engine.call(*subject.sleep)[1] is None
    row = look(directory).tenant("one")
    assert row.leased == subject.always
    assert row.static_bytes in TAKEN
    assert row.asleep
    assert engine.call(*subject.wake)[1] is None
    assert not look(directory).tenant("one").asleep


@pytest.mark.vllm
def test_a_limit_that_was_set_in_its_absence_holds_from_the_start(tiny_llama: Path, directory: Path) -> None:
    limit = 8 * MIB
    ledger = Ledger.open(str(directory), "host", CAPACITY)
    ledger.join("one", limit=9 * MIB, set_limit=True, lasting=True).close()
    with pytest.raises(NotFound, match="does not run, so nobody can acknowledge its limit; the limit is kept"):
        order_limit(ledger, "one", limit, 100)
    with start(job(VLLM, tiny_llama, directory, "one")) as engine:
        engine.wait_ready()
        assert look(directory).tenant("one").applied.bytes == limit
        assert f"limit {limit // MIB} MiB" in engine.log()


@pytest.mark.parametrize("subject", EACH)
def test_killed_while_it_loads_it_leaves_nothing(subject: Subject, tiny_llama: Path, directory: Path) -> None:
    """The process that schedules dies while nothing is loaded yet: the others end, the lease returns."""
    with start(job(subject, tiny_llama, directory, "one", **subject.spread)) as engine:
        until(lambda: _static(directory) > 0, 120)
        os.kill(look(directory).tenant("one").pid, signal.SIGKILL)
        until(lambda: look(directory).held == 0, 60)
        until(lambda: engine.process.poll() is not None, 60)
    assert not look(directory).tenant("one").alive


def _static(directory: Path) -> int:
    try:
        return look(directory).tenant("one").static_bytes
    except NotFound:
        return 0
