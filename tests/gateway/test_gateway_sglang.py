"""The gateway over a real engine of SGLang on the CPU: its first request starts it, and it sleeps when it is idle."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path

import httpx
import pytest

from elastickv.config import process_environment
from elastickv.demo.model import ensure_model
from engines.kinds import COMMON, SGLANG
from gateway.real import MIB, START_S, ask, kill_amid_answer, ledger, resident, tenant, tree
from gateway.served import Gateway, gateway, gone, wait_for

pytestmark = [pytest.mark.sglang, pytest.mark.slow]

CAPACITY = "640MiB"
ARGUMENTS = [
    *("--device", "cpu", "--attention-backend", "torch_native", "--sampling-backend", "pytorch"),
    *("--grammar-backend", "none", "--disable-cuda-graph", "--dtype", "bfloat16", "--page-size", "16"),
    *("--max-running-requests", "4", "--chunked-prefill-size", "256", "--context-length", "1024"),
    *("--watchdog-timeout", "600", "--enable-metrics", "--skip-server-warmup"),
]


@pytest.fixture
def models(tmp_path: Path) -> str:
    path = os.pathsep.join([*map(str, SGLANG.path), process_environment().get("PYTHONPATH", "")])
    environment = {**COMMON, "PYTHONPATH": path, "SGLANG_PLUGINS": "elastickv", "OMP_NUM_THREADS": "1"}
    lines = ["[models.a]", 'engine = "sglang"', f"path = {json.dumps(str(ensure_model(print)))}"]
    lines += [f"args = {json.dumps(ARGUMENTS)}", "start = false", 'sleep = "idle"', 'sleep_after = "4s"']
    lines += ['queue_deadline = "900s"', "[models.a.env]"]
    lines += [f"{name} = {json.dumps(value)}" for name, value in environment.items()]
    file = tmp_path / "models.toml"
    file.write_text("\n".join(lines))
    return str(file)


def test_an_engine_starts_sleeps_wakes_and_dies(directory: Path, models: str) -> None:
    with gateway(directory, models, capacity=CAPACITY) as serving:
        serving.wait(START_S, a="stopped")
        answer = ask(serving, "a")
        awake, in_memory = tenant(directory, "a"), resident(tree(serving.pids()["a"]))
        assert awake.static_bytes > 200 * MIB
        assert awake.engine.startswith("sglang ")

        serving.wait(START_S, a="asleep")  # by itself, for nobody asks
        asleep = tenant(directory, "a")
        assert (asleep.static_bytes, asleep.asleep) == (0, True)
        assert asleep.leased < 16 * MIB  # the padding page's
        assert in_memory - resident(tree(serving.pids()["a"])) > awake.static_bytes // 2
        _who_asks_a_sleeping_engine_waits(serving, answer)

        assert ask(serving, "a") == answer
        assert tenant(directory, "a").static_bytes == awake.static_bytes
        _its_own_page_has_our_metrics(serving)

        kill_amid_answer(serving, answer)
        processes = [one for pid in serving.pids().values() for one in tree(pid)]
        assert serving.end(signal.SIGTERM) == 0
    wait_for(lambda: all(gone(pid) for pid in processes), "the end of the engine")
    assert ledger(directory).held == 0


def engine_url(serving: Gateway) -> str:
    (model,) = httpx.get(f"{serving.url}/admin/models", timeout=60, trust_env=False).json()["models"]
    url: str = model["replicas"][0]["url"]
    return url


def _who_asks_a_sleeping_engine_waits(serving: Gateway, answer: str) -> None:
    """Past the gateway: nothing touches weights that are not there, and the answer comes once they are back."""
    body = {"model": "a", "prompt": "The capital of France is", "max_tokens": 6, "temperature": 0}
    got: list[str] = []

    def early() -> None:
        done = httpx.post(f"{engine_url(serving)}/v1/completions", json=body, timeout=START_S, trust_env=False)
        got.append(done.json()["choices"][0]["text"])

    thread = threading.Thread(target=early)
    thread.start()
    time.sleep(1.0)  # however long it is: a request that is run too early ends the engine
    assert got == []
    serving.order("a/wake")
    thread.join(START_S)
    assert got == [answer]


def _its_own_page_has_our_metrics(serving: Gateway) -> None:
    page = httpx.get(f"{engine_url(serving)}/metrics", timeout=60, trust_env=False).text
    assert "sglang:" in page
    (mapped,) = (line for line in page.splitlines() if line.startswith("elastickv_mapped_bytes{"))
    assert 'tenant="a"' in mapped
    assert float(mapped.split()[-1]) > 0
    assert page.count("# HELP elastickv_up ") == 1
