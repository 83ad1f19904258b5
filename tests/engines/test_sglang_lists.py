"""SGLang's own allocators over elastic memory, without an engine; see sgl/lists.py."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from elastickv.config import process_environment
from engines.conftest import needs_0_5_16
from engines.kinds import SGLANG, SGLANG_0_5_16, Kind

pytestmark = [pytest.mark.sglang, pytest.mark.slow]

HERE = Path(__file__).resolve().parent


@pytest.mark.parametrize("kind", ["paged", "token"])
@pytest.mark.parametrize(
    "engine", [pytest.param(SGLANG, id="newest"), pytest.param(SGLANG_0_5_16, id="0.5.16", marks=needs_0_5_16)]
)
def test_lists_hold_only_blocks_with_memory_and_everything_adds_up(tmp_path: Path, engine: Kind, kind: str) -> None:
    environment = process_environment()
    paths = [*map(str, engine.path), environment.get("PYTHONPATH", "")]
    environment |= {"PYTHONPATH": ":".join(filter(None, paths)), **engine.environment}
    command = [sys.executable, str(HERE / "sgl/lists.py"), str(tmp_path / "ledgers"), kind, "3"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr[-4000:]
    facts = json.loads(ended.stdout.splitlines()[-1])
    # Limits moved under load: blocks came and went, prefixes were dropped for the limit, and requests had to wait.
    assert facts["grown"] > 10, facts
    assert facts["returned"] > 5, facts
    assert facts["evicted"] > 0, facts
    assert facts["refused"] > 0, facts
    assert facts["taken"] >= 200, facts
