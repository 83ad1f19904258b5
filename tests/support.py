"""What several test modules share."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

TENANT = """
import json, sys
import elastickv
name, directory, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[5])
blocks, cached = int(sys.argv[3]), int(sys.argv[4])
with elastickv.open_device("host", capacity="64MiB", directory=directory) as device:
    with device.join(name, **options).cache(num_blocks=512, block_bytes=64 * 1024) as cache:
        ids = cache.alloc(blocks + cached)
        cache.free(ids[blocks:], cached=True)
        print("ready", flush=True)
        sys.stdin.read()
"""


@dataclass(frozen=True)
class Outcome:
    """What one call of the command line left behind."""

    code: int
    out: str
    err: str


@contextmanager
def running_tenant(
    directory: Path, name: str, *, blocks: int = 10, cached: int = 0, options: str = "{}"
) -> Iterator[subprocess.Popen[str]]:
    """A process that holds blocks of 64 KiB (one page each) on a device of 64 MiB, until the block is left."""
    command = [sys.executable, "-c", TENANT, name, str(directory), str(blocks), str(cached), options]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            line = process.stdout.readline() if process.stdout else ""
            if line != "ready\n":
                raise RuntimeError(f"the tenant said {line!r} and ended with {process.wait(10)}")
            yield process
        finally:
            if process.stdin:
                process.stdin.close()
            process.wait(timeout=20)
