"""Two engines that take turns in one budget: the one that works has the memory of the other's idle prefix cache."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from elastickv.config import process_environment

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks/sharing/prefix_cache.py"
QUIET_S = 1.5
"""A tenant that has not worked for a second has no share of its own any more (ledger/policy.hpp)."""


def test_the_working_engine_hits_as_plain_vllm_with_the_whole_budget(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--turns", "4", "--passes", "16", "--pause", str(QUIET_S)]
    done = subprocess.run(
        [*command, "--output", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=600,
        env=process_environment(),
        check=False,
    )
    assert done.returncode in (0, 1), done.stderr
    figures = json.loads((tmp_path / "prefix_cache.json").read_text(encoding="utf-8"))["samples"]
    plain = figures["hit rate, plain vLLM with the whole budget"]
    managed = figures["hit rate, managed"]
    assert plain["second half"] > 0.9
    assert managed["first pass"] < 0.5, "both working sets were there at once: the budget was not shared"
    assert managed["second half"] >= 0.95 * plain["second half"]
