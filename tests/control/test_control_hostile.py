"""What clients do to a control socket, by accident or not; and that another client is served meanwhile."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

import pytest

from control.serving import SERVED_S, Raw, Serving, becomes, served_in, serving
from elastickv import _core
from elastickv.control import Client
from elastickv.control.connection import ControlLimits
from elastickv.errors import AccessDenied

MIB = 1 << 20


@pytest.fixture
def served(directory: Path) -> Iterator[Serving]:
    """With one tenant on its ledger, and deadlines that a test can wait for."""
    ledger = _core.Ledger.open(str(directory), "host", 64 * MIB)
    tenant = ledger.join("chat")
    with serving(directory, ControlLimits(frame_s=0.5, write_s=0.5, connections=128, watches=8, waits=64)) as it:
        yield it
    tenant.close()


@pytest.fixture
def client(served: Serving) -> Iterator[Client]:
    """Another client, which has to be served whatever a test does."""
    with served.client() as client:
        client.hello()
        yield client


KNOCK = """
import os, socket, sys
folder = os.open(sys.argv[1], os.O_DIRECTORY)
print("ready", flush=True)
while True:
    with socket.socket(socket.AF_UNIX) as knocking:
        knocking.connect(f"/proc/self/fd/{folder}/control.sock")
"""

ASK = """
import os, socket, sys
folder = os.open(sys.argv[1], os.O_DIRECTORY)
client = socket.socket(socket.AF_UNIX)
client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
client.connect(f"/proc/self/fd/{folder}/control.sock")
print("ready", flush=True)
try:
    while True:
        client.sendall(b'{"op":"list"}\\n' * 100)
except OSError:
    print("dropped", flush=True)
"""


@contextmanager
def attacker(code: str, directory: Path) -> Iterator[IO[str]]:
    """Another process, so that what it takes is not this interpreter's time. Gives what it prints after "ready"."""
    command = [sys.executable, "-S", "-c", code, str(directory)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            if process.stdout is None or process.stdout.readline() != "ready\n":
                raise RuntimeError("the attacker did not start")
            yield process.stdout
        finally:
            process.kill()


def test_connect_and_leave(served: Serving, client: Client) -> None:
    with attacker(KNOCK, served.directory):
        assert served_in(client) <= SERVED_S
    assert becomes(lambda: served.connections == 1)


def test_silence(directory: Path) -> None:
    _core.Ledger.open(str(directory), "host", 64 * MIB)
    with serving(directory, ControlLimits(idle_s=0.5)) as served, served.client() as client, served.raw() as silent:
        assert served_in(client) <= SERVED_S
        assert silent.answer()["error"]["message"] == "no request for 0.5 s; connect again"
        assert silent.ended()
        assert becomes(lambda: served.connections == 0)  # the client is as silent by now
        assert len(client.list()) == 1  # and connects again by itself


def test_half_a_frame(served: Serving, client: Client) -> None:
    with served.raw() as raw:
        raw.send(b'{"op":"li')
        assert served_in(client) <= SERVED_S
        error = raw.answer()["error"]
        assert (error["code"], error["message"]) == ("timeout", "half a request, and no more of it within 0.5 s")
        assert raw.ended()
    with served.raw() as raw:
        raw.send(b'{"op":"li')  # and leaves in the middle of it
    assert becomes(lambda: served.connections == 1)


def test_a_frame_byte_by_byte(served: Serving, client: Client) -> None:
    with served.raw() as raw:
        assert becomes(lambda: cut_off(raw, b" "))
        assert served_in(client) <= SERVED_S


def cut_off(raw: Raw, data: bytes) -> bool:
    """Sends; whether the server has closed."""
    try:
        raw.send(data)
    except ConnectionError:
        return True
    return False


def test_a_frame_of_a_gigabyte(served: Serving, client: Client) -> None:
    before = peak_bytes()
    with served.raw() as raw:
        sent = next((mib for mib in range(1024) if cut_off(raw, b"x" * MIB)), 1024)
        assert served_in(client) <= SERVED_S
        error = raw.answer()["error"]
        assert (error["code"], error["message"]) == ("invalid", "a request is longer than 64 KiB, the most")
    assert sent < 16  # cut early
    assert peak_bytes() - before < 64 * MIB
    with served.raw() as raw:  # just as long as may be
        assert raw.ask({"op": "hello", "id": 1, "device": "x" * 65000})["error"]["code"] == "invalid"


def test_a_thousand_connections(served: Serving, client: Client) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = 4096 if hard == resource.RLIM_INFINITY else min(hard, 4096)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, enough), hard))
    try:
        with ExitStack() as stack:
            # Both ends are in this process, where a machine may allow 1,024 descriptors.
            crowd = [stack.enter_context(served.raw()) for _ in range(min(1000, max(soft, enough) - 400))]
            assert served_in(client) <= SERVED_S
            newcomer = stack.enter_context(served.raw())
            assert newcomer.ask({"op": "list"})["ok"]  # a full server still takes the next one
            assert served.connections <= 128
            refused = crowd[0].answer()["error"]
            assert (refused["code"], "to make room" in refused["message"]) == ("unavailable", True)
        assert client.hello()["protocol"] == 1
        assert becomes(lambda: served.connections == 1)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_thousand_busy_connections(served: Serving, client: Client) -> None:
    """Each asks to wait for an acknowledgement that does not come. So many may wait that places stay for others."""
    with ExitStack() as stack:
        crowd = []
        for _ in range(300):
            raw = stack.enter_context(served.raw())
            raw.send(b'{"op":"set","tenant":"chat","limit":1048576,"wait":60}\n')
            crowd.append(raw)
        assert served_in(client) <= SERVED_S
        assert served.connections <= 128
        assert becomes(lambda: served.server._service._waiting == 64)
        refused = stack.enter_context(served.raw()).ask({"op": "set", "tenant": "chat", "limit": 2 * MIB})
        assert refused["error"]["message"].startswith("64 requests wait for tenants already")
        assert stack.enter_context(served.raw()).ask({"op": "list"})["ok"]
    assert client.get("chat").wanted.bytes == MIB


