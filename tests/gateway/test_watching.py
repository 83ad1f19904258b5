"""The routes for those who watch: files and their headers, data, limits, and what is wrong with a request."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from subprocess import Popen
from typing import Any

import httpx
import pytest

from elastickv import _core
from elastickv.gateway import watching as module
from elastickv.gateway.auth import Keys
from elastickv.ledger import read_device
from gateway.page_server import ShownFleet, page_server
from gateway.raw_engine import wait_until
from gateway.views import model_view

MIB = 1 << 20
PAGE = Path(module.__file__).parent / "page"


@pytest.fixture
def client(directory: Path) -> Iterator[httpx.Client]:
    _core.Ledger.open(str(directory), "host", 64 * MIB)
    with page_server(directory, ShownFleet(model_view("chat"))) as (url, _), httpx.Client(base_url=url) as made:
        yield made


def test_every_file_of_the_page_is_served_and_may_only_use_this_gateway(client: httpx.Client) -> None:
    for name in ("", *(f"page/{path.name}" for path in PAGE.iterdir())):
        answer = client.get(f"/{name}")
        assert answer.status_code == 200, name
        policy = dict(part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";"))
        assert policy["default-src"] == "'none'"
        assert set(policy.values()) == {"'none'", "'self'"}
        assert policy["frame-ancestors"] == "'none'"
        assert answer.headers["x-content-type-options"] == "nosniff"
    assert client.get("/").content == (PAGE / "index.html").read_bytes()
    assert client.get("/page/app.js").headers["content-type"].startswith("text/javascript")


def test_the_page_names_no_other_place_and_needs_no_inline_code() -> None:
    for path in PAGE.iterdir():
        text = path.read_text(encoding="utf-8")
        places = set(re.findall(r"https?://[^\s\"'`<>)]+", text)) - {"http://www.w3.org/2000/svg"}
        assert places == set(), path.name
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text)
    page = (PAGE / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\son\w+=|\sstyle=", page)
    named = set(re.findall(r"(?:src|href)=\"/page/([^\"]+)\"", page))
    for script in PAGE.glob("*.js"):
        named |= set(re.findall(r"from \"\./([^\"]+)\"", script.read_text(encoding="utf-8")))
    assert named == {path.name for path in PAGE.iterdir()} - {"index.html"}


@pytest.mark.parametrize(
    "name", ["nothing.js", "../watching.py", "..%2fwatching.py", "%2e%2e/stats.py", "index.html%00"]
)
def test_no_other_file_is_served(client: httpx.Client, name: str) -> None:
    answer = client.get(f"/page/{name}")
    assert answer.status_code == 404
    assert "error" in answer.json()


def test_data_comes_once(client: httpx.Client) -> None:
    wait_until(lambda: bool(client.get("/admin/watch").json()["samples"]), "the first sample")
    first = client.get("/admin/watch").json()
    assert first["devices"]["host"]["capacity"] == 64 * MIB
    assert [model["name"] for model in first["models"]] == ["chat"]
    again = client.get("/admin/watch", params={"since": first["n"]}).json()
    assert again["run"] == first["run"]
    assert all(sample["n"] > first["n"] for sample in again["samples"])


@pytest.mark.parametrize("since", ["-1", "x", "1.5", "9" * 40, "٣٤"])
def test_a_number_that_is_none_is_told(client: httpx.Client, since: str) -> None:
    answer = client.get("/admin/watch", params={"since": since})
    assert answer.status_code == 400
    assert "the number of the last sample" in answer.json()["error"]["message"]


def order(client: httpx.Client, **body: Any) -> httpx.Response:
    return client.post("/admin/limit", json=body, timeout=30)


def test_a_limit_is_ordered_and_acknowledged(
    directory: Path, tenant: Callable[..., AbstractContextManager[Popen[str]]], client: httpx.Client
) -> None:
    ledger = _core.Ledger.open(str(directory), "host")
    with tenant("chat", blocks=10):
        answer = order(client, device="host", tenant="chat", limit="32MiB").json()
        assert (answer["state"], answer["wanted"]["bytes"]) == ("acknowledged", 32 * MIB)
        assert read_device(ledger).tenant("chat").limit_held == 32 * MIB
        assert order(client, device="host", tenant="chat", limit=None).json()["wanted"]["bytes"] is None
        assert read_device(ledger).tenant("chat").limit_held is None
        order(client, device="host", tenant="chat", limit=16 * MIB, now=True)
        assert read_device(ledger).tenant("chat").limit_wanted == 16 * MIB
    assert order(client, device="host", tenant="chat", limit="8MiB").json()["state"] == "kept"


def test_a_tenant_that_does_not_answer_is_pending(
    directory: Path, client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LIMIT_WAIT_S", 0.1)
    silent = _core.Ledger.open(str(directory), "host").join("silent")
    assert order(client, device="host", tenant="silent", limit="8MiB").json()["state"] == "pending"
    silent.close()


@pytest.mark.parametrize(
    ("status", "body", "text"),
    [
        (404, {"device": "GPU-9", "tenant": "chat", "limit": 1}, "there are: host"),
        (404, {"device": "../host", "tenant": "chat", "limit": 1}, "there are: host"),
        (404, {"device": "host", "tenant": "nobody", "limit": 1}, "no tenant named 'nobody'"),
        (400, {"device": "host", "tenant": "chat", "limit": "lots"}, "is not a size"),
        (400, {"device": "host", "tenant": "chat", "limit": -5}, "give 0 or more"),
        (400, {"device": "host", "tenant": "chat", "limit": 1 << 80}, "limit"),
        (400, {"device": "host", "tenant": "chat"}, "limit"),
        (400, {"device": "host", "tenant": "chat", "limit": 1, "more": 1}, "more"),
        (400, [], "no order of a limit"),
    ],
)
def test_what_is_wrong_with_an_order_is_told(client: httpx.Client, status: int, body: Any, text: str) -> None:
    answer = client.post("/admin/limit", json=body)
    assert (answer.status_code, text in answer.json()["error"]["message"]) == (status, True), answer.text


@pytest.mark.parametrize("body", [b"", b"{", b"\xff\xfe", b"[" * 20000, b'"' + b"x" * 100_000])
def test_bodies_that_are_no_json(client: httpx.Client, body: bytes) -> None:
    answer = client.post("/admin/limit", content=body, headers={"content-type": "application/json"})
    assert answer.status_code in (400, 413), answer.text
    assert "error" in json.loads(answer.text)


def test_data_and_orders_need_the_admin_key_and_the_page_does_not(directory: Path) -> None:
    keys = Keys.of(admin="correct-battery")
    with page_server(directory, ShownFleet(), keys=keys) as (url, _):
        assert httpx.get(f"{url}/").status_code == 200
        assert httpx.get(f"{url}/page/app.js").status_code == 200
        assert httpx.get(f"{url}/admin/watch").status_code == 401
        assert httpx.post(f"{url}/admin/limit", json={}).status_code == 401
        good = {"authorization": "Bearer correct-battery"}
        assert httpx.get(f"{url}/admin/watch", headers=good).status_code == 200


def test_metrics_have_requests_models_and_ledgers(client: httpx.Client) -> None:
    text = client.get("/metrics").text
    assert 'elastickv_gateway_state{model="chat",state="ready"} 1.0' in text
    assert 'elastickv_device_capacity_bytes{device="host"}' in text
