"""elastickv's metrics on vLLM's own page: a real server, scraped, and both kinds of registry that vLLM has."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from elastickv import _core
from elastickv.config import process_environment
from elastickv.demo.engines import Engine
from elastickv.telemetry import METRICS
from engines.oracle import make_tiny_llama

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

START_S = 240
MIB = 1 << 20
Page = dict[str, dict[tuple[tuple[str, str], ...], float]]


def parse(text: str) -> Page:
    page: Page = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            page.setdefault(sample.name, {})[tuple(sorted(sample.labels.items()))] = sample.value
    return page


def of(page: Page, name: str, tenant: str) -> float:
    (found,) = [value for labels, value in page[name].items() if ("tenant", tenant) in labels]
    return found


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Engine]:
    """A managed server of a tiny model: `served` on a device of 64 MiB."""
    options = [
        *("--device", "host", "--capacity", "64MiB", "--dir", str(tmp_path / "ledger"), "--page", "64KiB"),
        *("--limit", "32MiB"),
    ]
    arguments = [
        *("--dtype", "float32", "--enforce-eager", "--max-model-len", "512", "--max-num-seqs", "4"),
        *("--block-size", "32", "--skip-tokenizer-init", "--enable-scale-out"),
    ]
    engine = Engine("served", make_tiny_llama(tmp_path / "model"), tmp_path / "log", options, arguments)
    try:
        engine.start()
        engine.wait_ready(time.monotonic() + START_S)
        yield engine
    finally:
        engine.stop()


def complete(engine: Engine) -> None:
    """A request of 100 tokens, as ids: there is no tokenizer."""
    answer = httpx.post(
        f"{engine.url}/inference/v1/generate",
        json={"model": "served", "token_ids": list(range(5, 105)), "sampling_params": {"max_tokens": 8}},
        timeout=60,
    )
    assert answer.status_code == 200, answer.text


def test_a_server_shows_its_tenant_and_serves_whatever_happens_to_the_ledger(served: Engine, tmp_path: Path) -> None:
    directory = tmp_path / "ledger"
    other = _core.Ledger.open(str(directory), "host").join("other")
    complete(served)
    page = parse(httpx.get(f"{served.url}/metrics", timeout=30).text)
    assert any(name.startswith("vllm:") for name in page)
    ours = {name for name in page if name.startswith("elastickv_")}
    exposed = {metric.exposed for metric in METRICS if metric.kind != "histogram"}
    assert exposed - ours == set()
    assert of(page, "elastickv_alive", "served") == 1
    assert of(page, "elastickv_mapped_bytes", "served") == of(page, "elastickv_leased_bytes", "served") > 0
    assert of(page, "elastickv_limit_held_bytes", "served") == 32 * MIB
    assert of(page, "elastickv_map_seconds_count", "served") > 0
    assert of(page, "elastickv_map_seconds_sum", "served") > 0
    assert page["elastickv_device_capacity_bytes"] == {(("device", "host"),): 64 * MIB}
    assert not any(("tenant", "other") in labels for samples in page.values() for labels in samples)
    other.close()

    directory.chmod(0o755)  # no longer private: nobody reads a ledger there
    broken = httpx.get(f"{served.url}/metrics", timeout=30)
    assert broken.status_code == 200
    page = parse(broken.text)
    assert page["elastickv_ledger_up"] == {(("device", "host"),): 0}
    assert "elastickv_mapped_bytes" not in page
    assert any(name.startswith("vllm:") for name in page)
    complete(served)
    directory.chmod(0o700)
    assert of(parse(httpx.get(f"{served.url}/metrics", timeout=30).text), "elastickv_alive", "served") == 1


REGISTRIES = """
import os, sys
from fastapi import FastAPI
from fastapi.testclient import TestClient
from elastickv import _core
from elastickv.config import Settings
from elastickv.engines.vllm import metrics
from elastickv.telemetry import LedgerCollector
ledger = _core.Ledger.open(sys.argv[1], "host", 1 << 20)
mine = ledger.join("engine-" + str(os.getpid()))
settings = Settings.load()
metrics.hook(settings)
metrics.hook(settings)
from vllm.entrypoints.serve.instrumentator.metrics import attach_router
app = FastAPI()
attach_router(app)
client = TestClient(app)
for _ in range(2):
    text = client.get("/metrics").text
    assert text.count("# HELP elastickv_up ") == 1, text
    print("mine" if f'tenant="engine-{os.getpid()}"' in text else "nobody", "other" if 'tenant="other"' in text else "")
def broken(self):
    raise RuntimeError("broken")
LedgerCollector.collect = broken
print("down" if "elastickv_up 0.0" in client.get("/metrics").text else "up")
"""


@pytest.mark.parametrize("several", [False, True], ids=["one API server", "several"])
def test_both_kinds_of_page_show_a_tenant_without_a_name_given(directory: Path, tmp_path: Path, several: bool) -> None:
    other = _core.Ledger.open(str(directory), "host", MIB).join("other")
    environment = process_environment() | {"ELASTICKV": "1", "ELASTICKV_DIR": str(directory)}
    if several:
        (tmp_path / "prometheus").mkdir()
        environment["PROMETHEUS_MULTIPROC_DIR"] = str(tmp_path / "prometheus")
    command = [sys.executable, "-c", REGISTRIES, str(directory)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["mine", "mine", "down"], done.stdout
    other.close()
