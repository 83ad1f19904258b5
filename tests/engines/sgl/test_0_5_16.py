"""SGLang 0.5.16, through its method hooks: what test_parity.py shows of the newest release.

On a CPU it serves pages of one token only.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from engines.conftest import TINY_PROMPTS
from engines.harness import EngineFailed, Result, run, start
from engines.kinds import OLDER_SGLANG
from engines.oracle import differences
from engines.subjects import BLOCK, SGLANG_0_5_16, look

pytestmark = [
    pytest.mark.sglang,
    pytest.mark.slow,
    pytest.mark.skipif(
        not OLDER_SGLANG.is_dir(), reason=f"no SGLang 0.5.16 in {OLDER_SGLANG}; scripts/setup installs it"
    ),
]

BLOCKS = 64
ROUNDS = [TINY_PROMPTS, TINY_PROMPTS]


@pytest.fixture(scope="module")
def plain(tiny_llama: Path) -> Result:
    """What plain SGLang 0.5.16 answers, with all the memory it could want."""
    return run(SGLANG_0_5_16.job(tiny_llama, ROUNDS))


def test_answers_are_those_of_a_plain_engine_and_no_page_in_use_is_spare(
    tiny_llama: Path, plain: Result, directory: Path
) -> None:
    """48 requests in 4 MiB and in 1 MiB, by turns of three steps; they would take 6 MiB together.

    Once these are answered, memory behind four tokens in use is taken away: that ends the engine.
    """
    full = BLOCKS * BLOCK
    moves = {"directory": str(directory), "device": "host", "name": "one", "every": 3, "limits": [full // 4, full]}
    damage = {"damage": ["none", "none", "unmap"], "damage_at": SGLANG_0_5_16.busy_step}
    environment = SGLANG_0_5_16.managed(directory, blocks=BLOCKS)
    rounds = [*ROUNDS, TINY_PROMPTS]
    with start(SGLANG_0_5_16.job(tiny_llama, rounds, environment, moves=moves, **damage)) as running:
        answers = []
        for _ in ROUNDS:
            running.go()
            done = running.wait_round()
            answers += done.tokens
        seen = look(directory).tenant("one")
        running.go()
        with pytest.raises(EngineFailed, match="before 'round'"):
            running.wait_round()
        assert SGLANG_0_5_16.faulted in running.log()
    assert differences(plain.tokens, answers) == []
    assert seen.engine == "sglang 0.5.16"
    assert seen.layout == SGLANG_0_5_16.layout
    assert done.moved > 40
    assert sum(seen.histograms.unmap.counts) >= 5
    assert seen.counters.evicted_limit > 0
    assert look(directory).held == 0