def test_more_watches_than_there_may_be(served: Serving, client: Client) -> None:
    with ExitStack() as stack:
        watches = [stack.enter_context(served.raw()) for _ in range(8)]
        for raw in watches:
            assert raw.ask({"op": "watch", "interval": 0.05})["event"] == "view"
        one_more = stack.enter_context(served.raw()).ask({"op": "watch"})
        assert (one_more["error"]["code"], one_more["ok"]) == ("unavailable", False)
        assert served_in(client) <= SERVED_S


def test_a_client_that_reads_nothing_is_dropped(served: Serving, client: Client) -> None:
    with attacker(ASK, served.directory) as said:
        assert served_in(client) <= SERVED_S
        assert becomes(lambda: served.connections == 1)
        assert said.readline() == "dropped\n"


def test_a_watcher_that_leaves_in_the_middle(served: Serving, client: Client) -> None:
    with served.raw() as raw:
        assert raw.ask({"op": "watch", "interval": 0.05})["event"] == "view"
        assert served.connections == 2
    assert becomes(lambda: served.connections == 1)
    assert served_in(client) <= SERVED_S


GARBAGE = {
    "bytes": bytes(range(128, 256)) * 32 + b"\n",
    "zeros": b"\0" * 4096 + b"\n",
    "http": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "pickle": b"\x80\x04\x95\x0f\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94.\n",
    "empty lines": b"\n" * 60000,
    "half a text": b'{"op":"lis\n',
    "no utf-8": b'{"op":"\xff\xfe"}\n',
}


@pytest.mark.parametrize("frame", GARBAGE.values(), ids=GARBAGE)
def test_garbage_ends_the_connection(served: Serving, client: Client, frame: bytes) -> None:
    with served.raw() as raw:
        raw.send(frame)
        error = raw.answer()["error"]
        assert error["code"] == "invalid"
        assert "Traceback" not in error["message"]
        assert served_in(client) <= SERVED_S
        assert raw.ended()


