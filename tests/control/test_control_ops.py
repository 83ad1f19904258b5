"""What the operations of the control socket answer."""

from __future__ import annotations

import dataclasses
import select
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from subprocess import Popen

import pytest

from control.serving import SERVED_S, Serving, becomes, served_in, serving
from elastickv import _core
from elastickv.control.service import Service
from elastickv.errors import (
    AlreadyExists,
    DeadlineExceeded,
    InvalidArgument,
    NotFound,
)
from elastickv.fit import would_fit
from elastickv.ledger import Limit, read_device

MIB = 1 << 20


@pytest.fixture
def ledger(directory: Path) -> _core.Ledger:
    return _core.Ledger.open(str(directory), "host", 64 * MIB)


@pytest.fixture
def served(directory: Path, ledger: _core.Ledger) -> Iterator[Serving]:
    with serving(directory) as it:
        yield it


def test_hello_says_who_serves(served: Serving) -> None:
    with served.raw() as raw:
        answer = raw.ask({"op": "hello", "id": "a"})
    assert (answer["ok"], answer["v"], answer["id"], answer["result"]["protocol"]) == (True, 1, "a", 1)
    assert answer["result"]["directory"] == str(served.directory)


def test_list_and_get_show_what_stands_on_the_ledger(served: Serving, ledger: _core.Ledger) -> None:
    tenant = ledger.join("chat", floor=MIB, limit=8 * MIB, weight=3)
    assert tenant.lease(2 * MIB)
    with served.client() as client:
        (view,) = client.list()
        assert view == read_device(ledger)
        row = client.get("chat")
        assert (row.held, row.floor, row.weight, row.wanted.bytes) == (2 * MIB, MIB, 3, 8 * MIB)
        with pytest.raises(NotFound, match="no tenant named 'nobody' on device 'host'; there are: chat"):
            client.get("nobody")
        with pytest.raises(NotFound, match=r"no ledger of device 'GPU-1' in .*; there are: host"):
            client.list("GPU-1")
    tenant.close()


def test_set_tells_what_is_wanted_and_what_holds(served: Serving, ledger: _core.Ledger) -> None:
    tenant = ledger.join("chat", floor=MIB)
    with served.client() as client:
        pending = client.set_limit("chat", "8MiB", wait=0)
        assert (pending.state, pending.wanted.bytes, pending.applied) == ("pending", 8 * MIB, Limit(None, 0))
        with pytest.raises(
            DeadlineExceeded, match=r"limit: chat did not acknowledge within 50 ms: .*nothing above"
        ) as late:
            client.set_limit("chat", 9 * MIB, wait=0.05)
        assert late.value.attributes["wanted"] == 9 * MIB
        assert late.value.attributes["applied"] is None
        assert tenant.lease(10 * MIB) is False  # in force even so
        answer = threading.Timer(0.05, lambda: tenant.acknowledge_limit(*tenant.limit_wanted))
        answer.start()
        done = client.set_limit("chat", None, wait=20)
        answer.join()
        assert (done.state, done.wanted.bytes, done.applied, done.device) == ("acknowledged", None, done.wanted, "host")
        with pytest.raises(InvalidArgument, match="a limit of 512 KiB is under its floor of 1 MiB"):
            client.set_limit("chat", "512KiB")
        with pytest.raises(InvalidArgument, match="limit: 'lots' is not a size"):
            client.set_limit("chat", "lots")
        with pytest.raises(NotFound, match="no tenant named 'nobody'"):
            client.set_limit("nobody", 1)
        assert tenant.limit_wanted[0] is None
        ledger.order_limit("chat", 4 * MIB)
        tenant.close()
        assert client.set_limit("chat", 5 * MIB).state == "kept"


def test_a_real_tenant_acknowledges(served: Serving, tenant: Callable[..., AbstractContextManager[Popen[str]]]) -> None:
    with tenant("chat", blocks=10, cached=100), served.client() as client:
        order = client.set_limit("chat", "2MiB", wait=20)
        assert (order.state, order.applied.bytes) == ("acknowledged", 2 * MIB)
        assert becomes(lambda: client.get("chat").held <= 2 * MIB)


def test_forget_drops_the_name_of_the_dead_alone(served: Serving, ledger: _core.Ledger) -> None:
    tenant = ledger.join("chat", limit=MIB)
    with served.client() as client:
        with pytest.raises(AlreadyExists, match="tenant 'chat' runs"):
            client.forget("chat")
        tenant.close()
        client.forget("chat")
        assert client.list()[0].tenants == ()
        with pytest.raises(NotFound):
            client.forget("chat")


def test_fit_answers_as_the_python_function(served: Serving, ledger: _core.Ledger) -> None:
    tenant = ledger.join("chat", floor=48 * MIB)
    with served.client() as client:
        assert client.fit(static="8MiB", floor=16 * MIB) == would_fit(read_device(ledger), 8 * MIB, 16 * MIB)
        assert client.fit(static="17MiB").verdict == "never"
        with served.raw() as raw:
            answer = raw.ask({"op": "fit", "static": 17 * MIB})["result"]
        assert (answer["fits"], answer["missing"], answer["device"]) == (False, MIB, "host")
    tenant.close()


