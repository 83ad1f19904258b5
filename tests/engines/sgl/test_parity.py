"""Managed SGLang answers what plain SGLang answers, while its limit moves and its pages come and go.

SGLang's own checks of its memory are on, those of a busy engine too, and every one is fatal.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engines.conftest import TINY_PROMPTS, PlainSGLang
from engines.harness import start
from engines.oracle import differences
from engines.subjects import BLOCK, CORES, SGLANG, look

pytestmark = [pytest.mark.sglang, pytest.mark.slow]

BLOCKS = 64
FORMS: dict[str, tuple[int, dict[str, Any]]] = {
    "page-1": (1, {"page_size": 1}),
    "page-16": (1, {"page_size": 16}),
}


@pytest.mark.parametrize("form", FORMS)
def test_answers_are_those_of_a_plain_engine(
    form: str, tiny_llama: Path, plain_sglang: PlainSGLang, directory: Path
) -> None:
    """48 requests in 4 MiB and in 1 MiB, by turns of three steps; they would take 6 MiB together."""
    ranks, engine = FORMS[form]
    full = BLOCKS * BLOCK
    moves = {"directory": str(directory), "device": "host", "name": "one", "every": 3, "limits": [full // 4, full]}
    environment = SGLANG.managed(directory, blocks=BLOCKS, **(SGLANG.rank_environment if ranks > 1 else {}))
    core = None if ranks > 1 else CORES[0]
    job = SGLANG.job(tiny_llama, [TINY_PROMPTS] * 2, environment, engine=engine, moves=moves, core=core)
    with start(job) as running:
        for _ in job.rounds:
            running.go()
            done = running.wait_round()
        seen = look(directory).tenant("one")
        result = running.finish()
    assert differences(plain_sglang.tokens, result.tokens) == []
    assert done.moved > 40
    assert sum(seen.histograms.unmap.counts) >= 5 * ranks
    assert seen.counters.evicted_limit > 0
