"""The front and the fleet together, with stand-in engines in processes of their own: nothing is lost."""

from __future__ import annotations

import json
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from elastickv.gateway.fleet import EngineFleet
from elastickv.gateway.spec import GatewaySpec, ModelSpec
from gateway.fleets import QUICK, WAIT_S, program, settings_for
from gateway.front import Front
from gateway.raw_engine import wait_until

JSON = {"content-type": "application/json"}


def whole(directory: Path, *models: ModelSpec) -> Front:
    fleet = EngineFleet(GatewaySpec(models), settings_for(directory), patience=QUICK)
    return Front(real=fleet)


def ask(front: Front, model: str, words: int = 3, **more: object) -> httpx.Response:
    body = {"model": model, "prompt": "hi", "max_tokens": words, **more}
    return httpx.post(f"{front.url}/v1/completions", json=body, timeout=WAIT_S)


def engine_of(front: Front, model: str) -> str:
    """Its address."""
    view = httpx.get(f"{front.url}/admin/models/{model}", timeout=WAIT_S).json()
    return str(view["replicas"][0]["url"])


def kill_engine(url: str) -> None:
    os.kill(httpx.get(f"{url}/told", timeout=WAIT_S).json()["pid"], signal.SIGKILL)


@pytest.mark.slow
def test_models_that_go_to_sleep_under_load_lose_no_request(directory: Path) -> None:
    models = [program(name, "--static", "16MiB") for name in ("a", "b")]
    with whole(directory, *models) as front, ThreadPoolExecutor(8) as pool:
        assert [ask(front, name).status_code for name in ("a", "b")] == [200, 200]
        asked = [pool.submit(ask, front, "ab"[number % 2], stream=number % 3 == 0) for number in range(60)]
        slept = 0
        for _ in range(4):
            for name in ("a", "b"):
                asked.append(pool.submit(ask, front, name))  # so that there is one in any case
                answer = httpx.post(f"{front.url}/admin/models/{name}/sleep", json={}, timeout=WAIT_S)
                assert answer.status_code in (200, 503), answer.text
                slept += answer.status_code == 200
        assert slept
        for number, one in enumerate(asked):
            answer = one.result()
            assert answer.status_code == 200, (number, answer.text)
            assert answer.text.count("word") == 3
        front.quiet()
        assert set(front.recorded.statuses()) == {200}


def test_kill_of_an_engine_ends_its_stream_cleanly_and_the_next_request_has_a_working_one(directory: Path) -> None:
    with whole(directory, program("a")) as front, ThreadPoolExecutor(1) as pool:
        assert ask(front, "a").status_code == 200
        url = engine_of(front, "a")
        httpx.post(f"{url}/tell", json={"pace": 0.2})
        body = {"model": "a", "prompt": "hi", "max_tokens": 1000, "stream": True}
        waiting = pool.submit(ask, front, "a", 50)
        with httpx.stream("POST", f"{front.url}/v1/completions", json=body, timeout=WAIT_S) as answer:
            lines = (line for line in answer.iter_lines() if line)
            assert "word" in next(lines)
            wait_until(lambda: httpx.get(f"{url}/told", timeout=WAIT_S).json()["begun"] == 3, "both run")
            kill_engine(url)
            *_, error, done = lines
        assert json.loads(error[6:])["error"]["code"] == "engine_failed"
        assert done == "data: [DONE]"
        assert ask(front, "a").status_code == 200
        retried = waiting.result()
        assert retried.status_code == 200, "nothing of its answer had been passed on, so it was asked again"
        assert retried.text.count("word") == 50


def test_a_gateway_that_ends_tells_those_who_wait_and_those_who_read(directory: Path) -> None:
    models = [program("a"), program("never", "--never-ready")]
    with whole(directory, *models) as front, ThreadPoolExecutor(2) as pool:
        assert ask(front, "a").status_code == 200
        httpx.post(f"{engine_of(front, 'a')}/tell", json={"pace": 0.1})
        reads = pool.submit(ask, front, "a", 10_000, stream=True)
        waits = pool.submit(ask, front, "never")
        wait_until(lambda: bool(front.recorded.firsts) and len(front.recorded.arrivals) == 3, "both are under way")
        front.server.stop(0.5)
        refused = waits.result(WAIT_S)
        assert refused.status_code == 503
        assert "ending" in refused.json()["error"]["message"]
        assert "the gateway is ending" in reads.result(WAIT_S).text
        assert reads.result().text.endswith("data: [DONE]\n\n")
