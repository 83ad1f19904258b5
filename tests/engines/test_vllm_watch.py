"""Child processes end with their parent, however it ends, and with nobody else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

PARENT = """
    import multiprocessing, os, sys, threading, time
    from elastickv.engines.vllm import watch

    def child(busy):
        watch.end_with_parent()
        watch.end_with_parent()  # once is enough
        print(os.getpid(), flush=True)
        while busy:
            pass  # holds the GIL as much as Python lets it
        time.sleep(60)

    def make(method, busy):
        process = multiprocessing.get_context(method).Process(target=child, args=(busy,))
        process.start()

    if __name__ == "__main__":
        watch.end_with_parent()  # a process that nobody made with multiprocessing is left alone
        # The thread that makes the child ends at once; that is no reason for the child to end.
        thread = threading.Thread(target=make, args=(sys.argv[1], sys.argv[2] == "busy"))
        thread.start()
        thread.join()
        time.sleep(60)
"""


def runs(pid: int) -> bool:
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False


@pytest.mark.parametrize("busy", ["idle", "busy"])
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_child_ends_with_its_parent(tmp_path: Path, method: str, busy: str) -> None:
    script = tmp_path / "parent.py"
    script.write_text(textwrap.dedent(PARENT), encoding="utf-8")
    with subprocess.Popen(
        [sys.executable, str(script), method, busy], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        assert parent.stderr is not None
        child = int(parent.stdout.readline())
        time.sleep(0.3)
        assert runs(child)
        os.kill(parent.pid, signal.SIGKILL)
        began = time.monotonic()
        while runs(child):
            assert time.monotonic() - began < 20
            time.sleep(0.01)
        text = parent.stderr.read()
    assert text == f"elastickv: process {parent.pid}, the parent of {child}, has ended; ending too\n"