def test_two_devices_ask_for_a_choice(served: Serving, ledger: _core.Ledger) -> None:
    other = _core.Ledger.open(str(served.directory), "GPU-1", 64 * MIB)
    tenants = [ledger.join("chat"), other.join("chat"), other.join("code")]
    with served.client() as client:
        assert [view.device for view in client.list()] == ["GPU-1", "host"]
        with pytest.raises(InvalidArgument, match="'chat' is on 2 devices; name one in `device`: GPU-1, host"):
            client.get("chat")
        assert client.get("code").name == "code"
        assert client.get("chat", "GPU-1").name == "chat"
        with pytest.raises(InvalidArgument, match="name one device"):
            client.fit(static=1)
        with pytest.raises(NotFound, match="no tenant named 'nobody' on any of: GPU-1, host"):
            client.get("nobody")
    for tenant in tenants:
        tenant.close()


def test_a_damaged_ledger_hides_no_other(served: Serving) -> None:
    (served.directory / "GPU-1.ledger").write_bytes(b"no ledger" * 1000)
    (served.directory / "GPU-1.ledger").chmod(0o600)
    with served.raw() as raw:
        result = raw.ask({"op": "list"})["result"]
    assert [view["device"] for view in result["devices"]] == ["host"]
    (error,) = result["errors"]
    assert (error["device"], "GPU-1.ledger" in error["message"]) == ("GPU-1", True)


def test_watch_sends_what_has_changed(served: Serving, ledger: _core.Ledger) -> None:
    with served.raw() as raw:
        raw.send(b'{"op":"watch","interval":0.05,"count":3,"id":1}\n')
        assert raw.answer()["result"]["devices"][0]["tenants"] == []
        tenant = ledger.join("chat")
        assert [row["name"] for row in raw.answer()["result"]["devices"][0]["tenants"]] == ["chat"]
        assert tenant.lease(MIB)
        third = raw.answer()
        assert (third["event"], third["id"], third["result"]["devices"][0]["tenants"][0]["leased"]) == ("view", 1, MIB)
        assert raw.answer()["result"] == {"sent": 3}
        assert raw.ask({"op": "hello"})["ok"]  # the connection goes on
        tenant.close()


def test_a_watch_does_not_send_that_time_has_passed(ledger: _core.Ledger) -> None:
    tenant = ledger.join("chat")
    view = read_device(ledger)
    later = dataclasses.replace(view, tenants=(dataclasses.replace(view.tenants[0], demand_age_ns=7),))
    assert view != later
    assert Service.steady({"devices": [view], "errors": []}) == Service.steady({"devices": [later], "errors": []})
    tenant.close()


def test_a_watch_of_one_tenant_ends_with_the_next_line(served: Serving, ledger: _core.Ledger) -> None:
    tenants = [ledger.join("chat"), ledger.join("code")]
    with served.raw() as raw:
        watched = raw.ask({"op": "watch", "tenant": "code", "interval": 0.05})
        assert [row["name"] for row in watched["result"]["devices"][0]["tenants"]] == ["code"]
        assert raw.ask({"op": "hello", "id": 2})["event"] == "end"
        assert raw.answer()["id"] == 2
    for tenant in tenants:
        tenant.close()


def test_the_client_watches(served: Serving, ledger: _core.Ledger) -> None:
    with served.client() as client:
        views = client.watch(interval=0.05)
        assert next(views)[0].tenants == ()
        tenant = ledger.join("chat")
        assert [row.name for row in next(views)[0].tenants] == ["chat"]
        views.close()  # type: ignore[attr-defined]
        assert becomes(lambda: served.connections <= 1)
        tenant.close()


def test_several_requests_in_one_go_are_answered_in_order(served: Serving) -> None:
    with served.raw() as raw:
        raw.send(b"".join(b'{"op":"hello","id":%d}\n' % number for number in range(200)))
        raw.socket.shutdown(1)  # and nothing more comes from here
        assert [raw.answer()["id"] for _ in range(200)] == list(range(200))
        assert raw.ended()


def test_a_ledger_that_is_replaced_is_read_anew(served: Serving, ledger: _core.Ledger, tmp_path: Path) -> None:
    with served.client() as client:
        assert client.list()[0].capacity == 64 * MIB
        for file in served.directory.glob("host.*"):
            file.rename(tmp_path / file.name)
        assert client.list() == ()
        _core.Ledger.open(str(served.directory), "host", 32 * MIB)
        assert client.list()[0].capacity == 32 * MIB


def test_a_lock_that_is_held_elsewhere_stalls_no_other_device(served: Serving, directory: Path, tmp_path: Path) -> None:
    """A process stops inside the ledger of another device, with its lock."""
    import subprocess
    import sys

    code = (
        "import sys; from elastickv import _core\n"
        "ledger = _core.Ledger.open(sys.argv[1], 'GPU-1', 1 << 30)\n"
        "_core.set_fault('ledger.lease.locked', 'delay', 0, 60_000_000)\n"
        "tenant = ledger.join('stuck'); print('ready', flush=True); tenant.lease(1)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(directory)], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            other = _core.Ledger.open(str(directory), "GPU-1", deadline_ms=1)

            def stuck() -> bool:
                try:
                    other.view()
                except DeadlineExceeded:
                    return True
                return False

            assert becomes(stuck)
            waiting = served.raw()
            waiting.send(b'{"op":"list","device":"GPU-1"}\n')
            with served.client() as client:
                assert served_in(client, device="host") <= SERVED_S
            assert not select.select([waiting.socket], [], [], 0)[0]  # the other one has waited all the time
            assert waiting.answer()["result"]["errors"][0]["device"] == "GPU-1"  # at the lock's own deadline
            waiting.__exit__()
        finally:
            process.kill()
