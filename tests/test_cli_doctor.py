"""`elastickv doctor`: what it finds wrong, and its proof that a tenant is managed."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from elastickv import _core
from elastickv.cli import checks, proof
from elastickv.cli.checks import Finding
from elastickv.config import Settings
from elastickv.memory import Cache, RankGeometry
from support import Outcome

Cli = Callable[..., Outcome]


def findings(outcome: Outcome) -> dict[str, list[tuple[str, str]]]:
    found: dict[str, list[tuple[str, str]]] = {}
    for finding in json.loads(outcome.out)["findings"]:
        found.setdefault(finding["check"], []).append((finding["outcome"], finding["text"]))
    return found


@pytest.fixture(autouse=True)
def no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engines have checks of their own elsewhere, and looking for vLLM takes seconds."""
    monkeypatch.setattr(checks, "NAMES", ())


def test_a_fresh_machine_is_fine(cli: Cli, directory: Path) -> None:
    outcome = cli("doctor", "--dir", directory, "--json")
    assert outcome.code == 0
    found = findings(outcome)
    assert found["directory"] == [("ok", f"{directory} is not there yet; the first engine makes it")]
    assert found["ledger"] == [("ok", "none yet")]
    assert found["driver host"][0][0] == "ok"
    assert not directory.exists()


def test_lines_are_for_people(cli: Cli, directory: Path) -> None:
    lines = cli("doctor", "--dir", directory).out.splitlines()
    assert lines[1] == f"ok    directory: {directory} is not there yet; the first engine makes it"


def test_tenants_and_kept_limits_are_named(cli: Cli, directory: Path, tenant: Any) -> None:
    with tenant("gone", options='{"limit": "8MiB"}') as process:
        process.send_signal(signal.SIGKILL)
        process.wait(10)
    with tenant("chat"):
        found = findings(cli("doctor", "--dir", directory, "--json"))
    assert found["ledger host"] == [
        ("ok", "64 MiB shared; running: chat"),
        ("note", "not running, hold nothing, limit kept for their next start: gone"),
    ]


def test_a_directory_that_others_may_read(cli: Cli, directory: Path) -> None:
    directory.mkdir(mode=0o755)
    directory.chmod(0o755)
    outcome = cli("doctor", "--dir", directory)
    assert outcome.code == 1
    assert f"BAD   directory: {directory} has mode 0755, others may look in; run: chmod 700 {directory}" in outcome.out


def test_a_directory_that_is_a_link(cli: Cli, directory: Path, tmp_path: Path) -> None:
    directory.symlink_to(tmp_path)
    text = f"{directory} is not a directory of its own; remove it, or choose another with --dir"
    assert findings(cli("doctor", "--dir", directory, "--json"))["directory"] == [("bad", text)]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
def test_a_directory_of_another_user(cli: Cli, directory: Path) -> None:
    directory.mkdir(mode=0o700)
    os.chown(directory, 12345, 12345)
    text = f"{directory} belongs to user 12345, not 0; choose another with --dir"
    assert findings(cli("doctor", "--dir", directory, "--json"))["directory"] == [("bad", text)]


def test_a_damaged_ledger(cli: Cli, directory: Path) -> None:
    _core.Ledger.open(str(directory), "host", 1 << 20)
    (directory / "host.ledger").write_bytes(b"\0" * 100)
    outcome = cli("doctor", "--dir", directory, "--json")
    assert outcome.code == 1
    assert findings(outcome)["ledger host"][0][0] == "bad"


def test_a_missing_driver_is_a_note_unless_it_is_needed() -> None:
    finding = checks.driver("GPU-0000", needed=False)
    assert finding.check == "driver GPU-0000"
    assert finding.outcome == "note"
    assert finding.text.startswith("not usable here: ")
    assert checks.driver("GPU-0000", needed=True).outcome == "bad"


def test_a_managed_tenant_is_proved_by_the_kernel(cli: Cli, directory: Path, tenant: Any) -> None:
    with tenant("chat", blocks=100) as process:
        outcome = cli("doctor", "--name", "chat", "--dir", directory)
        assert outcome.code == 0, outcome.out
        assert outcome.out.startswith(f"ok    tenant chat: managed: bare (pid {process.pid}) has ")
        assert " mapped by the ledger and by the kernel, " in outcome.out
        counted = proof.kernel_bytes([process.pid])
    assert counted.mapped >= 101 * 64 * 1024
    assert counted.resident <= counted.mapped


