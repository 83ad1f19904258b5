"""Runs of plain engines that several modules compare with; each is made once."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from engines.harness import EngineFailed, Job, Round, start
from engines.oracle import make_tiny_llama, tiny_prompts

TINY_PROMPTS = tiny_prompts(24)


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
    job = Job(
        tiny_llama,
        [TINY_PROMPTS] * 4,
        kind="sglang",
        core=min(os.sched_getaffinity(0)),
        damage=["none", "none", "corrupt", "unmap"],
        damage_at=60,
    )
    with start(job) as engine:
        rounds = []
        for _ in range(3):
            engine.go()
            rounds.append(engine.wait_round())
        engine.go()
        with pytest.raises(EngineFailed) as caught:
            engine.wait_round()
        return PlainSGLang(rounds[:2], rounds[2], f"{caught.value}\n{engine.log()}")
