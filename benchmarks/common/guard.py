"""Ends process groups, and removes their folder, when whoever started them is gone, however it went.

A process of its own in a session of its own reads lines "+PGID" and "-PGID"; at the end of its input, which comes when
the last process that could write has ended, it kills the groups that are left and removes the folder.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from types import TracebackType


class Guard:
    """A context manager; leaving it kills what was not taken off the list, and removes `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __enter__(self) -> Guard:
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(self._folder)], stdin=subprocess.PIPE, text=True, start_new_session=True
        )
        return self

    def add(self, group: int) -> None:
        self._say(f"+{group}")

    def remove(self, group: int) -> None:
        self._say(f"-{group}")

    def _say(self, line: str) -> None:
        if self._process.stdin is not None:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._process.communicate(timeout=20)


def main() -> None:
    groups: set[int] = set()
    for line in sys.stdin:
        group = int(line[1:])
        (groups.add if line[0] == "+" else groups.discard)(group)
    for group in groups:
        with suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)
    shutil.rmtree(sys.argv[1], ignore_errors=True)


if __name__ == "__main__":
    main()