WRONG = {
    "an array": b"[1,2]",
    "a number": b"7",
    "no operation": b"{}",
    "an unknown operation": b'{"op":"shutdown","id":5}',
    "two operations": b'{"op":"hello","op":"boom"}',
    "an unknown field": b'{"op":"list","tenants":1}',
    "a field of another type": b'{"op":"get","tenant":5}',
    "a boolean for a size": b'{"op":"set","tenant":"chat","limit":true}',
    "a negative size": b'{"op":"set","tenant":"chat","limit":-1}',
    "a fraction": b'{"op":"set","tenant":"chat","limit":1.5}',
    "a huge number": b'{"op":"set","tenant":"chat","limit":' + b"9" * 5000 + b"}",
    "a huge power": b'{"op":"set","tenant":"chat","limit":1e999}',
    "a huge text for a size": b'{"op":"set","tenant":"chat","limit":"' + b"9" * 60 + b'"}',
    "no tenant's name": b'{"op":"get","tenant":"../../etc/passwd"}',
    "a name with a line break": b'{"op":"get","tenant":"chat\\n"}',
    "a name with a zero": b'{"op":"get","tenant":"chat\\u0000"}',
    "a device with a path": b'{"op":"list","device":"../host"}',
    "a wait without end": b'{"op":"set","tenant":"chat","limit":1,"wait":1e9}',
    "a watch without rest": b'{"op":"watch","interval":0}',
    "a long id": b'{"op":"list","id":"' + b"x" * 100 + b'"}',
    "another protocol": b'{"op":"list","v":2,"news":1}',
    "deep": b'{"op":"list","device":' + b"[" * 60000,
    "deep and closed": b'{"op":"list","device":' + b"[" * 20000 + b"]" * 20000 + b"}",
}


@pytest.mark.parametrize("frame", WRONG.values(), ids=WRONG)
def test_a_wrong_request_is_answered_and_the_connection_goes_on(served: Serving, client: Client, frame: bytes) -> None:
    with served.raw() as raw:
        raw.send(frame + b"\n")
        answer = raw.answer()
        assert (answer["ok"], answer["error"]["code"], answer["error"]["exit_code"]) == (False, "invalid", 2)
        assert raw.ask({"op": "hello"})["ok"]
    assert served_in(client, 3) <= SERVED_S
    assert client.get("chat").limit_wanted is None


def test_the_answer_to_a_wrong_request_has_its_id(served: Serving) -> None:
    with served.raw() as raw:
        assert raw.ask({"op": "shutdown", "id": 5})["id"] == 5
        assert "hello, list, get, set" in raw.ask({"op": "shutdown"})["error"]["message"]
        assert raw.ask({"op": "list", "v": 2})["error"]["message"].startswith("protocol 2 is asked for, this server")


OTHER_USER = """
import os, socket, sys
os.setgroups([]); os.setgid(65534); os.setuid(65534)
client = socket.socket(socket.AF_UNIX)
try:
    client.connect(sys.argv[1])
except OSError as error:
    print(type(error).__name__)
else:
    try:
        client.sendall(b'{"op":"list"}\\n')
    except BrokenPipeError:
        pass  # it has closed already, and what it said can still be read
    print(client.recv(1 << 16).decode(), end="")
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_user_is_kept_out_by_the_mode_and_by_the_kernels_word(served: Serving, client: Client) -> None:
    # A path that another user can walk and that fits an address: the tests' own directory is neither.
    import tempfile

    with tempfile.TemporaryDirectory(prefix="elastickv-test-") as folder:
        Path(folder).chmod(0o755)
        link = Path(folder) / "ledgers"
        served.directory.rename(link)
        try:
            command = [sys.executable, "-S", "-c", OTHER_USER, str(link / "control.sock")]
            told = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
            assert told == "PermissionError\n"
            link.chmod(0o755)
            (link / "control.sock").chmod(0o666)
            told = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
            assert '"code":"denied"' in told
            assert "user 65534 has no business here" in told
            with pytest.raises(AccessDenied, match="mode 0755, so others can reach it"):
                Client(str(link)).hello()
        finally:
            link.chmod(0o700)
            link.rename(served.directory)
    (served.directory / "control.sock").chmod(0o600)
    assert served_in(client) <= SERVED_S


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def test_a_client_is_served_while_it_counts(client: Client) -> None:
    """The measure itself: it would fail if a call took long."""
    slow: Callable[[], object] = client.list
    client.list = lambda *_: (time.sleep(SERVED_S + 0.02), slow())[1]  # type: ignore[method-assign, assignment]
    assert served_in(client, 3) > SERVED_S
