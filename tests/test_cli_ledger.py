"""`status`, `top` and `limit` on real ledgers with real tenants in other processes."""

from __future__ import annotations

import io
import json
import os
import pty
import select
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from elastickv import _core
from elastickv.cli.top import Sample, frame
from elastickv.ledger import TenantView, read_device
from support import Outcome

Cli = Callable[..., Outcome]
PAGE = 64 * 1024


def read(directory: Path, name: str) -> TenantView:
    return read_device(_core.Ledger.open(str(directory), "host")).tenant(name)


def test_an_empty_directory_says_so(cli: Cli, directory: Path) -> None:
    text = f"no ledger in {directory}; start an engine with `elastickv run`, or name another directory with --dir"
    assert cli("status", "--dir", directory) == Outcome(0, text + "\n", "")
    assert json.loads(cli("status", "--dir", directory, "--json").out) == {"directory": str(directory), "devices": []}
    assert cli("top", "--dir", directory) == Outcome(3, "", f"error: {text}\n")
    assert cli("limit", "chat", "1g", "--dir", directory) == Outcome(3, "", f"error: {text}\n")
    assert not directory.exists()


def test_status_of_a_tenant(cli: Cli, directory: Path, tenant: Any) -> None:
    with tenant("chat", blocks=10, cached=6, options='{"floor": "1MiB", "limit": "16MiB"}') as process:
        outcome = cli("status", "--dir", directory)
        assert outcome.code == 0
        head, columns, row = outcome.out.splitlines()
        assert head.endswith(" held of 64 MiB")
        assert columns.split() == ["NAME", "HELD", "USED", "CACHED", "FREE", "FLOOR", "LIMIT", "STATE"]
        assert row.split()[0] == "chat"
        assert f"1 MiB  16 MiB  running (pid {process.pid})" in row
        assert all(len(line) <= 80 for line in outcome.out.splitlines())
        listed = json.loads(cli("status", "--dir", directory, "--json").out)["devices"][0]
    assert listed["device"] == "host"
    assert listed["capacity"] == 64 << 20
    (row,) = listed["tenants"]
    assert (row["name"], row["alive"], row["limit_held"], row["floor"]) == ("chat", True, 16 << 20, 1 << 20)
    # Block 0 is the cache's own.
    assert (row["usage"]["used"], row["usage"]["cached"]) == (11 * PAGE, 6 * PAGE)


def test_a_killed_tenant_holds_nothing_and_its_limit_is_kept(cli: Cli, directory: Path, tenant: Any) -> None:
    with tenant("chat", options='{"limit": "16MiB"}') as process:
        process.send_signal(signal.SIGKILL)
        process.wait(10)
        outcome = cli("status", "--dir", directory)
        assert outcome.out.startswith("host: 0 bytes held of 64 MiB\n")
        assert "16 MiB  not running, limit kept" in outcome.out
        assert cli("limit", "chat", "8MiB", "--dir", directory) == Outcome(
            14, "chat is not running; limit 8 MiB is kept for its next start\n", ""
        )
    with tenant("chat"):
        assert read(directory, "chat").limit_held == 8 << 20


def test_limit_waits_for_the_tenant(cli: Cli, directory: Path, tenant: Any) -> None:
    with tenant("chat", blocks=10, cached=100):
        outcome = cli("limit", "chat", "2MiB", "--dir", directory)
        assert outcome.code == 0
        assert outcome.out.startswith("chat goes by limit 2 MiB and holds ")
        assert read(directory, "chat").applied.bytes == 2 << 20
        give_up = time.monotonic() + 5
        while read(directory, "chat").held > 2 << 20 and time.monotonic() < give_up:
            time.sleep(0.05)
        assert read(directory, "chat").held <= 2 << 20
        told = json.loads(cli("limit", "chat", "none", "--dir", directory, "--json").out)
    assert (told["wanted"]["bytes"], told["state"], told["acknowledged"]) == (None, "acknowledged", True)
    assert told["applied"] == told["wanted"]


def test_limit_above_what_runs_says_so(cli: Cli, directory: Path, tenant: Any) -> None:
    with tenant("chat", blocks=100):
        outcome = cli("limit", "chat", "1MiB", "--dir", directory)
    assert outcome.code == 0
    assert outcome.out.endswith("; it shrinks to the limit as its running requests end\n")


