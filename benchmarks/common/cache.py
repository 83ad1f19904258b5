"""A cache without an engine, driven by hand: what the benchmarks of the memory layer measure."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common.result import ROOT
from benchmarks.common.servers import device_id
from elastickv.config import Settings
from elastickv.memory import Cache, RankGeometry, RankMemory

HOST_PAGE = 64 * 1024
GIVEN_BACK_S = 60.0
MAPPER = "elastickv-map"
"""The name of the mapper's thread."""


def host_settings(device: str) -> dict[str, Any]:
    """The page of a small machine's cache; a GPU's driver decides by itself."""
    return {"page": HOST_PAGE} if device == "host" else {}


class Bare:
    """A cache whose pool and memory are driven by hand: no steward, no stock, no idle clock."""

    def __init__(
        self, directory: str, device: str, name: str, *, blocks: int, block: int, capacity: int, **more: Any
    ) -> None:
        arguments = {
            "directory": directory,
            "device": device_id(device),
            "capacity": capacity,
            "name": name,
            "stock": 0,
            "idle_release": 0,
            **host_settings(device),
            **more,
        }
        settings = Settings.load(arguments=arguments, environ={})
        shape = RankGeometry(settings.device, 1, block)
        self.cache = Cache.create(settings, num_blocks=blocks, ranks=[shape], engine="benchmark")
        self.memory = RankMemory.attach(self.cache.rank_spec(0), allow_context=True)
        self.cache.wait_ready(10)
        self.pool = self.cache.pool

    def done(self) -> dict[str, Any]:
        """What the mapper has done so far."""
        return self.cache.rank_stats()[0]

    def mapper(self) -> int:
        """The thread id of the mapper, the last one that was started in this process."""
        tasks = [int(task.name) for task in Path("/proc/self/task").iterdir() if _name(task) == MAPPER]
        if not tasks:
            raise RuntimeError(f"no thread of this process is named {MAPPER}")
        return max(tasks)

    def give_back(self) -> None:
        """Unmaps every free extent and waits until it is so."""
        self.pool.maintain(True)
        self.memory.fence(self.pool.ticket())
        until = time.monotonic() + GIVEN_BACK_S
        while self.pool.stats()["transit"]:
            self.pool.poll()
            if time.monotonic() > until:
                raise RuntimeError(f"waited {GIVEN_BACK_S:.0f} s for pages to be unmapped: {self.pool.stats()}")

    def close(self) -> None:
        self.memory.close()
        self.cache.close()


def _name(task: Path) -> str:
    try:
        return (task / "comm").read_text(encoding="utf-8").strip()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def scratch() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="elastickv-benchmark-")


def spread(values: list[float]) -> list[float]:
    """A round each, for a result file: enough digits for nanoseconds of a millisecond."""
    return [round(value, 6) for value in values]


class Raw:
    """The process that makes the raw driver calls, `count` extents of `size` bytes. A context manager."""

    def __init__(self, place: str, size: int, count: int) -> None:
        command = [str(_build(Path(place))), str(size), str(count)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.communicate(timeout=20)

    def measure(self) -> dict[str, float]:
        """One round, in µs an extent."""
        if self.process.stdin is None or self.process.stdout is None:
            raise RuntimeError("the process has no pipes")
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        found: dict[str, float] = json.loads(self.process.stdout.readline())
        return found


def _build(place: Path) -> Path:
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        sys.exit("error: no C++ compiler on the PATH, and the raw driver calls are a program in C++")
    program = place / "raw_calls"
    source = ROOT / "benchmarks/gpu/raw_calls.cpp"
    if not program.exists():
        words = [compiler, "-O2", "-std=c++20", str(source), "-o", str(program), "-ldl"]
        subprocess.run(words, check=True, timeout=120)
    return program
