"""The benchmark of the gateway's overhead at small size, as a user runs it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.common.result import FIELDS, ROOT, read


@pytest.mark.slow
def test_the_benchmark_runs_through_the_command_and_loses_nothing(tmp_path: Path) -> None:
    words = [sys.executable, str(ROOT / "benchmarks/gateway/overhead.py"), "--small", "--output", str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    report = read(tmp_path / "overhead.json")
    assert tuple(report) == FIELDS
    assert report["failures"] == {"with": 0, "without": 0}, report["failed"]
    figures = {row["what"]: row["with"] for row in report["rows"]}
    assert 0 < figures["memory of the gateway with 50 idle streams"] < 400
    assert figures["TTFT: P50"] >= 20, "the engine's first event comes after 20 ms"
