"""Where the control socket is, who may make it, and what is left when its server ends."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from control.serving import Raw, serving
from elastickv import _core
from elastickv.config import Settings
from elastickv.control import Client, ControlServer
from elastickv.control.place import Place
from elastickv.errors import AccessDenied, AlreadyExists, InvalidArgument, NotFound, Unavailable
from support import Outcome

MIB = 1 << 20
Cli = Callable[..., Outcome]


@contextmanager
def server_process(directory: Path, start_with: Sequence[str] = ()) -> Iterator[subprocess.Popen[str]]:
    """`elastickv control` as a process of its own, which listens."""
    command = [*start_with, sys.executable, "-m", "elastickv.cli", "control", "--dir", str(directory)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            line = process.stdout.readline() if process.stdout else ""
            assert re.fullmatch(r"control socket .*/control\.sock, protocol 1; Ctrl-C ends it\n", line), line
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_closes_it_and_leaves_no_socket(directory: Path, number: signal.Signals) -> None:
    with server_process(directory) as process:
        assert stat.S_IMODE((directory / "control.sock").stat().st_mode) == 0o600
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
        with Client(str(directory)) as client:
            assert client.hello()["pid"] == process.pid
            process.send_signal(number)
            assert process.wait(20) == 0
            assert not (directory / "control.sock").exists()
            with pytest.raises(NotFound, match=r"nobody serves '.*/control\.sock'; start `elastickv control`"):
                client.hello()
        assert process.stderr is not None
        assert process.stderr.read() == ""


def test_a_killed_server_misleads_nobody_and_the_next_one_takes_its_place(directory: Path) -> None:
    ledger = _core.Ledger.open(str(directory), "host", 64 * MIB)
    with server_process(directory) as process, Client(str(directory)) as client:
        watch = client.watch(interval=0.05)
        assert next(watch)[0].device == "host"
        process.kill()
        process.wait(20)
        assert (directory / "control.sock").exists()  # nobody was there to remove it
        with pytest.raises(Unavailable, match="has closed the connection; is it still running"):
            next(watch)
        with pytest.raises(NotFound, match="nobody serves"):
            client.hello()
        with server_process(directory) as another:
            assert client.hello()["pid"] == another.pid
            assert client.list()[0].capacity == ledger.view()["capacity"]


def test_a_living_server_keeps_its_place(directory: Path, cli: Cli) -> None:
    with serving(directory) as served:
        outcome = cli("control", "--dir", directory)
        assert outcome == Outcome(
            4,
            "",
            f"error: a control server serves '{directory}/control.sock' already (process {os.getpid()}); "
            "use it, or stop it\n",
        )
        with served.client() as client:
            assert client.hello()["pid"] == os.getpid()
    assert not (directory / "control.sock").exists()


def test_a_forked_child_holds_neither_lock_nor_socket(directory: Path) -> None:
    place = Place(directory)
    place.listening.listen()
    reading, writing = os.pipe()
    here, there = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(writing)
        os.write(there, b"!")
        os.read(reading, 1)
        os._exit(0)
    try:
        os.read(here, 1)
        place.close()
        Place(directory).close()  # would be refused if the child had the lock
    finally:
        for end in (writing, reading, here, there):
            os.close(end)
        os.waitpid(child, 0)


def test_what_is_not_private_is_refused(tmp_path: Path, directory: Path) -> None:
    open_to_all = tmp_path / "open"
    open_to_all.mkdir()
    open_to_all.chmod(0o755)
    with pytest.raises(AccessDenied, match="has mode 0755, so others can reach it; make it private: chmod 700"):
        Place(open_to_all)
    directory.mkdir(mode=0o700)
    link = tmp_path / "link"
    link.symlink_to(directory)
    with pytest.raises(AccessDenied, match="cannot be opened as a directory"):
        Place(link)
    (directory / "control.sock").write_text("not a socket")
    with pytest.raises(AccessDenied, match=r"control\.sock' is no socket; remove it"):
        Place(directory)
    (directory / "control.sock").unlink()
    (directory / "control.lock").unlink()
    (directory / "control.lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(AccessDenied, match=r"control\.lock' cannot be opened"):
        Place(directory)
    assert not (tmp_path / "elsewhere").exists()
    (directory / "control.lock").unlink()
    (directory / "control.lock").touch(mode=0o644)
    (directory / "control.lock").chmod(0o644)
    with pytest.raises(AccessDenied, match="is no private file of this user"):
        Place(directory)


def test_a_stale_socket_is_replaced_and_a_successors_is_left_alone(directory: Path) -> None:
    directory.mkdir(mode=0o700)
    stale = Place(directory)
    path = directory / "control.sock"
    path.unlink()
    other = socket.socket(socket.AF_UNIX)
    folder = os.open(directory, os.O_DIRECTORY)
    other.bind(f"/proc/self/fd/{folder}/control.sock")
    os.close(folder)
    stale.close()
    assert path.exists()  # it is not the one that was made there
    Place(directory).close()
    assert not path.exists()
    other.close()


def test_a_very_long_path_is_no_obstacle(tmp_path: Path) -> None:
    directory = tmp_path.joinpath(*["a-long-name-for-a-folder"] * 8)
    directory.mkdir(parents=True, mode=0o700)
    assert len(str(directory)) > 150
    with serving(directory) as served, served.client() as client:
        assert client.list() == ()


def test_it_starts_and_stops_in_somebody_elses_loop(directory: Path) -> None:
    async def embed() -> None:
        server = ControlServer(Settings.load(arguments={"directory": str(directory)}))
        for _ in range(2):
            async with server:
                assert server.path.is_socket()
                with pytest.raises(AlreadyExists):
                    await server.start()
                with Client(str(directory)) as client:
                    assert (await asyncio.to_thread(client.hello))["protocol"] == 1
            assert not server.path.exists()
            await server.stop()

    asyncio.run(embed())


def test_call_from_the_command_line(directory: Path, cli: Cli) -> None:
    ledger = _core.Ledger.open(str(directory), "host", 64 * MIB)
    tenant = ledger.join("chat")
    call = ("control", "--dir", directory, "call")
    assert cli(*call, "list") == Outcome(
        3, "", f"error: nobody serves '{directory}/control.sock'; start `elastickv control`\n"
    )
    with serving(directory):
        assert json.loads(cli(*call, "get", "tenant=chat").out)["tenant"]["name"] == "chat"
        told = json.loads(cli(*call, "set", "tenant=chat", "limit=8MiB", "wait=0").out)
        assert (told["state"], told["wanted"]["bytes"]) == ("pending", 8 * MIB)
        lines = cli(*call, "watch", "interval=0.05", "count=1").out.splitlines()
        assert [json.loads(line)["devices"][0]["device"] for line in lines] == ["host"]
        assert cli(*call, "get", "tenant=nobody").code == 3
        assert cli(*call, "get", "nobody") == Outcome(2, "", "error: control call: 'nobody' is no FIELD=VALUE\n")
        assert cli(*call, "dance").code == 2
    tenant.close()


def test_a_request_that_is_too_long_is_not_sent(directory: Path) -> None:
    with serving(directory) as served, served.client() as client:
        with pytest.raises(InvalidArgument, match="a request of 70"):
            client.call("get", tenant="x" * 70000)
        assert client.list() == ()


def test_the_server_takes_no_more_connections_than_descriptors_allow(directory: Path) -> None:
    # Half of them are for connections; a crowd as large as the limit would otherwise take the server's last one.
    with server_process(directory, ["bash", "-c", 'ulimit -n 80; exec "$@"', "bash"]), ExitStack() as stack:
        crowd = [stack.enter_context(Raw(directory)) for _ in range(80)]
        client = stack.enter_context(Client(str(directory)))
        assert client.list() == ()
        for raw in crowd[-39:]:  # and the client itself
            assert raw.ask({"op": "list"})["ok"]
        for raw in crowd[:-39]:
            refused = raw.answer()["error"]
            assert (refused["code"], "to make room" in refused["message"]) == ("unavailable", True)
