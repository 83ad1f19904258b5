"""Clients that are slow, broken or worse: they get an answer that is documented or none, and others are served."""

from __future__ import annotations

import gc
import random
import resource
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, settings

from elastickv.gateway.openapi import document
from elastickv.gateway.server import allow_descriptors
from gateway.front import Front, Limits, WireLimits
from gateway.raw_engine import RawEngine, event, stream, wait_until

WIRE = WireLimits(connections=200, header_bytes=8192, header_s=0.4, idle_s=0.6, unread_s=0.5)
DOCUMENTED = {200, 201, 400, 401, 403, 404, 405, 408, 409, 413, 431, 502, 503}
BODY = b'{"model":"chat"}'
REQUEST = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(BODY) + BODY


@pytest.fixture(scope="module")
def engine() -> Iterator[RawEngine]:
    with RawEngine() as engine:
        yield engine


@pytest.fixture(scope="module")
def front(engine: RawEngine) -> Iterator[Front]:
    with Front(wire=WIRE, limits=Limits(max_body=100_000, body_s=0.5)) as front:
        front.add("chat", engine.url, queue_deadline=2)
        yield front


@pytest.fixture(autouse=True)
def nothing_leaks(front: Front, engine: RawEngine) -> Iterator[None]:
    """Each test leaves a gateway that serves, without a task or a descriptor more than before."""
    served(front)
    front.quiet()
    wait_until(lambda: not front.server.server_state.connections, "no connection")
    before = descriptors()
    yield
    served(front)
    front.quiet()
    wait_until(lambda: not front.server.server_state.connections, "no connection is left")
    model = front.fleet.known["chat"]
    assert [one.outstanding for one in model.replicas] == [0]
    # A connection to the engine may be kept for the next request.
    wait_until(lambda: gc.collect() >= 0 and descriptors() <= before + 2, "descriptors are closed")
    assert not [status for status in front.recorded.statuses() if status == 500]


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def served(front: Front) -> None:
    assert httpx.post(f"{front.url}/v1/completions", content=BODY).status_code == 200


def answer(connection: socket.socket) -> bytes:
    """Everything until the gateway closes."""
    found = b""
    with suppress(ConnectionResetError):
        while part := connection.recv(65536):
            found += part
    return found


def status_of(found: bytes) -> int:
    return int(found.split(b" ", 2)[1])


def test_half_headers_are_answered_with_408_and_silence_is_closed(front: Front) -> None:
    with front.connect() as silent, front.connect() as half, front.connect() as dripping:
        half.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nX-Half")
        until = time.monotonic() + 20
        with suppress(OSError):
            while time.monotonic() < until:
                dripping.sendall(b"GET / HTTP/1.1\r\n"[:1])
                served(front)
                time.sleep(0.02)
        assert time.monotonic() < until, "a client that drips is cut off"
        assert status_of(answer(half)) == 408
        assert answer(silent) == b""


def test_headers_are_bounded_in_size(front: Front) -> None:
    for head in (
        b"GET / HTTP/1.1\r\nX-Long: " + b"x" * 20_000,
        b"GET /" + b"x" * 20_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"".join(b"X-%d: y\r\n" % n for n in range(2000)) + b"\r\n",
    ):
        with front.connect() as connection:
            with suppress(OSError):
                connection.sendall(head)
            found = answer(connection)
            assert not found or status_of(found) == 431


def test_a_body_that_does_not_end_is_given_up(front: Front) -> None:
    with front.connect() as connection:
        connection.sendall(REQUEST[:-3])
        assert status_of(answer(connection)) == 408


def test_giant_bodies_are_refused_before_they_have_come(front: Front) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 10000000000\r\n\r\n"
    with front.connect() as connection:
        connection.sendall(head + b"x" * 10_000)
        assert status_of(connection.recv(65536)) == 413
        sent = 0
        with suppress(OSError):
            while sent < 10_000_000_000:
                sent += connection.send(b"x" * 1_000_000)
                time.sleep(0.01)
        assert sent < 1_000_000_000
    with front.connect() as connection:
        connection.sendall(head.replace(b"Content-Length: 10000000000", b"Transfer-Encoding: chunked"))
        with suppress(OSError):
            for _ in range(200):
                connection.sendall(b"400\r\n" + b"x" * 1024 + b"\r\n")
        assert status_of(connection.recv(65536)) == 413


def test_a_client_that_reads_nothing_is_cut_off_and_its_request_ends(front: Front, engine: RawEngine) -> None:
    parts = [event({"text": "x" * 60_000})] * 5000  # far more than the buffers of four sockets hold
    engine.replies[b"/v1/completions"] = stream(*parts)
    try:
        with front.connect() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            before = len(engine.requests)
            connection.sendall(REQUEST)
            engine.wait_for_requests(before + 1)
            assert engine.requests[before].gone.wait(20)
    finally:
        del engine.replies[b"/v1/completions"]


