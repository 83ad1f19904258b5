"""`elastickv serve` in a process of its own, for tests."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from elastickv.gateway.records import default_state, read_view
from gateway.fleets import WAIT_S


def wait_for(holds: Callable[[], bool], what: str, seconds: float = WAIT_S) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, what
        time.sleep(0.02)


def gone(pid: int) -> bool:
    """Whether the process has ended; one whose parent has not taken its code yet has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


class Gateway:
    """`elastickv serve` in a process of its own."""

    def __init__(self, directory: Path, *models: str, grace: str = "30", capacity: str = "64MiB") -> None:
        self.directory = directory
        self.state = default_state(directory)
        self.log = directory.parent / "gateway.log"
        options = ["--port", "0", "--dir", str(directory), "--device", "host", "--capacity", capacity]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "elastickv.cli", "serve", *models, *options, "--orphan-grace", grace],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    @property
    def url(self) -> str:
        view = read_view(self.state)
        return view.url if view is not None and view.pid == self.process.pid else ""

    def wait(self, seconds: float = WAIT_S, /, **states: str) -> None:
        def so() -> bool:
            assert self.process.poll() is None, self.log.read_text()
            view = read_view(self.state)
            if view is None or view.pid != self.process.pid:
                return False
            now = {model.name: model.state.value for model in view.models}
            return all(now.get(name) == state for name, state in states.items())

        try:
            wait_for(so, str(states), seconds)
        except AssertionError:
            raise AssertionError(f"{states}; the gateway said: {self.log.read_text()}") from None

    def pids(self) -> dict[str, int]:
        answer = httpx.get(f"{self.url}/admin/models", timeout=WAIT_S, trust_env=False).json()
        return {r["name"]: r["pid"] for model in answer["models"] for r in model["replicas"] if r["pid"]}

    def ask(self, model: str) -> httpx.Response:
        body = {"model": model, "prompt": "x"}
        return httpx.post(f"{self.url}/v1/completions", json=body, timeout=WAIT_S, trust_env=False)

    def order(self, path: str) -> None:
        httpx.post(f"{self.url}/admin/models/{path}", json={}, timeout=WAIT_S, trust_env=False).raise_for_status()

    def end(self, number: signal.Signals) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(WAIT_S)


@contextmanager
def gateway(directory: Path, *models: str, grace: str = "30", capacity: str = "64MiB") -> Iterator[Gateway]:
    running = Gateway(directory, *models, grace=grace, capacity=capacity)
    try:
        yield running
    finally:
        running.end(signal.SIGTERM)
