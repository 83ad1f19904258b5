"""A short chaos run, and proof that one can fail. scripts/chaos runs it for long."""

from __future__ import annotations

from pathlib import Path

import pytest

from chaos.__main__ import run
from chaos.choices import Options
from chaos.report import Report


def chaos(folder: Path, **values: object) -> Report:
    ledgers = folder / "ledgers"
    ledgers.mkdir(mode=0o700)
    return run(Options(directory=ledgers, **values))  # type: ignore[arg-type]


@pytest.mark.slow
def test_forty_kills_and_nobody_else_notices(tmp_path: Path) -> None:
    report = chaos(tmp_path, seed=20, seconds=120.0, kills=40, gap=0.15)
    assert report.violations == []
    assert report.figures["kills"] >= 40
    assert report.counts["quiet points"] >= 1
    assert report.counts["blocks checked"] > 0
    assert report.counts["operations"] > 100
    assert report.figures["recoveries"] > 0
    assert 0 < report.figures["peak_kernel"] <= 96 * 1024 * 1024


@pytest.mark.slow
def test_a_tenant_that_maps_without_leases_is_found_out(tmp_path: Path) -> None:
    """The planted fault: what the monitor reads from the kernel alone tells it."""
    report = chaos(tmp_path, seed=21, seconds=60.0, kills=400, rogue=True, control=False)
    assert any(text.startswith("memory by the kernel: ") for text in report.violations)
