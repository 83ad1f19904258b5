"""A vLLM and an SGLang in one memory, each squeezed by the other."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest

from elastickv.config import Settings
from elastickv.demo.watch import KernelMemory, Watch
from elastickv.ledger import read_device
from elastickv.memory import open_device_ledger
from engines.conftest import TINY_PROMPTS, PlainSGLang
from engines.harness import CORES, Result, start
from engines.oracle import differences
from engines.subjects import BLOCK, SGLANG, VLLM

pytestmark = [pytest.mark.vllm, pytest.mark.sglang, pytest.mark.slow]

BLOCKS = 72
BUDGET = BLOCKS * BLOCK
TURNS = ("vllm", "sglang", "vllm", "sglang")
ROUNDS = 3


def test_each_takes_from_the_other_and_both_answer_as_alone(
    tiny_llama: Path, plain_vllm: Result, plain_sglang: PlainSGLang, directory: Path
) -> None:
    """4.5 MiB for two engines whose prompts fill 6 each: by turns, and then both at once.

    After a turn an engine holds most of the budget in its prefix cache, so the other one's turn has to take it away.
    """
    plain = {"vllm": plain_vllm.rounds[0].tokens, "sglang": plain_sglang.left_alone[0].tokens}
    settings = Settings.load(arguments={"directory": str(directory), "device": "host", "capacity": BUDGET}, environ={})
    ledger = open_device_ledger("host", settings)
    with ExitStack() as stack:
        engines = {
            subject.kind: stack.enter_context(
                start(
                    subject.job(
                        tiny_llama,
                        [TINY_PROMPTS] * ROUNDS,
                        subject.managed(directory, blocks=BLOCKS, name=subject.kind),
                        core=CORES[i % len(CORES)],
                    )
                )
            )
            for i, subject in enumerate((VLLM, SGLANG))
        }
        for engine in engines.values():
            engine.wait_ready()
        kernel = KernelMemory(lambda: [pid for engine in engines.values() for pid in engine.pids])
        assert kernel.find() == 2
        with Watch(ledger, interval=0.01, kernel=kernel.bytes) as watch:
            for turn, name in enumerate(TURNS):
                engines[name].go()
                assert differences(plain[name], engines[name].wait_round().tokens) == []
                view = read_device(ledger)
                assert view.tenant(name).leased > 0.6 * BUDGET, "the turn of the other one could not squeeze it"
                if turn > 0:
                    assert view.tenant(TURNS[turn - 1]).counters.evicted_neighbour > 0
            for engine in engines.values():
                engine.go()
            for name, engine in engines.items():
                assert differences(plain[name], engine.wait_round().tokens) == []
        for engine in engines.values():
            engine.finish()
    assert watch.error is None
    assert watch.samples > 20
    assert watch.over_budget == 0
    assert 0.6 * BUDGET < watch.peak_sum <= BUDGET
    assert 0 < watch.peak_kernel <= BUDGET
