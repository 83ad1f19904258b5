"""Plain vLLM as the oracle: which of its own settings change its greedy tokens (none may), and that it can be wrong.

What is proved here for plain vLLM is what the managed engine is measured against: an answer depends on the prompt
alone, not on the batch, the size of the cache, preemption, or prefix caching.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from elastickv.demo.model import ensure_model
from elastickv.demo.prompts import mixed
from engines.harness import EngineFailed, Job, Result, run, start
from engines.oracle import Difference, differences, judge, make_tiny_llama, tiny_prompts

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

CORES = sorted(os.sched_getaffinity(0))
ONE_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
TINY: dict[str, Any] = {"skip_tokenizer_init": True, "max_num_seqs": 12, "kv_cache_memory_bytes": 256 << 20}
PROMPTS = tiny_prompts(32)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("tiny"))


def tiny_job(model: Path, **changes: Any) -> Job:
    engine = {**TINY, **changes.pop("engine", {})}
    return Job(model, [PROMPTS, PROMPTS], engine=engine, environment=ONE_PROCESS, **changes)


@pytest.fixture(scope="module")
def ample(tiny: Path) -> Result:
    """Every block that the requests could want, all at once, one round after the other."""
    return run(tiny_job(tiny, core=CORES[0]))


def test_the_tiny_model_answers_with_many_tokens(ample: Result) -> None:
    """A model that repeats itself would hide a wrong cache."""
    assert min(len(line) for line in ample.tokens) == 64
    assert sum(len(set(line)) for line in ample.tokens) / len(ample.tokens) > 16


def test_cached_prefixes_do_not_change_the_answers(ample: Result) -> None:
    assert ample.prefix_hits > 0
    assert ample.rounds[0].tokens == ample.rounds[1].tokens


@pytest.mark.parametrize("caching", [True, False], ids=["prefix-caching", "no-prefix-caching"])
def test_preemption_does_not_change_the_answers(tiny: Path, ample: Result, caching: bool) -> None:
    """40 blocks of 32 tokens for requests that would like about 75."""
    engine = {"num_gpu_blocks_override": 40, "enable_prefix_caching": caching}
    squeezed = run(tiny_job(tiny, engine=engine, core=CORES[0]))
    assert squeezed.preemptions > 0
    assert (squeezed.prefix_hits > 0) is caching
    assert differences(ample.tokens, squeezed.tokens) == []


def test_two_engines_at_once_do_not_change_the_answers(tiny: Path, ample: Result) -> None:
    with start(tiny_job(tiny, core=CORES[0])) as left, start(tiny_job(tiny, core=CORES[-1])) as right:
        for engine in (left, right):
            engine.wait_ready()
        for engine in (left, right):
            engine.go()
        results = [engine.finish() for engine in (left, right)]
    assert [differences(ample.tokens, result.tokens) for result in results] == [[], []]


def test_a_corrupted_block_changes_the_answers(tiny: Path, ample: Result) -> None:
    """The control: were this to pass as equal, no comparison of tokens would mean anything."""
    hurt = run(tiny_job(tiny, core=CORES[0], damage_at=20))
    assert hurt.rounds[0].damaged
    assert differences(ample.tokens, hurt.tokens) != []


def test_a_block_in_use_without_memory_ends_the_engine(tiny: Path) -> None:
    """The other control: what reads a page that is not there is seen to fail, with the signal's number."""
    with pytest.raises(EngineFailed, match="the engine ended with -11 before 'round'"):
        run(tiny_job(tiny, core=CORES[0], damage="unmap", damage_at=20))


def test_an_engine_that_cannot_start_is_reported_with_its_log(tiny: Path) -> None:
    with pytest.raises(EngineFailed, match=r"(?s)the engine ended with 1 before 'ready'.*block_size"):
        run(tiny_job(tiny, engine={"block_size": -1}))


def test_a_silent_engine_is_given_up_and_ended(tiny: Path) -> None:
    with start(tiny_job(tiny)) as engine:
        with pytest.raises(EngineFailed, match="no 'ready' from the engine in time; its log ends:"):
            engine.wait_ready(0.05)
        assert engine.process.poll() is None
    assert engine.process.poll() is not None


def test_the_judge_tells_a_tie_from_an_error(tiny: Path, ample: Result) -> None:
    expected = ample.rounds[0].tokens
    wrong = [list(line) for line in expected]
    wrong[3][10] = (wrong[3][10] + 1) % 256
    judged = judge(tiny, PROMPTS, expected, differences(expected, wrong))
    assert [(one.request, one.position, one.is_tie) for one in judged] == [(3, 10, False)]
    assert judged[0].behind == pytest.approx(0, abs=1e-9)
    assert Difference(0, 0, 5, 6, lead=2e-5, behind=0.0).is_tie
    assert not Difference(0, 0, 5, 6, lead=2e-5, behind=3.0).is_tie


def test_real_answers_do_not_depend_on_the_size_of_the_cache() -> None:
    """SmolLM2, real prompts of 64 tokens each in float32: exact equality, not equality up to ties."""
    model = ensure_model()
    prompts = [prompt.text for prompt in mixed(24)]
    ample = run(Job(model, [prompts], environment=ONE_PROCESS, core=CORES[0]))
    engine = {"num_gpu_blocks_override": 64}
    tight = run(Job(model, [prompts], environment=ONE_PROCESS, engine=engine, core=CORES[0]))
    assert tight.preemptions > 0
    assert differences(ample.tokens, tight.tokens) == []
