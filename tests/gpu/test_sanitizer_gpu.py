"""compute-sanitizer over a managed engine whose memory comes and goes: no access to an address that has none."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from engines.harness import Job, run
from engines.oracle import differences, make_tiny_llama, tiny_prompts
from gpu.serving import ENGINE, GPU, MIB, managed, say

pytestmark = [pytest.mark.gpu, pytest.mark.vllm, pytest.mark.slow, pytest.mark.usefixtures("vllm_on_gpu")]

PROMPTS = tiny_prompts(12)
SMALL = {**ENGINE, "max_num_seqs": 8, "max_model_len": 256, "compilation_config": {"mode": 0, "cudagraph_mode": "NONE"}}
"""No graphs: their kernels are the same ones, and capturing them under the sanitizer takes minutes."""


@pytest.fixture(scope="module")
def sanitizer() -> str:
    found = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if found is None:
        pytest.skip("compute-sanitizer is not on the PATH")
    return found


def errors(report: Path) -> list[int]:
    """What its summaries say, one for each process with a context."""
    return [int(count) for count in re.findall(r"ERROR SUMMARY: (\d+) error", report.read_text())]


def test_no_stray_access(sanitizer: str, tmp_path: Path) -> None:
    model = make_tiny_llama(tmp_path / "model", layers=4, heads=8, kv_heads=4, head_size=128, hidden=512)
    report = tmp_path / "report"
    # An API call that is asked whether something is there, and is told no, is no stray access.
    under = (sanitizer, "--target-processes", "all", "--report-api-errors", "no", "--log-file", str(report))
    environment = {**GPU, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "INFO"}
    one = {"model": model, "rounds": [PROMPTS] * 2, "max_tokens": 24}
    plain = run(Job(**one, engine={**SMALL, "kv_cache_memory_bytes": 256 * MIB}, environment=environment))
    little = managed(tmp_path / "d", "one", ELASTICKV_LIMIT=str(4 * MIB))
    result = run(Job(**one, engine=SMALL, environment={**environment, **little}, under=under))
    say("under compute-sanitizer", result)
    assert errors(report) == [0]
    assert result.preemptions > 0
    assert differences(plain.tokens, result.tokens) == []


def test_the_sanitizer_sees_an_access_to_memory_that_has_gone(sanitizer: str, tmp_path: Path) -> None:
    report = tmp_path / "report"
    tenant = Path(__file__).with_name("tenant.py")
    under = [sanitizer, "--target-processes", "all", "--report-api-errors", "no", "--log-file", str(report)]
    arguments = [str(tmp_path / "d"), "one", str(256 * MIB), "64", str(2 * MIB)]
    subprocess.run(
        [*under, sys.executable, str(tenant), *arguments],
        input="alloc 4\nfault\nend\n",
        text=True,
        timeout=180,
        check=False,
    )
    assert errors(report)
    assert errors(report)[0] > 0
