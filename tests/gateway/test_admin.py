"""The admin API and what the gateway says of itself."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from elastickv.errors import Unavailable
from elastickv.gateway.states import State
from gateway.front import Front


@pytest.fixture
def front() -> Iterator[Front]:
    with Front() as front:
        front.add("chat", "http://127.0.0.1:1")
        yield front


@pytest.fixture
def client(front: Front) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=front.url, headers={"content-type": "application/json"}) as client:
        yield client


def test_models_are_listed_shown_added_and_removed(front: Front, client: httpx.Client) -> None:
    added = client.post("/admin/models", json={"name": "code", "address": ["http://127.0.0.1:2"], "queue": 3})
    assert added.status_code == 201
    assert front.fleet.known["code"].spec.queue == 3
    assert added.json() == client.get("/admin/models/code").json()
    assert [model["name"] for model in client.get("/admin/models").json()["models"]] == ["chat", "code"]
    assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["chat", "code"]
    assert client.get("/v1/models/code").json()["state"] == "ready"
    assert client.request("DELETE", "/admin/models/code").json()["name"] == "code"
    assert client.get("/admin/models/code").status_code == 404
    assert client.get("/v1/models/code").status_code == 404


def test_sleep_and_wake(front: Front, client: httpx.Client) -> None:
    assert client.post("/admin/models/chat/sleep", content=b"{}").json()["state"] == "asleep"
    assert client.post("/admin/models/chat/wake").json()["state"] == "ready"
    front.fleet.known["chat"].error = Unavailable("no memory")
    answer = client.post("/admin/models/chat/wake")
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "7"
    assert client.post("/admin/models/nobody/wake").status_code == 404


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"[]", 400),
        (b"\xff", 400),
        (b"{}", 400),
        (b'{"name": "x"}', 400),
        (b'{"name": "x", "path": "/x", "colour": 1}', 400),
        (b'{"name": "no spaces", "path": "/x"}', 400),
        (b'{"name": "chat", "path": "/x"}', 409),
        (b'{"name": "' + b"x" * 100_000 + b'"}', 413),
    ],
)
def test_bad_bodies_change_nothing(front: Front, client: httpx.Client, body: bytes, status: int) -> None:
    answer = client.post("/admin/models", content=body)
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["message"]
    assert list(front.fleet.known) == ["chat"]


def test_health_ready_and_what_is_not_there(front: Front, client: httpx.Client) -> None:
    assert client.get("/health").json() == {"status": "ok"}
    assert client.get("/ready").status_code == 200
    front.fleet.known["chat"].state = State.STARTING
    assert client.get("/ready").status_code == 503
    assert client.get("/ready").json()["models"] == {"chat": "starting"}
    missing = client.get("/nothing")
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "not_found"
    wrong = client.delete("/health")
    assert wrong.status_code == 405
    assert wrong.json()["error"]["code"] == "method_not_allowed"
    assert "GET" in wrong.headers["allow"]
