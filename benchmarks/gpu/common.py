"""What the GPU benchmarks share: a cache without an engine, figures with command, hardware and date, targets."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from elastickv import _core
from elastickv.config import Settings
from elastickv.memory import Cache, RankGeometry, RankMemory

MIB = 1024 * 1024
GIB = 1024 * MIB
RESULTS = Path(__file__).resolve().parents[1] / "results"


def device_id() -> str:
    """The first GPU's UUID."""
    return str(_core.open_driver("cuda:0").device_id)


class Bare:
    """A cache whose pool and memory are driven by hand: no steward, no stock, no idle clock."""

    def __init__(self, directory: str, name: str, *, blocks: int, block: int, capacity: int, **more: Any) -> None:
        arguments = {
            "directory": directory,
            "device": device_id(),
            "capacity": capacity,
            "name": name,
            "stock": 0,
            "idle_release": 0,
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

    def give_back(self) -> None:
        """Unmaps every free extent and waits until it is so."""
        self.pool.maintain(True)
        self.memory.fence(self.pool.ticket())
        while self.pool.stats()["transit"]:
            self.pool.poll()

    def close(self) -> None:
        self.memory.close()
        self.cache.close()


def options(description: str | None, add: Callable[[argparse.ArgumentParser], None] | None = None) -> Any:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7, help="measured rounds (7); the result is their median")
    parser.add_argument("--output", type=Path, default=None, help="folder of the result (benchmarks/results/GPU)")
    if add is not None:
        add(parser)
    return parser.parse_args()


def scratch() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="elastickv-benchmark-")


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def write(name: str, figures: dict[str, Any], targets: dict[str, tuple[float, float]], folder: Path | None) -> int:
    """Writes NAME.json; `targets`: what, (measured, wanted at most). Prints a line each; 1 if one is missed."""
    gpu = _query("name")
    report = {
        "benchmark": f"gpu/{name}",
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "hardware": {"gpu": gpu, "driver": _query("driver_version"), "cores": os.cpu_count()},
        "versions": {package: _version(package) for package in ("elastickv", "torch", "vllm")},
        "targets": {
            what: {"measured": have, "at most": want, "met": have <= want} for what, (have, want) in targets.items()
        },
        "figures": figures,
    }
    place = folder or RESULTS / re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    place.mkdir(parents=True, exist_ok=True)
    (place / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for what, (have, want) in targets.items():
        print(f"{'met   ' if have <= want else 'MISSED'} {what}: {have:.4g}, wanted at most {want:g}")
    return int(any(have > want for have, want in targets.values()))


def _query(what: str) -> str:
    command = ["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader"]
    return (
        subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.splitlines()[0].strip()
    )


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
