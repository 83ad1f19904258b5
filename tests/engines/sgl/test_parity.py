"""Managed SGLang answers what plain SGLang answers, while its limit moves and its pages come and go.

SGLang's own checks of its memory are on, those of a busy engine too, and every one is fatal.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engines.conftest import TINY_PROMPTS, PlainSGLang
from engines.harness import CORES, Engine, run, start
from engines.oracle import differences
from engines.subjects import BLOCK, SGLANG, kill, look, until

pytestmark = [pytest.mark.sglang, pytest.mark.slow]

BLOCKS = 64
SAVER: dict[str, Any] = {"enable_memory_saver": True}
FORMS: dict[str, tuple[dict[str, Any], bytes]] = {
    "page-1": ({"page_size": 1}, b""),
    "page-16": ({"page_size": 16}, b""),
    "page-1-tensor": ({"page_size": 1, "tp_size": 2, **SAVER}, b"sglang::scheduler_TP1"),
    "page-16-pipeline": ({"page_size": 16, "pp_size": 2, **SAVER}, b"sglang::scheduler_PP1"),
}
"""Arguments, and how the title of the second rank's process begins."""


@pytest.mark.parametrize("form", FORMS)
def test_answers_are_those_of_a_plain_engine(
    form: str, tiny_llama: Path, plain_sglang: PlainSGLang, directory: Path
) -> None:
    """48 requests in 4 MiB and in 1 MiB, by turns of three steps; they would take 6 MiB together.

    In the end one of two ranks is killed while it works.
    """
    engine, second = FORMS[form]
    ranks = 2 if second else 1
    full = BLOCKS * BLOCK
    moves = {"directory": str(directory), "device": "host", "name": "one", "every": 3, "limits": [full // 4, full]}
    environment = SGLANG.managed(directory, blocks=BLOCKS, **(SGLANG.rank_environment if ranks > 1 else {}))
    core = None if ranks > 1 else CORES[0]
    rounds = [TINY_PROMPTS] * 2 + [TINY_PROMPTS * 4] * (ranks > 1)
    job = SGLANG.job(tiny_llama, rounds, environment, engine=engine, moves=moves, core=core)
    with start(job) as running:
        tokens = []
        for _ in range(2):
            running.go()
            done = running.wait_round()
            tokens += done.tokens
        seen = look(directory).tenant("one")
        if second:
            _both_ranks_sleep_and_wake(running, directory)
            running.go()
            until(lambda: look(directory).tenant("one").usage.used > 4 * BLOCK, 60)
            kill(running, second, directory)
    assert differences(plain_sglang.tokens, tokens) == []
    assert done.moved > 40
    assert sum(seen.histograms.unmap.counts) >= 5 * ranks
    assert seen.counters.evicted_limit > 0


def test_a_raised_limit_lets_requests_in_before_one_has_left(tiny_llama: Path, directory: Path) -> None:
    """SGLang closes admission until a running request leaves: in memory of its own, nothing else makes room."""
    raised = 40
    moves = {"directory": str(directory), "device": "host", "name": "one", "every": raised}
    limits = [10 * BLOCK, BLOCKS * BLOCK]
    environment = SGLANG.managed(directory, blocks=BLOCKS)
    done = run(
        SGLANG.job(tiny_llama, [TINY_PROMPTS], environment, moves={**moves, "limits": limits}, probe="running")
    ).rounds[0]
    before, after = done.probed[raised - 1], done.probed[raised : 2 * raised]
    assert before > 0
    assert next(number for number in after if number != before) > before, done.probed


def _both_ranks_sleep_and_wake(running: Engine, directory: Path) -> None:
    """Cache and weights go on both, or the next round would not begin."""
    assert running.call("release_memory_occupation")[1] is None
    row = look(directory).tenant("one")
    assert row.asleep
    assert row.usage.cached == 0
    assert row.leased == row.usage.pinned
    assert running.call("resume_memory_occupation")[1] is None
    assert not look(directory).tenant("one").asleep
    assert running.log().count("of weights came back from") == 2