def test_a_limit_that_nobody_acknowledges_fails(cli: Cli, directory: Path, tenant: Any) -> None:
    with tenant("chat", blocks=10) as process:
        process.send_signal(signal.SIGSTOP)
        try:
            start = time.monotonic()
            outcome = cli("limit", "chat", "4MiB", "--timeout", "300ms", "--dir", directory)
            assert time.monotonic() - start < 3
            assert outcome.code == 7
            assert outcome.err.startswith(
                "error: limit: chat did not acknowledge within 300 ms: it has acknowledged none and holds "
            )
            assert outcome.err.endswith("and it gets nothing above the limit, see `elastickv status`\n")
            told = cli("limit", "chat", "4MiB", "--timeout", "0.1", "--dir", directory, "--json")
            assert told.code == 7
            assert json.loads(told.out)["acknowledged"] is False
        finally:
            process.send_signal(signal.SIGCONT)


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["chat", "512k"], 2, "tenant 'chat': a limit of 512 KiB is under its floor of 1 MiB"),
        (["chat", "-5"], 2, "No such option: -5"),
        (["chat", "lots"], 2, "SIZE: 'lots' is not a size; write bytes (1000000), KiB"),
        (["nobody", "1g"], 3, "no tenant named 'nobody' on device 'host'; there are: chat"),
        (["chat", "1g", "--timeout", "soon"], 2, "--timeout: 'soon' is not a time; write "),
        (["chat", "1g", "--device", "GPU-0"], 3, "GPU-0"),
    ],
)
def test_limits_that_are_refused(
    cli: Cli, directory: Path, tenant: Any, arguments: list[str], code: int, text: str
) -> None:
    with tenant("chat", options='{"floor": "1MiB"}'):
        outcome = cli("limit", *arguments, "--dir", directory)
        assert read(directory, "chat").limit_wanted is None
    assert (outcome.code, outcome.out) == (code, "")
    assert text in outcome.err


def test_several_devices_ask_for_a_choice(cli: Cli, directory: Path) -> None:
    for device in ("host", "GPU-1"):
        _core.Ledger.open(str(directory), device, 1 << 20)
    assert cli("top", "--count", 1, "--dir", directory) == Outcome(
        2, "", f"error: 2 devices have a ledger in {directory}; choose one with --device: GPU-1, host\n"
    )
    assert cli("top", "--count", 1, "--device", "GPU-1", "--dir", directory).code == 0
    assert len(json.loads(cli("status", "--json", "--dir", directory).out)["devices"]) == 2


def test_a_damaged_ledger_is_an_error(cli: Cli, directory: Path) -> None:
    _core.Ledger.open(str(directory), "host", 1 << 20)
    (directory / "host.ledger").write_bytes(b"no ledger" * 1000)
    outcome = cli("status", "--dir", directory)
    assert outcome.code == 6
    assert outcome.err.startswith("error: ")
    assert str(directory / "host.ledger") in outcome.err


def test_top_as_lines(cli: Cli, directory: Path, tenant: Any) -> None:
    with tenant("chat", blocks=15):
        outcome = cli("top", "--count", 2, "--interval", "50ms", "--dir", directory)
    lines = outcome.out.splitlines()
    assert (outcome.code, len(lines)) == (0, 4)
    assert " device=host held=" in lines[0]
    assert " chat weights=0 used=1MiB cached=0 free=" in lines[1]
    assert lines[1].endswith(" asked=none limit=none state='running'")


def test_top_refuses_nonsense(cli: Cli) -> None:
    assert cli("top", "--interval", "0") == Outcome(
        2, "", "error: top: --interval 0 --count 0; the least are 50ms and 0\n"
    )


def test_the_picture_fits_80_columns(directory: Path, tenant: Any) -> None:
    from rich.console import Console

    with (
        tenant("chat", blocks=300, cached=200, options='{"floor": "1MiB", "limit": "48MiB"}'),
        tenant("a-name-that-is-much-longer-than-its-column", blocks=50),
    ):
        view = read_device(_core.Ledger.open(str(directory), "host"))
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(frame(Sample("12:34:56", view)))
    text = console.export_text()
    lines = text.splitlines()
    assert all(len(line) <= 80 for line in lines), text
    assert lines[0].startswith("elastickv  host  2 running  12:34:56")
    (chat,) = [line for line in lines if line.startswith("chat ")]
    assert chat[13:53].count("█") == 12  # 301 of 1024 pages in 40 cells
    assert chat[13:53].index("|") == 30  # 48 of 64 MiB
    assert chat.endswith(", limit 48 MiB")
    assert any(line.strip().startswith("used 18.8 MiB  cached 12.5 MiB  free ") for line in lines)


def test_top_is_live_on_a_terminal_and_q_quits(directory: Path, tenant: Any) -> None:
    with tenant("chat", blocks=100):
        pid, terminal = pty.fork()
        if pid == 0:
            os.environ["TERM"] = "xterm-256color"
            os.execv(sys.executable, [sys.executable, "-m", "elastickv.cli", "top", "--dir", str(directory)])
        seen = read_until(terminal, b"transit", 20)
        assert "chat" in seen
        assert "q quits" in seen
        os.write(terminal, b"q")
        rest = read_until(terminal, b"\x1b[?1049l", 10)
        assert "\x1b[?1049l" in rest  # the terminal has its own screen back
        _, status = os.waitpid(pid, 0)
        os.close(terminal)
    assert os.waitstatus_to_exitcode(status) == 0


def read_until(terminal: int, mark: bytes, seconds: float) -> str:
    """What the terminal shows until the mark has come, for so many seconds at most."""
    data = b""
    end = time.monotonic() + seconds
    while mark not in data and time.monotonic() < end:
        if select.select([terminal], [], [], 0.1)[0]:
            try:
                data += os.read(terminal, 4096)
            except OSError:  # the other end has closed
                break
    return data.decode("utf-8", "replace")
