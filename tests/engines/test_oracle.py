"""Plain vLLM as the oracle: which of its own settings change its greedy tokens (none may), and that it can be wrong.

What is proved here for plain vLLM is what the managed engine is measured against: an answer depends on the prompt
alone, not on the batch, the size of the cache, preemption, or prefix caching.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from elastickv.demo.model import ensure_model
from elastickv.demo.prompts import mixed
from engines.conftest import TINY_PROMPTS
from engines.harness import CORES, EngineFailed, Job, Result, run, start
from engines.oracle import Difference, differences, judge
from engines.subjects import VLLM

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

PROMPTS = TINY_PROMPTS


def tiny_job(model: Path, **changes: Any) -> Job:
    return VLLM.job(model, [PROMPTS, PROMPTS], **changes)


def test_the_tiny_model_answers_with_many_tokens(plain_vllm: Result) -> None:
    """A model that repeats itself would hide a wrong cache."""
    assert min(len(line) for line in plain_vllm.tokens) == 64
    assert sum(len(set(line)) for line in plain_vllm.tokens) / len(plain_vllm.tokens) > 16


def test_cached_prefixes_do_not_change_the_answers(plain_vllm: Result) -> None:
    assert plain_vllm.prefix_hits > 0
    assert plain_vllm.rounds[0].tokens == plain_vllm.rounds[1].tokens


@pytest.mark.parametrize("caching", [True, False], ids=["prefix-caching", "no-prefix-caching"])
def test_preemption_does_not_change_the_answers(tiny_llama: Path, plain_vllm: Result, caching: bool) -> None:
    """40 blocks of 32 tokens for requests that would like about 75."""
    engine = {"num_gpu_blocks_override": 40, "enable_prefix_caching": caching}
    squeezed = run(tiny_job(tiny_llama, engine=engine))
    assert squeezed.preemptions > 0
    assert (squeezed.prefix_hits > 0) is caching
    assert differences(plain_vllm.tokens, squeezed.tokens) == []


def test_two_engines_at_once_do_not_change_the_answers(tiny_llama: Path, plain_vllm: Result) -> None:
    with start(tiny_job(tiny_llama, core=CORES[0])) as left, start(tiny_job(tiny_llama, core=CORES[-1])) as right:
        for engine in (left, right):
            engine.wait_ready()
        for engine in (left, right):
            engine.go()
        results = [engine.finish() for engine in (left, right)]
    assert [differences(plain_vllm.tokens, result.tokens) for result in results] == [[], []]


def test_a_damaged_block_is_seen(tiny_llama: Path, plain_vllm: Result) -> None:
    """The controls: were this to pass as equal, no comparison of tokens would mean anything.

    Other bytes change the answers; a page that is not there ends the engine, with the signal's number.
    """
    job = tiny_job(tiny_llama, damage=["corrupt", "unmap"], damage_at=VLLM.busy_step)
    with start(job) as engine:
        engine.go()
        hurt = engine.wait_round()
        assert hurt.damaged
        assert differences(plain_vllm.rounds[0].tokens, hurt.tokens) != []
        engine.go()
        with pytest.raises(EngineFailed, match="the engine ended with -11 before 'round'"):
            engine.wait_round()


def test_an_engine_that_cannot_start_is_reported_with_its_log(tiny_llama: Path) -> None:
    with pytest.raises(EngineFailed, match=r"(?s)the engine ended with 1 before 'ready'.*block_size"):
        run(tiny_job(tiny_llama, engine={"block_size": -1}))


def test_a_silent_engine_is_given_up_and_ended(tiny_llama: Path) -> None:
    with start(tiny_job(tiny_llama)) as engine:
        with pytest.raises(EngineFailed, match="no 'ready' from the engine in time; its log ends:"):
            engine.wait_ready(0.05)
        assert engine.process.poll() is None
    assert engine.process.poll() is not None


def test_the_judge_tells_a_tie_from_an_error(tiny_llama: Path, plain_vllm: Result) -> None:
    expected = plain_vllm.rounds[0].tokens
    wrong = [list(line) for line in expected]
    wrong[3][10] = (wrong[3][10] + 1) % 256
    judged = judge(tiny_llama, PROMPTS, expected, differences(expected, wrong))
    assert [(one.request, one.position, one.is_tie) for one in judged] == [(3, 10, False)]
    assert judged[0].behind == pytest.approx(0, abs=1e-9)
    assert Difference(0, 0, 5, 6, lead=2e-5, behind=0.0).is_tie
    assert not Difference(0, 0, 5, 6, lead=2e-5, behind=3.0).is_tie


def test_real_answers_do_not_depend_on_the_size_of_the_cache() -> None:
    """SmolLM2, real prompts of 64 tokens each in float32: exact equality, not equality up to ties."""
    model = ensure_model()
    prompts = [prompt.text for prompt in mixed(24)]
    ample = run(Job(model, [prompts], environment=VLLM.one_process, core=CORES[0]))
    engine = {"num_gpu_blocks_override": 64}
    tight = run(Job(model, [prompts], environment=VLLM.one_process, engine=engine, core=CORES[0]))
    assert tight.preemptions > 0
    assert differences(ample.tokens, tight.tokens) == []
