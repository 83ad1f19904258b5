"""Who may do what."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from elastickv.errors import AccessDenied, ConfigError
from elastickv.gateway.auth import Keys, is_loopback, load_keys
from gateway.front import Front, Limits
from gateway.raw_engine import RawEngine

CLIENT, OTHER, ADMIN = "client-key-1", "client-key-2", "admin-key-1"
KEYS = Keys.of([CLIENT, OTHER], ADMIN)
JSON = {"content-type": "application/json"}


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


@pytest.fixture
def engine() -> Iterator[RawEngine]:
    with RawEngine() as engine:
        yield engine


def ask(front: Front, path: str, method: str = "GET", **more: object) -> httpx.Response:
    return httpx.request(method, front.url + path, **more)  # type: ignore[arg-type]


def test_models_need_a_client_key_and_their_lives_the_admin_key(engine: RawEngine) -> None:
    with Front(keys=KEYS, limits=Limits(keys_are_ours=True)) as front:
        front.add("chat", engine.url)
        for path in ("/health", "/ready", "/openapi.json"):
            assert ask(front, path).status_code == 200
        for key, client, admin in ((None, 401, 401), (CLIENT, 200, 401), (OTHER, 200, 401), (ADMIN, 200, 200)):
            headers = bearer(key) if key else {}
            assert ask(front, "/v1/models", headers=headers).status_code == client
            body = {"model": "chat"}
            assert ask(front, "/v1/completions", "POST", json=body, headers=headers).status_code == client
            assert ask(front, "/admin/models", headers=headers).status_code == admin
        for wrong in ("client-key", CLIENT + "x", "\u00e9"):
            answer = httpx.get(f"{front.url}/v1/models", headers={"authorization": f"Bearer {wrong}".encode()})
            assert answer.status_code == 401
            assert answer.headers["www-authenticate"] == "Bearer"
            assert answer.json()["error"]["type"] == "authentication_error"
    assert all(request.header(b"authorization") is None for request in engine.requests), "no engine learns our keys"


def test_what_is_not_there_is_no_way_around_the_keys() -> None:
    with Front(keys=KEYS) as front:
        front.add("chat", "http://127.0.0.1:1")
        for path in ("/v1/x", "//v1/models", "/V1/models", "/admin", "/admin/", "/admin/models/", "/metrics", "/page"):
            assert ask(front, path).status_code == 401, path
        for path in ("/v1%2Fmodels", "/%61dmin/models", "/page/../admin/models", "/page/%2e%2e/admin/models"):
            assert ask(front, path).status_code in (401, 404), path


def test_without_an_admin_key_foreign_pages_cannot_use_the_visitors_browser() -> None:
    with Front() as front:
        front.add("chat", "http://127.0.0.1:1")
        own = {"host": f"127.0.0.1:{front.port}"}

        def sleep(**headers: str) -> int:
            chosen = {key.replace("_", "-"): value for key, value in headers.items()}
            return ask(front, "/admin/models/chat/sleep", "POST", content=b"{}", headers=chosen).status_code

        assert sleep(**own, content_type="application/json") == 200
        assert sleep(**own, content_type="application/json; charset=utf-8", origin=f"http://{own['host']}") == 200
        assert sleep(**own, content_type="text/plain") == 403
        assert sleep(**own, content_type="application/json", origin="http://evil.example") == 403
        assert sleep(**own, content_type="application/json", origin="http://[") == 403
        assert sleep(host=f"evil.example:{front.port}", content_type="application/json") == 403
        assert ask(front, "/admin/models", headers={"host": "evil.example"}).status_code == 403
        assert ask(front, "/admin/models", headers={"host": "localhost"}).status_code == 200
        assert front.fleet.calls == [("sleep", "chat")] * 2


def test_no_admin_without_a_key_where_others_can_reach_it() -> None:
    with Front(host="0.0.0.0") as front:
        answer = ask(front, "/admin/models", headers={"host": "localhost"})
        assert answer.status_code == 403
        assert answer.json()["error"]["code"] == "no_admin_key"
        assert ask(front, "/v1/models").status_code == 200


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        *(("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("[::1]", True), ("localhost", True)),
        *(("0.0.0.0", False), ("::", False), ("", False), ("192.0.2.1", False), ("localhost.example", False)),
    ],
)
def test_what_is_this_machine_only(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback


def test_keys_come_from_files_that_nobody_else_may_read(tmp_path: Path) -> None:
    clients, admin = tmp_path / "clients", tmp_path / "admin"
    clients.write_text(f"# one a line\n{CLIENT}\n\n  {OTHER}  # of the other\n")
    admin.write_text(ADMIN + "\n")
    for path in (clients, admin):
        path.chmod(0o600)
    assert load_keys(str(clients), str(admin)) == KEYS
    assert load_keys(None, None, f"{CLIENT}, {OTHER}", ADMIN) == KEYS
    assert load_keys(None, None) == Keys()
    clients.chmod(0o640)
    with pytest.raises(AccessDenied, match=r"chmod 600"):
        load_keys(str(clients), None)


def test_bad_keys_are_refused_without_being_shown(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.write_text("# nothing\n")
    empty.chmod(0o600)
    for file, clients, admin in (
        (str(empty), "", ""),
        (str(tmp_path / "none"), "", ""),
        (None, "secret", ""),
        (None, "", "two words of it"),
    ):
        with pytest.raises(ConfigError) as caught:
            load_keys(file, None, clients, admin)
        assert "secret" not in caught.value.message
        assert "two words" not in caught.value.message
    with pytest.raises(ConfigError, match="more than one admin key"):
        load_keys(None, str(_file(tmp_path, "admin-key-9")), "", ADMIN)
    assert ADMIN not in repr(KEYS)


def _file(folder: Path, key: str) -> Path:
    path = folder / "admin"
    path.write_text(key)
    path.chmod(0o600)
    return path
