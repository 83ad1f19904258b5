"""Every example of docs/control.md, run as it stands."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from control.serving import serving
from elastickv import _core

PAGE = Path(__file__).resolve().parents[2] / "docs/control.md"
MIB = 1 << 20

# What socat does here, for a machine that has none: standard input to the socket, its answer to standard output.
SOCAT = """#!{python}
import socket, sys
client = socket.socket(socket.AF_UNIX)
client.connect(sys.argv[-1].removeprefix("UNIX-CONNECT:"))
client.sendall(sys.stdin.buffer.read())
client.shutdown(socket.SHUT_WR)
sys.stdout.write(client.makefile().read())
"""


def examples() -> dict[str, str]:
    """The code that follows each mark, by the mark's name."""
    found = {}
    for name, rest in re.findall(r"<!-- example: (\w+) -->\n(.*?)(?=<!-- example|\Z)", PAGE.read_text(), re.DOTALL):
        fenced = re.match(r"```python\n(.*?)```", rest, re.DOTALL)
        indented = re.match(r"(?:    .*\n)+", rest)
        assert fenced or indented, name
        found[name] = fenced[1] if fenced else re.sub(r"(?m)^    ", "", indented[0])  # type: ignore[index]
    return found


@pytest.fixture
def short() -> Iterator[Path]:
    """A directory of ledgers with a tenant in it, whose path fits a socket's address."""
    with tempfile.TemporaryDirectory(prefix="elastickv-docs-") as folder:
        directory = Path(folder) / "ledgers"
        ledger = _core.Ledger.open(str(directory), "host", 64 << 30)
        tenant = ledger.join("chat", limit=MIB)
        assert tenant.lease(MIB)
        tenant.close()  # its limit is kept, so that an order is answered at once
        other = ledger.join("code")
        assert other.lease(2 * MIB)
        with serving(directory):
            yield directory
        other.close()


def run(command: list[str], directory: Path) -> str:
    binaries = f"{Path(sys.executable).parent}{os.pathsep}{directory.parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "DIRECTORY": str(directory), "ELASTICKV_DIR": str(directory), "PATH": binaries}
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_every_example_has_a_test() -> None:
    assert set(examples()) == {"socat", "shell", "python", "sockets", "embed"}


def test_socat(short: Path) -> None:
    if shutil.which("socat") is None:
        (short.parent / "socat").write_text(SOCAT.format(python=sys.executable))
        (short.parent / "socat").chmod(0o755)
    answers = [json.loads(line) for line in run(["bash", "-euc", examples()["socat"]], short).splitlines()]
    assert [answer["ok"] for answer in answers] == [True] * 3
    assert answers[1]["result"]["state"] == "kept"
    assert answers[2]["result"]["verdict"] == "now"


def test_shell(short: Path) -> None:
    answers = [json.loads(line) for line in run(["bash", "-euc", examples()["shell"]], short).splitlines()]
    assert [row["name"] for row in answers[0]["devices"][0]["tenants"]] == ["chat", "code"]
    assert (answers[1]["wanted"]["bytes"], len(answers)) == (8 << 30, 3)


def test_python(short: Path) -> None:
    lines = run([sys.executable, "-c", examples()["python"]], short).splitlines()
    assert lines[1].startswith("kept 8589934592 ")
    assert lines[2:] == ["now", str(2 * MIB)]


def test_sockets(short: Path) -> None:
    assert run([sys.executable, "-S", "-W", "ignore", "-c", examples()["sockets"]], short) == "0\n"


def test_embed(tmp_path: Path) -> None:
    lines = run([sys.executable, "-c", examples()["embed"]], tmp_path / "other")
    assert lines == f"serving {tmp_path}/other/control.sock\n"
