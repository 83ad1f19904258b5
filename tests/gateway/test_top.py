"""`elastickv top` beside a gateway: the models and their states."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from elastickv import _core
from elastickv.cli.top import Sample, frame
from elastickv.gateway.records import Store, default_state
from elastickv.gateway.states import State
from elastickv.ledger import read_device
from gateway.views import model_view

MIB = 1 << 20


def test_top_shows_the_models_of_a_gateway_that_runs(cli: Callable[..., Any], directory: Path) -> None:
    _core.Ledger.open(str(directory), "host", 64 * MIB)
    store = Store(default_state(directory))
    reason = "no request for 60 s, and code waits for memory of host, which is all in use"
    now = time.time()
    views = [model_view("chat", since=now - 30), model_view("code", State.ASLEEP, reason=reason, since=now - 5)]
    store.write_view("http://127.0.0.1:1", views)
    lines = cli("top", "--plain", "--count", 1, "--dir", directory).out.splitlines()
    assert any(re.search(r"model=chat state=ready for=\d+s why='serves'", line) for line in lines)
    assert any("model=code state=asleep" in line and f"why={reason!r}" in line for line in lines)
    store.close()
    assert "model=" not in cli("top", "--plain", "--count", 1, "--dir", directory).out


def test_a_state_directory_elsewhere(cli: Callable[..., Any], directory: Path, tmp_path: Path) -> None:
    _core.Ledger.open(str(directory), "host", 64 * MIB)
    store = Store(tmp_path / "state")
    store.write_view("http://127.0.0.1:1", [model_view("chat")])
    assert "model=" not in cli("top", "--plain", "--count", 1, "--dir", directory).out
    assert "model=chat" in cli("top", "--plain", "--count", 1, "--dir", directory, "--state", tmp_path / "state").out
    store.close()


def test_the_live_view_keeps_to_eighty_columns(directory: Path) -> None:
    view = read_device(_core.Ledger.open(str(directory), "host", 64 * MIB))
    models = (model_view("a-model-with-a-long-name", State.FAILED, reason="x" * 200, since=time.time()),)
    console = Console(width=80, color_system=None)
    with console.capture() as captured:
        console.print(frame(Sample("12:00:00", view, models)))
    lines = captured.get().splitlines()
    assert all(len(line) <= 80 for line in lines)
    assert any(line.startswith("a-model-with failed") and line.rstrip().endswith("…") for line in lines)
