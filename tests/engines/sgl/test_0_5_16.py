"""SGLang 0.5.16, through its method hooks: what test_parity.py shows of the newest release.

On a CPU it serves pages of one token only.
"""

from __future__ import annotations

import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest

from elastickv._core import Ledger
from elastickv.config import process_environment
from engines.conftest import TINY_PROMPTS, needs_0_5_16
from engines.harness import EngineFailed, Result, run, start
from engines.kinds import COMMON
from engines.kinds import SGLANG_0_5_16 as KIND
from engines.oracle import differences
from engines.subjects import BLOCK, SGLANG_0_5_16, greedy_neighbour, look, until

pytestmark = [
    pytest.mark.sglang,
    pytest.mark.slow,
    needs_0_5_16,
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
    """48 requests in 4 MiB and in 1 MiB, by turns of three steps; they would take 6 MiB together. With the second half,
    a neighbour has 1.9 MiB and takes up to 1 more.

    Once these are answered and the limit moves no more, memory in use is taken away: the engine ends at the first
    access.
    """
    full = BLOCKS * BLOCK
    moves = {"directory": str(directory), "device": "host", "name": "one", "every": 3, "limits": [full // 4, full]}
    damage = {"damage": ["none", "none", "unmap"], "damage_at": SGLANG_0_5_16.busy_step}
    environment = SGLANG_0_5_16.managed(directory, blocks=BLOCKS)
    rounds = [*ROUNDS, TINY_PROMPTS]
    saver = {"enable_memory_saver": True}
    with start(SGLANG_0_5_16.job(tiny_llama, rounds, environment, engine=saver, moves=moves, **damage)) as running:
        answers = []
        running.wait_ready()
        for company in (nullcontext(), greedy_neighbour(directory, base=30, most=16)):
            with company:
                running.go()
                done = running.wait_round()
                answers += done.tokens
        seen = look(directory).tenant("one")
        assert running.call("release_memory_occupation") == (None, None)
        assert look(directory).tenant("one").leased == SGLANG_0_5_16.always
        assert running.call("resume_memory_occupation") == (None, None)
        assert "of weights came back from" in running.log()
        Ledger.open(str(directory), "host").order_limit("one", full, False)
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


def test_without_a_prefix_cache_answers_are_a_plain_engine_s_and_nothing_stays(
    tiny_llama: Path, plain: Result, directory: Path
) -> None:
    """SGLang's checks of its memory are on, also while it is busy: a request that waits between two chunks is counted.

    Once it is idle, all but the padding page is given back.
    """
    full = BLOCKS * BLOCK
    moves = {"directory": str(directory), "device": "host", "name": "one", "every": 3, "limits": [full // 4, full]}
    environment = SGLANG_0_5_16.managed(directory, blocks=BLOCKS)
    job = SGLANG_0_5_16.job(tiny_llama, ROUNDS[:1], environment, engine=SGLANG_0_5_16.uncached, moves=moves)
    with start(job) as running:
        running.go()
        done = running.wait_round()
        seen = look(directory).tenant("one")
        until(lambda: look(directory).tenant("one").leased == SGLANG_0_5_16.always, 60)
    assert differences(plain.rounds[0].tokens, done.tokens) == []
    assert done.cached == [0] * len(TINY_PROMPTS)
    assert done.preemptions > 0
    assert done.moved > 20
    assert sum(seen.histograms.unmap.counts) >= 5


def _say(code: str) -> str:
    """What a Python with that SGLang alone prints."""
    paths = [*map(str, KIND.path), process_environment().get("PYTHONPATH", "")]
    environment = process_environment() | COMMON | {"PYTHONPATH": ":".join(filter(None, paths))}
    command = [sys.executable, "-W", "ignore", "-c", code]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr[-4000:]
    return ended.stdout


def test_doctor_knows_it() -> None:
    said = _say("from elastickv.cli.checks import engine_checks; print(*engine_checks('sglang'), sep='\\n')")
    assert "outcome='ok', text='version 0.5.16; 0.5.16 or >=0.5.23,<0.6 is managed'" in said
    assert "bad" not in said


CACHES = """
from types import SimpleNamespace
from sglang.srt.mem_cache.chunk_cache import ChunkCache
from sglang.srt.mem_cache.radix_cache import RadixCache
from elastickv.engines.sglang import tree

for stock in ChunkCache, RadixCache:
    cache = stock.__new__(stock)
    cache.protected_size_ = 5
    cache.token_to_kv_pool_allocator = SimpleNamespace(withheld_size=lambda: 7)
    assert tree.adopt(cache, lambda: 3) is cache
    print(type(cache).__mro__[1].__name__, cache.protected_size(), isinstance(cache, tree.Elastic))
"""


def test_what_is_withheld_or_parked_is_protected_with_and_without_a_prefix_cache() -> None:
    """A cache of chunks protects nothing itself."""
    assert "ChunkCache 10 True\nRadixCache 15 True\n" in _say(CACHES)
