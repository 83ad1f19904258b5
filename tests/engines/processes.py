"""What a child of harness.py says and measures, whichever engine it runs. Needs nothing but the standard library."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, TextIO


def send(events: TextIO, **event: Any) -> None:
    """One event to the harness."""
    events.write(json.dumps(event, default=str) + "\n")


def call(engine: Any, asked: dict[str, Any]) -> dict[str, Any]:
    """A method of the engine, by name; what it raises is told and ends nothing."""
    try:
        return {"result": getattr(engine, asked["name"])(*asked["args"]), "error": None}
    except Exception as error:  # noqa: BLE001 - the test on the other side of the pipe decides what it means
        return {"result": None, "error": f"{type(error).__name__}: {error}"}


def family() -> list[int]:
    """This process and every one below it."""
    found: list[int] = []
    queue = [os.getpid()]
    while queue:
        pid = queue.pop()
        found.append(pid)
        for task in Path(f"/proc/{pid}/task").iterdir():
            queue.extend(int(word) for word in (task / "children").read_text(encoding="ascii").split())
    return found


def peak_bytes() -> int:
    """Peak resident bytes of all processes of this engine, shared pages counted in each."""
    lines = [line for pid in family() for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()]
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def cpu_seconds() -> float:
    """Processor seconds that all processes of this engine have used."""
    total = 0
    for pid in family():
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
        total += int(fields[11]) + int(fields[12])
    return total / os.sysconf("SC_CLK_TCK")