def test_pipelined_requests_are_answered_in_order_and_nonsense_behind_them_ends_it(front: Front) -> None:
    with front.connect() as connection:
        connection.sendall(REQUEST * 3)
        found = b""
        while found.count(b'{"ok": true}') < 3:
            part = connection.recv(65536)
            assert part, found
            found += part
        assert found.count(b"HTTP/1.1 200 ") == 3
    with front.connect() as connection:
        connection.sendall(REQUEST + b"\x16\x03\x01 what is this\r\n\r\n" + REQUEST)
        found = answer(connection)
        assert found.count(b"HTTP/1.1 ") <= 2


@pytest.mark.parametrize(
    "sent",
    [
        b"\r\n\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET / HTTP/2.0\r\n\r\nPRI * HTTP/2.0\r\n\r\n",
        b"BREW /v1/completions HTTP/1.1\r\nHost: x\r\n\r\n",
        b"CONNECT example.org:443 HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET http://[::1 HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /\xff\xfe HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /%ff%fe/%00 HTTP/1.1\r\nHost: x\r\n\r\n",
        b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\nhello",
        b"POST /v1/completions HTTP/1.1\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nX-Bad: \xff\xfe\r\nContent-Length: 16\r\n\r\n" + BODY,
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nX-TTFT-Target-Ms: nan\r\nContent-Length: 16\r\n\r\n" + BODY,
        b"GET /v1/models HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
        b"POST /v1/audio/transcriptions HTTP/1.1\r\nContent-Type: multipart/form-data; boundary=b\r\n"
        b"Content-Length: 13\r\n\r\n--b\r\n:::\xff\r\n--",
        b"POST /v1/audio/transcriptions HTTP/1.1\r\nContent-Type: multipart/form-data\r\nContent-Length: 2\r\n\r\n{}",
    ],
)
def test_nonsense_gets_a_documented_answer(front: Front, sent: bytes) -> None:
    with front.connect() as connection:
        connection.sendall(sent)
        connection.shutdown(socket.SHUT_WR)
        found = answer(connection)
    if found:
        assert status_of(found) in DOCUMENTED, found[:300]


def test_random_changes_to_a_request_do_no_harm(front: Front) -> None:
    chance = random.Random(7)
    whole = (
        b"POST /v1/completions?a=b HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"X-TTFT-Target-Ms: 50\r\nConnection: close\r\nContent-Length: 16\r\n\r\n" + BODY
    )
    for _ in range(300):
        changed = bytearray(whole)
        for _ in range(chance.randint(1, 4)):
            place = chance.randrange(len(changed))
            what = chance.randrange(3)
            if what == 0:
                changed[place] = chance.randrange(256)
            elif what == 1:
                del changed[place : place + chance.randint(1, 8)]
            else:
                changed[place:place] = chance.randbytes(chance.randint(1, 8))
        with front.connect() as connection:
            connection.sendall(bytes(changed))
            connection.shutdown(socket.SHUT_WR)
            found = answer(connection)
        if found:
            assert status_of(found) in DOCUMENTED, (bytes(changed), found[:300])


def test_more_connections_than_may_be_are_told_so_and_room_comes_back(front: Front) -> None:
    with ExitStack() as stack:
        held = [stack.enter_context(front.connect()) for _ in range(WIRE.connections)]
        wait_until(lambda: len(front.server.server_state.connections) >= WIRE.connections, "all are connected")
        over = stack.enter_context(front.connect())
        found = answer(over)
        assert found == b"" or status_of(found) == 503
        del held
    wait_until(lambda: not front.server.server_state.connections, "all are gone")


def test_many_slow_clients_do_not_slow_the_others(front: Front) -> None:
    with ExitStack() as stack:
        for _ in range(100):
            slow = stack.enter_context(front.connect())
            slow.sendall(REQUEST[: random.Random(1).randrange(20, 60)])
        for _ in range(20):
            served(front)


SCHEMA = schemathesis.openapi.from_dict(document())


@SCHEMA.parametrize()
@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
def test_requests_made_from_the_openapi_document(case: schemathesis.Case, front: Front) -> None:
    found = case.call(base_url=front.url)
    assert found.status_code in DOCUMENTED
    if found.status_code >= 400:
        case.validate_response(found, checks=[schemathesis.checks.response_schema_conformance])


def test_the_limit_of_open_files_is_raised_as_far_as_it_may_be(caplog: pytest.LogCaptureFixture) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(900, before[1]), before[1]))
        allow_descriptors(400)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= min(1056, before[1])
        allow_descriptors(10**8)
        assert "raise the limit" in caplog.text or before[1] > 2 * 10**8
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
