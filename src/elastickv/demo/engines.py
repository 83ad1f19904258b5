"""Engines for the demo and the benchmarks: vLLM's own server in processes of its own, started as a user would."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import httpx

from elastickv.config import process_environment
from elastickv.errors import DeadlineExceeded, EngineRefused

__all__ = ["Engine", "free_port"]

SERVER: Final = (sys.executable, "-m", "vllm.entrypoints.openai.api_server")
LOG_LINES: Final = 12
STOP_S: Final = 20.0

ENVIRONMENT: Final = {
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def free_port() -> int:
    """A port of the loopback address that nobody has at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Engine:
    """One server. `options` are those of `elastickv run`, `arguments` those of the engine.

    `server`: the command that serves. Not `managed`, it is started by itself, and `options` are not used.
    """

    name: str
    model: Path
    log: Path
    options: Sequence[str]
    arguments: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    server: Sequence[str] = SERVER
    managed: bool = True
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Where it serves."""
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Starts it, in a process group of its own. Its output goes to the log."""
        run = [sys.executable, "-m", "elastickv.cli", "run", "--name", self.name, *self.options, "--"]
        place = ["--served-model-name", self.name, "--host", "127.0.0.1", "--port", str(self.port)]
        command = [
            *(run if self.managed else ()),
            *(*self.server, "--model", str(self.model), *place, *self.arguments),
        ]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=process_environment() | ENVIRONMENT | dict(self.environment),
                start_new_session=True,
            )

    def wait_ready(self, deadline: float) -> None:
        """Until it answers. `deadline` is of time.monotonic(). EngineRefused with its last lines if it ends first."""
        began = time.monotonic()
        while True:
            if self.process is None or self.process.poll() is not None:
                code = None if self.process is None else self.process.returncode
                raise EngineRefused(f"the engine {self.name} ended with code {code} before it served:\n{self.tail()}")
            with suppress(httpx.HTTPError):
                if httpx.get(f"{self.url}/health", timeout=2).status_code == 200:
                    return
            if time.monotonic() > deadline:
                raise DeadlineExceeded(
                    f"waited {time.monotonic() - began:.0f} s for the engine {self.name} to serve; "
                    f"its log {self.log} ends with:\n{self.tail()}"
                )
            time.sleep(0.5)

    def tail(self) -> str:
        """The last lines of its log."""
        text = self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""
        return "\n".join(f"  {line[:200]}" for line in text.splitlines()[-LOG_LINES:])

    def signal(self, number: signal.Signals) -> None:
        """To the whole group; nothing if it has gone."""
        if self.process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)

    def stop(self) -> None:
        """Asks it to end, and ends it if it does not within STOP_S seconds."""
        if self.process is None:
            return
        self.signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(STOP_S)
        self.signal(signal.SIGKILL)
        self.process.wait(STOP_S)
