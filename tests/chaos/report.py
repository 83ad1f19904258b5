"""The log of a run, its figures, and the file that they end in."""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

MOST_VIOLATIONS = 100


class Report:
    """Counts, violations and a log line for each thing done; the times are seconds since the start."""

    def __init__(self, log: Path, echo: bool = False) -> None:
        self.started = time.monotonic()
        self.counts: Counter[str] = Counter()
        self.worst: dict[str, float] = {}
        self.violations: list[str] = []
        self.skipped: list[str] = []
        self.figures: dict[str, Any] = {}
        self._echo = echo
        self._log = log.open("w", encoding="utf-8")

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self.started

    def line(self, text: str) -> None:
        """One thing that happened."""
        line = f"[{self.seconds:9.3f}] {text}"
        self._log.write(line + "\n")
        self._log.flush()
        if self._echo:
            print(line, flush=True)

    def done(self, what: str, text: str) -> None:
        """An action, counted."""
        self.counts[what] += 1
        self.line(f"{what}: {text}")

    def most(self, what: str, value: float) -> None:
        """Keeps the largest."""
        self.worst[what] = max(self.worst.get(what, 0.0), value)

    def violation(self, text: str) -> None:
        """Something that must not be. A text is kept once."""
        if text not in self.violations and len(self.violations) < MOST_VIOLATIONS:
            self.violations.append(text)
            self.line(f"VIOLATION: {text}")

    def skip(self, text: str) -> None:
        """A fault that cannot be made here, and why."""
        if text not in self.skipped:
            self.skipped.append(text)
            self.line(f"skipped: {text}")

    def summary(self) -> dict[str, Any]:
        """Everything, for a file."""
        return {
            "seconds": round(self.seconds, 1),
            **self.figures,
            "counts": dict(sorted(self.counts.items())),
            "worst": {name: round(value, 4) for name, value in sorted(self.worst.items())},
            "skipped": self.skipped,
            "violations": self.violations,
        }

    def close(self) -> None:
        """Ends the log."""
        self._log.close()


def write(path: Path, summary: dict[str, Any]) -> None:
    """As JSON, for people and programs."""
    path.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
