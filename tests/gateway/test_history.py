"""Samples over time: what tenants hold, who handed memory to whom, which moves models made."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import pytest

from elastickv import _core
from elastickv.gateway import history as module
from elastickv.gateway.history import History, hand_over
from elastickv.gateway.states import Move, State
from elastickv.gateway.stats import Stats
from elastickv.ledger import DeviceView, TenantView, read_device
from gateway.views import model_view

MIB = 1 << 20
CAPACITY = 64 * MIB


@dataclass
class Clock:
    now: float = 1.8e9

    def __call__(self) -> float:
        self.now += 1
        return self.now


@pytest.fixture
def ledger(directory: Path) -> _core.Ledger:
    return _core.Ledger.open(str(directory), "host", CAPACITY)


@pytest.fixture
def history(directory: Path) -> History:
    return History(directory, Stats(), Clock())


def with_changes(view: DeviceView, **changes: dict[str, int]) -> DeviceView:
    """The view, with other leases, answers or demands of some tenants."""

    def changed(tenant: TenantView) -> TenantView:
        new = changes.get(tenant.name, {})
        answered = replace(tenant.counters, answered=new.get("answered", tenant.counters.answered))
        leased, demand = new.get("leased", tenant.leased), new.get("demand", tenant.demand)
        return replace(tenant, leased=leased, demand=demand, counters=answered)

    return replace(view, tenants=tuple(map(changed, view.tenants)))


def test_memory_of_a_sample_is_what_stands_on_the_ledger(ledger: _core.Ledger, history: History) -> None:
    chat, code = ledger.join("chat"), ledger.join("code")
    assert chat.lease(8 * MIB)
    assert chat.lease_static(4 * MIB)
    chat.publish(virtual_bytes=8 * MIB, used=3 * MIB, cached=2 * MIB, mapped_free=MIB, transit=2 * MIB)
    history.look([model_view("chat")])
    found = history.since(0)
    (sample,) = found["samples"]
    assert sample["devices"]["host"]["tenants"] == {"chat": (9 * MIB, 3 * MIB), "code": (0, 0)}
    (first, second) = found["devices"]["host"]["tenants"]
    assert (first["name"], first["held"], second["held"]) == ("chat", 12 * MIB, 0)
    assert sum(msgspec.to_builtins(first["parts"]).values()) == first["held"]
    for tenant in (chat, code):
        tenant.close()


def test_what_was_seen_is_not_sent_again_and_old_samples_go(
    history: History, ledger: _core.Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(5):
        history.look([])
    assert [sample["n"] for sample in history.since(0)["samples"]] == [1, 2, 3, 4, 5]
    assert [sample["n"] for sample in history.since(3)["samples"]] == [4, 5]
    assert history.since(5)["samples"] == []
    assert history.since(5)["n"] == 5
    for _ in range(module.KEPT):
        history.look([])
    assert len(history.since(0)["samples"]) == module.KEPT
    assert history.since(0)["samples"][0]["n"] == 6


def test_everything_is_json(ledger: _core.Ledger, history: History) -> None:
    tenant = ledger.join("chat")
    move = Move(State.STARTING, State.READY, "answers", 1.8e9, 3.0)
    history.look([model_view("chat", moves=(move,))])
    read = json.loads(msgspec.json.encode(history.since(0)))
    assert read["models"][0]["stats"]["ttft"] == {"p50": None, "p90": None, "p99": None, "count": 0}
    assert read["events"][0] | {"n": 1, "t": 1.8e9} == read["events"][0]
    assert read["devices"]["host"]["tenants"][0]["limit"] is None
    tenant.close()


def test_moves_are_told_once(history: History) -> None:
    first = Move(State.STOPPED, State.STARTING, "first request", 100.0, 5.0)
    second = Move(State.STARTING, State.READY, "answers", 101.0, 1.0)
    history.look([model_view("chat", moves=(first,))])
    history.look([model_view("chat", moves=(first, second))])
    history.look([model_view("chat", moves=(first, second))])
    events = history.since(0)["events"]
    assert [(event["origin"], event["to"], event["n"]) for event in events] == [
        ("stopped", "starting", 1),
        ("starting", "ready", 2),
    ]
    assert [event["n"] for event in history.since(1)["events"]] == [2]


def test_a_hand_over_has_givers_who_answered_and_takers(ledger: _core.Ledger) -> None:
    tenants = [ledger.join(name) for name in ("chat", "code", "mail")]
    view = read_device(ledger)
    before = with_changes(view, chat={"leased": 40 * MIB}, code={"leased": 10 * MIB})
    gave = with_changes(before, chat={"leased": 24 * MIB, "answered": 2}, code={"leased": 25 * MIB}, mail={"demand": 9})
    found = hand_over(before, gave)
    assert found is not None
    assert found.givers == {"chat": 16 * MIB}
    assert found.takers == {"code": 15 * MIB, "mail": 0}
    assert found.bytes == 16 * MIB
    # Memory that goes back with nobody asking is none, nor is an answer with nothing given.
    assert hand_over(before, with_changes(before, chat={"leased": 24 * MIB})) is None
    assert hand_over(before, with_changes(before, chat={"answered": 2})) is None
    # A tenant that started anew under the same name has given nothing.
    anew = replace(gave, tenants=tuple(replace(one, incarnation=one.incarnation + 1) for one in gave.tenants))
    assert hand_over(before, anew) is None
    for tenant in tenants:
        tenant.close()


def test_a_ledger_that_cannot_be_read_hides_no_other(
    directory: Path, ledger: _core.Ledger, history: History, caplog: pytest.LogCaptureFixture
) -> None:
    broken = directory / "GPU-broken.ledger"
    broken.write_bytes(b"x" * 4096)
    broken.chmod(0o600)
    history.look([])
    history.look([])
    found = history.since(0)
    assert found["devices"]["GPU-broken"] is None
    assert found["devices"]["host"]["capacity"] == CAPACITY
    assert [record.message for record in caplog.records if "no history of device" in record.message] == [
        caplog.records[0].message
    ]


def test_real_tenants_hand_memory_over(directory: Path, history: History) -> None:
    """One holds all as cached prefixes, the other wants half: seen by two looks."""
    import elastickv

    with (
        elastickv.open_device("host", capacity=CAPACITY, directory=str(directory)) as device,
        device.join("giver").cache(num_blocks=1024, block_bytes=64 * 1024) as giver,
        device.join("taker", give_back_wait=2000).cache(num_blocks=1024, block_bytes=64 * 1024) as taker,
    ):
        ids = giver.alloc(1000)
        assert ids is not None
        giver.free(ids, cached=True)
        history.look([])
        assert taker.alloc(512) is not None
        history.look([])
        (event,) = history.since(0)["events"]
        assert event["kind"] == "hand-over"
        assert event["givers"].keys() == {"giver"}
        assert event["takers"].keys() == {"taker"}
        assert event["bytes"] > 16 * MIB
