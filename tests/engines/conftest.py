"""Runs of plain engines that several modules compare with; each is made once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from engines.harness import EngineFailed, Result, Round, run, start
from engines.kinds import OLDER_SGLANG
from engines.oracle import make_tiny_llama, tiny_prompts
from engines.subjects import SGLANG, VLLM

TINY_PROMPTS = tiny_prompts(24)

needs_0_5_16 = pytest.mark.skipif(
    not OLDER_SGLANG.is_dir(), reason=f"no SGLang 0.5.16 in {OLDER_SGLANG}; scripts/setup installs it"
)


@dataclass(frozen=True)
class PlainSGLang:
    """Rounds of the same prompts: two left alone, one with corrupted pages, and how one with unmapped pages ended."""

    left_alone: list[Round]
    corrupted: Round
    unmapped: str

    @property
    def tokens(self) -> list[list[int]]:
        """Of the two rounds that were left alone."""
        return [line for part in self.left_alone for line in part.tokens]


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def plain_sglang(tiny_llama: Path) -> PlainSGLang:
    """What plain SGLang answers, with all the memory it could want."""
    damage = {"damage": ["none", "none", "corrupt", "unmap"], "damage_at": SGLANG.busy_step}
    job = SGLANG.job(tiny_llama, [TINY_PROMPTS] * 4, **damage)
    with start(job) as engine:
        rounds = []
        for _ in range(3):
            engine.go()
            rounds.append(engine.wait_round())
        engine.go()
        with pytest.raises(EngineFailed) as caught:
            engine.wait_round()
        return PlainSGLang(rounds[:2], rounds[2], f"{caught.value}\n{engine.log()}")


@pytest.fixture(scope="session")
def plain_vllm(tiny_llama: Path) -> Result:
    """What plain vLLM answers, with all the memory it could want."""
    return run(VLLM.job(tiny_llama, [TINY_PROMPTS] * 2))