def test_a_tenant_whose_memory_is_elsewhere_is_not_proved(
    cli: Cli, directory: Path, tenant: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine that joined the ledger and serves from memory of its own: the kernel gives it away."""
    monkeypatch.setattr(proof, "PAUSE_S", 0.01)
    with tenant("chat"):
        monkeypatch.setattr(proof, "ranks_of", lambda pid: [os.getpid()])
        outcome = cli("doctor", "--name", "chat", "--dir", directory)
    assert outcome.code == 1
    assert " mapped, the kernel says 0 bytes in process " in outcome.out


def test_names_that_are_not_there_are_not_managed(cli: Cli, directory: Path, tenant: Any) -> None:
    with tenant("chat", options='{"limit": "8MiB"}'):
        text = "tenant code: no such name on the ledger: it is not managed here; the names are chat"
        assert cli("doctor", "--name", "code", "--dir", directory) == Outcome(1, f"BAD   {text}\n", "")
    text = "tenant chat: not running; what runs under this name is not managed"
    assert cli("doctor", "--name", "chat", "--dir", directory) == Outcome(1, f"BAD   {text}\n", "")


def test_the_kernels_list_is_read_by_name(tmp_path: Path) -> None:
    """Only the mappings of the cache count: not the page table's file, not a file with a longer name."""
    listing = """\
7f0000000000-7f0000010000 rw-s 00000000 00:01 5 /memfd:elastickv (deleted)
Size:                 64 kB
Rss:                  32 kB
7f0000010000-7f0000020000 rw-s 00000000 00:01 6 /memfd:elastickv-pages (deleted)
Size:                 64 kB
Rss:                  64 kB
7f0000020000-7f0000030000 ---s 00010000 00:01 5 /memfd:elastickv (deleted)
Size:                128 kB
Rss:                   0 kB
VmFlags: rd wr sh
7f0000030000-7f0000040000 rw-p 00000000 00:00 0
Size:                 64 kB
Rss:                  64 kB
"""
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "smaps").write_text(listing)
    assert proof.kernel_bytes([7, 8], tmp_path) == proof.KernelBytes(192 << 10, 32 << 10)


def test_ranks_are_found_by_their_page_table(tmp_path: Path) -> None:
    """Whoever started them: one below the first rank, one beside it. A neighbour has a table of its own."""
    lines = {
        5: ["00:01 8 /memfd:elastickv (deleted)", "00:01 6 /memfd:elastickv-pages (deleted)"],
        6: ["00:01 6 /memfd:elastickv-pages (deleted)"],
        7: ["00:01 9 /memfd:elastickv-pages (deleted)", "00:01 6 /memfd:elastickv (deleted)"],
        8: ["00:02 6 /memfd:elastickv-pages (deleted)", "00:01 6 /memfd:elastickv-pages-of-others (deleted)"],
        9: ["00:01 9 /memfd:elastickv-pages (deleted)", "00:01 6 /memfd:elastickv-pages (deleted)"],
    }
    for pid, found in lines.items():
        (tmp_path / str(pid)).mkdir()
        (tmp_path / str(pid) / "maps").write_text("".join(f"7f00-7f01 rw-s 00000000 {line}\n" for line in found))
    (tmp_path / "10").mkdir()
    (tmp_path / "self").mkdir()
    assert sorted(proof.ranks_of(5, tmp_path)) == [5, 6, 9]


def test_ranks_in_a_process_beside_the_first_one_count(cli: Cli, directory: Path) -> None:
    """As SGLang's: the rank is nobody's child here but the test's, as is the process that schedules."""
    settings = Settings.load(
        arguments={"directory": str(directory), "device": "host", "name": "pair", "capacity": 1 << 26}
    )
    cache = Cache.create(settings, num_blocks=64, ranks=[RankGeometry("host", 1, 65536)] * 2)
    code = (
        "import json, sys\nfrom elastickv.memory import RankMemory, RankSpec\n"
        "memory = RankMemory.attach(RankSpec(**json.loads(sys.argv[1])))\nprint(flush=True)\nsys.stdin.read()"
    )
    ranks = []
    try:
        for rank in range(2):
            spec = json.dumps(dataclasses.asdict(cache.rank_spec(rank)))
            command = ["setsid", "--fork", sys.executable, "-c", code, spec]
            ranks.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        cache.wait_ready(60)
        assert cache.pool.alloc(8) is not None
        outcome = cli("doctor", "--name", "pair", "--dir", directory)
        assert outcome.code == 0, outcome.out
    finally:
        for process in ranks:
            process.communicate("", timeout=60)
        cache.close()


def test_the_tree_of_a_process_whose_children_have_odd_names(tmp_path: Path) -> None:
    for pid, parent, name in ((5, 1, "sh"), (6, 5, "a) b (c"), (7, 6, "x y"), (8, 1, "other")):
        (tmp_path / str(pid)).mkdir()
        (tmp_path / str(pid) / "stat").write_text(f"{pid} ({name}) S {parent} 1 1")
    (tmp_path / "self").mkdir()
    assert proof.process_tree(5, tmp_path) == [5, 6, 7]


def test_everything_is_asked_in_order(directory: Path) -> None:
    settings = Settings.load(options={"directory": str(directory)})
    names = [finding.check for finding in checks.everything(settings)]
    assert names == ["package", "directory", "ledger", "driver host", "driver cuda"]
    assert all(isinstance(finding, Finding) for finding in checks.everything(settings))
