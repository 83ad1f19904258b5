"""What every test gets: no settings of the caller's own, and a private directory for ledgers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("elastickv", deadline=None)
settings.load_profile("elastickv")


@pytest.fixture(autouse=True)
def clean_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Takes ELASTICKV_* away and points the default directory of ledgers at this test's own."""
    for name in [name for name in os.environ if name.startswith("ELASTICKV")]:
        monkeypatch.delenv(name)
    runtime = tmp_path / "runtime"
    runtime.mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
    yield


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A directory for ledgers that is not there yet."""
    return tmp_path / "ledgers"
