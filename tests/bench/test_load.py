"""The load client against servers that answer, refuse, come short, hang and die: every request is accounted for."""

from __future__ import annotations

import json
import math
import multiprocessing
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest

from benchmarks.common import load, schedule
from benchmarks.common.load import Background, Form, Load
from benchmarks.common.result import ROOT, Row, Target
from benchmarks.common.schedule import Shape
from benchmarks.common.senders import Senders
from benchmarks.common.servers import ended
from benchmarks.common.stats import percentile
from elastickv.demo.engines import free_port

SHAPE = Shape(4, 3)


def event(*tokens: int) -> bytes:
    return f"data: {json.dumps({'choices': [{'index': 0, 'text': '', 'token_ids': list(tokens)}]})}\n\n".encode()


def generated(*tokens: int) -> bytes:
    """As SGLang's /generate says it."""
    return f"data: {json.dumps({'output_ids': list(tokens), 'meta_info': {'id': 'a'}})}\n\n".encode()


HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n"
ANSWERS: dict[str, list[bytes | float]] = {
    "fine": [HEAD, event(1), 0.05, event(2, 3), b"data: [DONE]\n\n"],
    "split in the middle of a line": [HEAD, event(1)[:9], 0.02, event(1)[9:] + event(2), event(3)[:-1], event(3)[-1:]],
    "short": [HEAD, event(1), event(2)],
    "refused": [b"HTTP/1.1 400 Bad Request\r\ncontent-length: 4\r\nconnection: close\r\n\r\nfull"],
    "an error in the stream": [HEAD, event(1), b'data: {"error": "out of luck"}\n\n'],
    "garbage": [HEAD, b"data: {nonsense\n\n"],
    "not what was asked": [HEAD, b'data: {"choices": [{"index": 0}]}\n\n'],
    "silence": [HEAD, event(1), 30.0],
    "nothing": [],
    "generated": [HEAD, generated(1), 0.05, generated(2, 3), b"data: [DONE]\n\n"],
    "generated, with an error": [HEAD, generated(1), b'data: {"error": {"message": "out of luck"}}\n\n'],
}


@contextmanager
def server(answer: list[bytes | float]) -> Iterator[str]:
    """Gives the same answer to every request: bytes are sent, numbers are seconds to wait."""
    stop = threading.Event()

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            length = 0
            while (line := self.rfile.readline().strip()) != b"":
                if line.lower().startswith(b"content-length:"):
                    length = int(line.partition(b":")[2])
            self.rfile.read(length)
            with suppress(BrokenPipeError, ConnectionResetError):
                for part in answer:
                    if isinstance(part, float):
                        stop.wait(part)
                    else:
                        self.wfile.write(part)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as listening:
        thread = threading.Thread(target=listening.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.server_address[1]}"
        finally:
            stop.set()
            listening.shutdown()
            thread.join(20)


def ask(
    url: str, arrivals: list[float], deadline: float = 20.0, form: Form = "completions", processes: int = 1
) -> Load:
    return load.run(load.requests(url, "m", arrivals, SHAPE, 256, seed=0, form=form), deadline, processes)


def form_of(kind: str) -> Form:
    return "generate" if kind.startswith("generated") else "completions"


@pytest.mark.parametrize("kind", ["fine", "split in the middle of a line", "generated"])
def test_tokens_and_their_times(kind: str) -> None:
    with server(ANSWERS[kind]) as url:
        done = ask(url, [0.0, 0.1, 0.1], form=form_of(kind))
    assert [one.error for one in done.outcomes] == ["", "", ""]
    assert [one.tokens for one in done.outcomes] == [[1, 2, 3]] * 3
    for one in done.outcomes:
        assert one.arrival <= one.sent <= one.first <= one.last
        assert one.ttft == one.first - one.arrival
        assert one.tpot == (one.last - one.first) / 2


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("short", "2 of 3 tokens"),
        ("refused", "400"),
        ("an error in the stream", "out of luck"),
        ("garbage", "JSONDecodeError"),
        ("not what was asked", "KeyError"),
        ("nothing", "RemoteProtocolError"),
        ("generated, with an error", "out of luck"),
    ],
)
def test_a_bad_answer_is_a_failure_with_its_reason(kind: str, text: str) -> None:
    with server(ANSWERS[kind]) as url:
        done = ask(url, [0.0, 0.0], form=form_of(kind))
    assert len(done.outcomes) == len(done.failures) == 2
    assert all(text in one.error for one in done.failures), done.failures
    assert done.ttft() == [math.inf, math.inf]
    assert done.tokens_per_second == 0


