"""What every test gets: no settings of the caller's own, a directory for ledgers, tenants, a command line to call."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from subprocess import Popen
from typing import Any

import pytest
from hypothesis import settings

import workers
from support import Outcome, running_tenant

settings.register_profile("elastickv", deadline=None)
settings.load_profile("elastickv")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    return workers.scheduler(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The workers take tests in the order that they are given."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: workers.order(item.nodeid))


@pytest.fixture(autouse=True)
def clean_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes ELASTICKV_* away and points the default directory of ledgers at this test's own."""
    for name in [name for name in os.environ if name.startswith("ELASTICKV")]:
        monkeypatch.delenv(name)
    runtime = tmp_path / "runtime"
    runtime.mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
    monkeypatch.setenv("COLUMNS", "80")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A directory for ledgers that is not there yet."""
    return tmp_path / "ledgers"


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """Calls the command line in this process."""
    from elastickv.cli import main

    def call(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["elastickv", *map(str, arguments)])
        capsys.readouterr()
        try:
            main()
        except SystemExit as leaving:
            code = leaving.code
        else:
            code = 0
        printed = capsys.readouterr()
        return Outcome(int(code or 0), printed.out, printed.err)

    return call


@pytest.fixture
def tenant(directory: Path) -> Callable[..., AbstractContextManager[Popen[str]]]:
    """`with tenant("chat", blocks=10) as process`: see running_tenant."""

    def start(
        name: str, *, blocks: int = 10, cached: int = 0, options: str = "{}"
    ) -> AbstractContextManager[Popen[str]]:
        return running_tenant(directory, name, blocks=blocks, cached=cached, options=options)

    return start
