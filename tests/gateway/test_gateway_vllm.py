"""The gateway over real engines: two models of vLLM on the CPU behind one budget that holds one of them awake."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from elastickv.demo.engines import ENVIRONMENT
from elastickv.demo.model import ensure_model
from elastickv.demo.watch import KernelMemory
from engines.harness import CORES
from gateway.real import MIB, START_S, ask, kill_amid_answer, ledger, resident, tenant, tree
from gateway.served import Gateway, gateway, gone, wait_for

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

CAPACITY = "640MiB"
"""The weights of one take 366 MiB as bfloat16."""

ARGUMENTS = [
    "--dtype",
    "bfloat16",
    "--enforce-eager",
    "--max-model-len",
    "1024",
    "--max-num-seqs",
    "8",
    "--block-size",
    "32",
]


@pytest.fixture
def models(tmp_path: Path) -> str:
    path = tmp_path / "models.toml"
    model = ensure_model(print)
    threads = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": str(CORES[0]), "VLLM_PLUGINS": "elastickv"}
    lines = []
    for name in ("a", "b"):
        lines += [f"[models.{name}]", f"path = {json.dumps(str(model))}", f"args = {json.dumps(ARGUMENTS)}"]
        lines += [f"start = {'true' if name == 'a' else 'false'}", 'queue_deadline = "900s"', f"[models.{name}.env]"]
        lines += [f"{key} = {json.dumps(value)}" for key, value in (dict(ENVIRONMENT) | threads).items()]
    path.write_text("\n".join(lines))
    return str(path)


def test_two_models_share_a_budget_for_one(directory: Path, models: str) -> None:
    with gateway(directory, models, capacity=CAPACITY) as serving:
        serving.wait(START_S, a="ready", b="stopped")
        answer = ask(serving, "a")
        _sleep_and_wake(serving, directory, answer)

        assert ask(serving, "b") == answer  # there is no room for it: a is put to sleep, b starts
        serving.wait(a="asleep", b="ready")
        assert tenant(directory, "a").static_bytes == 0
        assert ledger(directory).held <= ledger(directory).capacity

        assert ask(serving, "a") == answer  # and back
        serving.wait(a="ready", b="asleep")

        kill_amid_answer(serving, answer)

        before = serving.pids()
        serving.end(signal.SIGKILL)
        assert not any(gone(pid) for pid in before.values())
    with gateway(directory, models, capacity=CAPACITY) as again:
        again.wait(START_S, a="ready", b="asleep")
        assert again.pids() == before
        assert ask(again, "b") == answer
        processes = [one for pid in again.pids().values() for one in tree(pid)]
        assert again.end(signal.SIGTERM) == 0
    wait_for(lambda: all(gone(pid) for pid in processes), "the end of all engines")
    assert ledger(directory).held == 0


def _sleep_and_wake(serving: Gateway, directory: Path, answer: str) -> None:
    pids = tree(serving.pids()["a"])
    kernel = KernelMemory(lambda: pids)
    assert kernel.find() >= 1
    awake, in_memory = tenant(directory, "a"), resident(pids)
    assert awake.static_bytes > 300 * MIB
    serving.order("a/sleep")
    asleep = tenant(directory, "a")
    assert asleep.static_bytes == 0
    assert asleep.asleep
    assert asleep.leased < 16 * MIB  # the null block's page
    assert kernel.bytes() <= asleep.leased
    assert in_memory - resident(pids) > awake.static_bytes // 2
    assert ask(serving, "a") == answer
    assert tenant(directory, "a").static_bytes == awake.static_bytes