def test_a_request_past_its_deadline_is_a_failure() -> None:
    began = time.monotonic()
    with server(ANSWERS["silence"]) as url:
        done = ask(url, [0.0], deadline=0.5)
    assert "no end within" in done.failures[0].error
    assert "1 tokens had come" in done.failures[0].error
    assert time.monotonic() - began < 20


def test_nobody_there_is_a_failure_of_every_request() -> None:
    done = ask(f"http://127.0.0.1:{free_port()}", schedule.at_once(5))
    assert len(done.failures) == 5
    assert all("Connect" in one.error for one in done.failures)


def test_requests_are_sent_at_their_time_whether_or_not_others_have_been_answered() -> None:
    """The server never ends an answer within the load; an open loop sends all of them even so."""
    arrivals = [0.0, 0.3, 0.6]
    with server(ANSWERS["silence"]) as url:
        done = ask(url, arrivals, deadline=3.0)
    assert [one.sent >= one.arrival for one in done.outcomes] == [True] * 3
    assert len(done.failures) == 3


def test_several_processes_send_each_request_once_and_in_time() -> None:
    arrivals = [0.3, 0.0, 0.2, 0.1, 0.4]
    with server(ANSWERS["fine"]) as url:
        done = ask(url, arrivals, processes=3)
    assert [one.arrival for one in done.outcomes] == arrivals
    assert [one.tokens for one in done.outcomes] == [[1, 2, 3]] * 5
    assert all(one.arrival <= one.sent <= one.first <= one.last for one in done.outcomes)
    assert done.seconds >= max(one.last for one in done.outcomes)


def test_several_processes_report_failures_too() -> None:
    with server(ANSWERS["silence"]) as url:
        done = ask(url, schedule.at_once(4), deadline=0.5, processes=2)
    assert ["no end within" in one.error for one in done.outcomes] == [True] * 4


def test_a_sender_that_dies_is_an_error_and_leaves_no_other_behind() -> None:
    asked = load.requests(f"http://127.0.0.1:{free_port()}", "m", [20.0, 20.0], SHAPE, 256, seed=0)
    with Senders(asked, 20.0, processes=2) as senders:
        first, second = multiprocessing.active_children()
        first.kill()
        first.join(20)
        with pytest.raises(RuntimeError, match="ended with code -9"):
            senders.send(time.monotonic())
    assert not second.is_alive()


def test_senders_end_when_their_caller_is_killed() -> None:
    code = (
        "import multiprocessing, time\n"
        "from benchmarks.common import load\n"
        "from benchmarks.common.schedule import Shape\n"
        "if __name__ == '__main__':\n"
        "    asked = load.requests('http://127.0.0.1:9', 'm', [60.0, 60.0], Shape(4, 3), 256, seed=0)\n"
        "    background = load.Background(asked, 60.0, processes=2).__enter__()\n"
        "    print(*[one.pid for one in multiprocessing.active_children()], flush=True)\n"
        "    time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) as caller:
        assert caller.stdout is not None
        pids = [int(word) for word in caller.stdout.readline().split()]
        caller.kill()
    assert len(pids) == 2
    until = time.monotonic() + 20
    while not all(ended(pid) for pid in pids):
        assert time.monotonic() < until, "a sender outlived its caller"
        time.sleep(0.02)


def test_a_load_in_the_background_is_accounted_for_as_well() -> None:
    with server(ANSWERS["fine"]) as url:
        asked = load.requests(url, "m", [0.0, 0.2], SHAPE, 256, seed=0)
        with Background(asked, 20.0) as background:
            done = background.wait()
    assert not background.running()
    assert [one.ok for one in done.outcomes] == [True, True]


def test_a_row_with_a_failed_request_misses_its_target() -> None:
    """98 requests that were answered at once do not outweigh two that were not."""
    with server(ANSWERS["fine"]) as url:
        done = ask(url, [0.0])
    broken = Load([*done.outcomes * 48, *ask(f"http://127.0.0.1:{free_port()}", [0.0, 0.0]).outcomes], 1.0)
    p99 = percentile(broken.ttft(), 99)
    assert math.isinf(p99)
    row = Row("TTFT P99", "ms", p99, 1e9, Target("ratio", "most", 1.0), spoilt=len(broken.failures))
    assert row.met is False
