"""Requests go to the engine of their model, and bytes pass untouched in both directions."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import time
from collections.abc import Iterator

import httpx
import pytest
from starlette.types import Message, Receive

from elastickv.gateway.body import BodyMemory, ClientGone, read_body
from elastickv.gateway.errors import Refused
from gateway.front import Front, Limits
from gateway.raw_engine import RawEngine, Request, as_json, chunk, die, event, hang, stream, wait_until, whole

COMPLETIONS = b"/v1/completions"
BODY = {"model": "chat", "prompt": "hello", "stream": True}


@pytest.fixture
def engine() -> Iterator[RawEngine]:
    with RawEngine() as engine:
        yield engine


@pytest.fixture
def front(engine: RawEngine) -> Iterator[Front]:
    with Front() as front:
        front.add("chat", engine.url)
        yield front


def exchange(front: Front, request: bytes) -> bytes:
    """Raw bytes there, and everything that comes until the gateway closes."""
    with front.connect() as connection:
        connection.sendall(request)
        answer = b""
        while part := connection.recv(65536):
            answer += part
    return answer


def post(body: bytes, path: bytes = COMPLETIONS, more: bytes = b"") -> bytes:
    head = b"POST " + path + b" HTTP/1.1\r\nHost: gateway\r\nConnection: close\r\n" + more
    return head + b"Content-Length: %d\r\n\r\n" % len(body) + body


def test_body_and_headers_reach_the_engine_as_they_were_sent(front: Front, engine: RawEngine) -> None:
    body = b'{ "prompt":"\\u00e9 \xc3\xa9",\t"x":NaN,  "model" : "chat" , "model":"chat"}\n'
    more = (
        b"X-One: a\r\nX-One: b\r\nX-Text: caf\xc3\xa9\r\nAuthorization: Bearer mine\r\nAccept: */*\r\n"
        b"Keep-Alive: 3\r\nTE: trailers\r\nX-Gone: 1\r\n"
    ).replace(b"X-Gone", b"X-Hop")
    more += b"Connection: x-hop\r\nContent-Type: application/json\r\n"
    exchange(front, post(body, b"/v1/completions?a=%2Fb&c=d+e", more))
    (request,) = engine.requests
    assert request.body == body
    assert request.target == b"/v1/completions?a=%2Fb&c=d+e"
    headers = [(name.lower(), value) for name, value in request.headers]
    assert [value for name, value in headers if name == b"x-one"] == [b"a", b"b"]
    assert request.header(b"x-text") == b"caf\xc3\xa9"
    assert request.header(b"authorization") == b"Bearer mine"
    names = {name for name, _ in headers}
    assert names == {b"host", b"x-one", b"x-text", b"authorization", b"accept", b"content-type", b"content-length"}


def test_status_headers_and_body_come_back_as_the_engine_sent_them(front: Front, engine: RawEngine) -> None:
    odd = bytes(range(256)) * 40
    headers = b"Content-Type: image/odd\r\nX-Two: 1\r\nX-Two: 2\r\nContent-Encoding: gzip\r\nServer: engine\r\n"
    hop = b"Keep-Alive: timeout=5\r\nConnection: keep-alive\r\n"
    engine.default = whole(odd, b"418 I'm a teapot", headers + hop)
    head, _, body = exchange(front, post(b'{"model":"chat"}')).partition(b"\r\n\r\n")
    assert body == odd
    lines = head.lower().split(b"\r\n")
    assert lines[0].startswith(b"http/1.1 418 ")
    assert set(lines[1:]) == {
        *(b"content-type: image/odd", b"x-two: 1", b"x-two: 2", b"content-encoding: gzip", b"server: engine"),
        *(b"content-length: %d" % len(odd), b"connection: close"),
    }


def test_a_large_answer_without_a_length_comes_whole(front: Front, engine: RawEngine) -> None:
    data = bytes(range(251)) * 20_000

    async def reply(engine: RawEngine, request: Request, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: x/y\r\ntransfer-encoding: chunked\r\n\r\n")
        for start in range(0, len(data), 100_000):
            writer.write(chunk(data[start : start + 100_000]))
            await writer.drain()
        writer.write(b"0\r\n\r\n")

    engine.default = reply
    assert httpx.post(f"{front.url}/v1/completions", json=BODY).content == data


def test_each_chunk_of_a_stream_is_passed_on_before_the_next_one_exists(front: Front, engine: RawEngine) -> None:
    engine.free_running = False
    engine.default = stream(event({"n": 1}), b": ping\n\n", event({"n": 3}))
    with httpx.stream("POST", f"{front.url}/v1/completions", json=BODY, timeout=20) as answer:
        parts = answer.iter_raw()
        for wanted in (event({"n": 1}), b": ping\n\n", event({"n": 3})):
            assert next(parts) == wanted
            engine.step()
        assert list(parts) == []
    front.quiet()
    assert front.recorded.firsts[0][0] == "chat"
    ((name, seconds, tokens, status, decode),) = front.recorded.ends
    assert (name, tokens, status) == ("chat", 2, 200)
    assert 0 < decode < seconds


def test_the_engines_count_of_tokens_is_believed_even_across_two_chunks(front: Front, engine: RawEngine) -> None:
    usage = event({"choices": [], "usage": {"completion_tokens": 777}})
    text = event({"choices": [{"text": '"completion_tokens": 5'}]})
    half = usage.index(b"777") - 5
    engine.default = stream(text, usage[:half], usage[half:])
    httpx.post(f"{front.url}/v1/completions", json=BODY)
    front.quiet()
    assert front.recorded.ends[0][2] == 777


def test_a_model_is_found_in_forms_and_in_the_query(front: Front, engine: RawEngine) -> None:
    sound = bytes(range(256)) * 100
    httpx.post(
        f"{front.url}/v1/audio/transcriptions", data={"language": "de", "model": "chat"}, files={"file": ("a", sound)}
    )
    httpx.get(f"{front.url}/v1/responses/7", params={"model": "chat"})
    assert sound in engine.requests[0].body
    assert (engine.requests[0].header(b"content-type") or b"").startswith(b"multipart/form-data; boundary=")
    assert engine.requests[1].target == b"/v1/responses/7?model=chat"


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"", 400, "missing_model"),
        (b"{}", 400, "missing_model"),
        (b'{"model": 7}', 400, "invalid_model"),
        (b'{"model": ""}', 400, "invalid_model"),
        (b"[1]", 400, "invalid_json"),
        (b'{"model": "chat"', 400, "invalid_json"),
        (b'{"model": "\xff\xfe"}', 400, "invalid_json"),
        (b"[" * 100_000, 400, "invalid_json"),
        (b'{"model": "nobody"}', 404, "model_not_found"),
    ],
)
def test_what_cannot_be_routed_is_refused_in_openais_form(
    front: Front, engine: RawEngine, body: bytes, status: int, code: str
) -> None:
    answer = httpx.post(f"{front.url}/v1/completions", content=body)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code
    assert engine.requests == []


def test_nothing_but_the_engines_api_can_be_reached(front: Front, engine: RawEngine) -> None:
    for path in (b"/v1/../sleep", b"/v1/%2e%2e/sleep", b"/v1/x/%2e%2e/%2e%2e/sleep", b"/sleep", b"/v2/x"):
        assert exchange(front, post(b'{"model":"chat"}', path)).startswith(b"HTTP/1.1 404")
    assert engine.requests == []


@pytest.mark.parametrize("streamed", [True, False])
def test_a_client_that_leaves_takes_its_request_along(front: Front, engine: RawEngine, streamed: bool) -> None:
    engine.default = stream(event({"n": 1}), then="hang") if streamed else hang
    connection = front.connect()
    connection.sendall(post(json.dumps(BODY).encode()))
    engine.wait_for_requests(1)
    if streamed:
        wait_until(lambda: b'"n": 1' in connection.recv(4096), "the first event")
    connection.close()
    assert engine.requests[0].gone.wait(20)
    front.quiet()
    assert front.recorded.statuses() == [499]
    assert front.fleet.known["chat"].replicas[0].outstanding == 0
    wait_until(lambda: engine.open == 0, "the connection to the engine is closed")


def test_an_engine_that_dies_in_a_stream_ends_it_with_an_error_event(front: Front, engine: RawEngine) -> None:
    engine.default = stream(event({"n": 1}), then="die")
    with httpx.stream("POST", f"{front.url}/v1/completions", json=BODY, timeout=20) as answer:
        text = "".join(answer.iter_text())
    first, error, done = text.strip().split("\n\n")
    assert json.loads(first[6:]) == {"n": 1}
    assert json.loads(error[6:])["error"]["code"] == "engine_failed"
    assert done == "data: [DONE]"
    front.quiet()
    assert front.recorded.statuses() == [502]


def test_an_engine_that_dies_within_an_event_leaves_an_answer_that_is_visibly_incomplete(
    front: Front, engine: RawEngine
) -> None:
    engine.default = stream(event({"n": 1}) + b'data: {"n"', then="die")
    with pytest.raises(httpx.RemoteProtocolError):
        httpx.post(f"{front.url}/v1/completions", json=BODY)


def test_a_request_goes_to_another_replica_if_the_first_one_dies_over_it(front: Front, engine: RawEngine) -> None:
    with RawEngine(die) as dying:
        model = front.add("pair", dying.url, engine.url)
        answer = httpx.post(f"{front.url}/v1/completions", json={"model": "pair"})
    assert answer.json() == {"ok": True}
    assert len(dying.requests) == 1
    assert [url for url, _ in model.failed] == [dying.url]
    assert [one.outstanding for one in model.replicas] == [0, 0]


def test_a_request_that_kills_engines_is_given_up_with_502(front: Front, engine: RawEngine) -> None:
    engine.default = die
    answer = httpx.post(f"{front.url}/v1/completions", json=BODY)
    assert answer.status_code == 502
    assert answer.json()["error"]["code"] == "engine_failed"
    assert len(engine.requests) == 2


def test_an_incomplete_answer_with_a_length_is_a_failure_not_an_answer(front: Front, engine: RawEngine) -> None:
    async def reply(engine: RawEngine, request: Request, writer: asyncio.StreamWriter) -> None:
        writer.write(b'HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 20\r\n\r\n{"o')
        await writer.drain()
        writer.transport.abort()

    engine.default = reply
    assert httpx.post(f"{front.url}/v1/completions", json=BODY).status_code == 502


def test_a_request_waits_while_nothing_listens(front: Front) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    model = front.add("late", f"http://127.0.0.1:{port}", queue_deadline=0.6)
    began = time.monotonic()
    answer = httpx.post(f"{front.url}/v1/completions", json={"model": "late"}, timeout=30)
    assert answer.status_code in (502, 503)
    assert time.monotonic() - began >= 0.5
    assert model.failed


def test_bodies_are_bounded(engine: RawEngine) -> None:
    with Front(limits=Limits(max_body=1000, body_s=0.3)) as front:
        front.add("chat", engine.url)
        fits = b'{"model":"chat","x":"' + b"y" * 970 + b'"}'
        with httpx.Client() as client:  # far more than 64 bodies, which is what may be held at a time
            for _ in range(80):
                assert client.post(f"{front.url}/v1/completions", content=fits).status_code == 200
        assert httpx.post(f"{front.url}/v1/completions", content=fits + b" " * 40).status_code == 413
        parts = (b"y" * 100 for _ in range(30))
        assert httpx.post(f"{front.url}/v1/completions", content=parts).status_code == 413
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 30\r\n\r\n{"
        assert b" 408 " in exchange(front, head)[:20]


def test_an_engines_own_error_is_passed_on(front: Front, engine: RawEngine) -> None:
    engine.default = as_json({"error": {"message": "too long", "code": 400}}, b"400 Bad Request")
    answer = httpx.post(f"{front.url}/v1/completions", json=BODY)
    assert answer.status_code == 400
    assert answer.json() == {"error": {"message": "too long", "code": 400}}
    front.quiet()
    assert front.recorded.statuses() == [400]


def test_what_bodies_hold_in_memory_is_bounded_and_comes_back() -> None:
    def arriving(*messages: dict[str, object]) -> Receive:
        parts = iter(messages)

        async def receive() -> Message:
            try:
                return next(parts)
            except StopIteration:
                await asyncio.sleep(20)
                raise

        return receive

    async def read(most: int, *messages: dict[str, object]) -> bytes:
        return await read_body(arriving(*messages), [], most, 0.05, memory)

    memory = BodyMemory(100)
    part = {"type": "http.request", "body": b"x" * 60, "more_body": True}
    last = {"type": "http.request", "body": b"y", "more_body": False}
    assert len(asyncio.run(read(80, part, last))) == 61
    assert memory.held == 61
    for most, messages, status in ((80, [part], 503), (10, [last, last], 408), (10, [part], 413)):
        endless = [{**one, "more_body": True} for one in messages]
        with pytest.raises(Refused) as caught:
            asyncio.run(read(most, *endless))
        assert caught.value.status == status
    with pytest.raises(ClientGone):
        asyncio.run(read(80, {**last, "more_body": True}, {"type": "http.disconnect"}))
    assert memory.held == 61


@pytest.mark.parametrize("asked", [False, True])
def test_no_text_of_a_request_is_logged_unless_asked_for(
    engine: RawEngine, caplog: pytest.LogCaptureFixture, asked: bool
) -> None:
    caplog.set_level(logging.DEBUG)
    with Front(limits=Limits(log_requests=asked)) as front:
        front.add("chat", engine.url)
        for body in (BODY | {"prompt": "my secret"}, {"model": "nobody", "prompt": "my secret"}):
            httpx.post(f"{front.url}/v1/completions", json=body)
        httpx.post(f"{front.url}/v1/completions", content=b'{"model": "chat", "my secret"')
        engine.default = die
        httpx.post(f"{front.url}/v1/completions", json=BODY | {"prompt": "my secret"})
        front.quiet()
    assert ("my secret" in caplog.text) is asked
