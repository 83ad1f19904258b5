"""A process that ends with everything open ends as if it had closed all of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

MANY = 8

TENANCY = """
from elastickv.config import Settings
from elastickv.memory.tenancy import Tenancy
tenancies = []
for number in range(int(sys.argv[2])):
    options = dict(directory=sys.argv[1], name=f"t{number}", capacity="64MiB", device="host")
    tenancies.append(Tenancy.join(Settings.load(options=options, environ={}), ["host"]))
    tenancies[-1].watch_limits()
"""

MEMBER = """
device = elastickv.open_device("host", capacity=64 << 20, directory=sys.argv[1])
members = [device.join(f"m{number}", page=65536, stock=0, idle_release=0.01) for number in range(int(sys.argv[2]))]
caches = [member.cache(num_blocks=64, block_bytes=65536) for member in members]
for cache in caches:
    cache.free(cache.alloc(4), cached=True)
"""

WAITING = """
from elastickv import _core
from elastickv.errors import DeadlineExceeded
ledger = _core.Ledger.open(sys.argv[1], "host", 64 << 20)
tenant = ledger.join("one")
revision = ledger.order_limit("one", 1 << 20)
def wait():
    while True:
        try:
            ledger.wait_limit("one", revision, 1)
        except DeadlineExceeded:
            pass
for _ in range(int(sys.argv[2])):
    threading.Thread(target=wait, daemon=True).start()
"""


@pytest.mark.parametrize("program", [TENANCY, MEMBER, WAITING], ids=["tenancy", "member", "waiting"])
def test_nothing_needs_to_be_closed(program: str, tmp_path: Path) -> None:
    for _ in range(3):
        head = "import sys, threading, time\nimport elastickv\n"
        ended = subprocess.run(
            [sys.executable, "-c", head + program + "time.sleep(0.05)\n", str(tmp_path), str(MANY)],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert (ended.returncode, ended.stderr) == (0, "")
