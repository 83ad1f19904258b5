"""What the tests with real engines behind the gateway share."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any, Final

import httpx

from elastickv.config import Settings
from elastickv.ledger import DeviceView, TenantView, open_ledger, read_device
from gateway.served import Gateway

MIB: Final = 1024 * 1024
START_S: Final = 600.0
"""For an engine that starts in 20 s where nothing else runs."""


def ask(serving: Gateway, name: str) -> str:
    body = {"model": name, "prompt": "The capital of France is", "max_tokens": 6, "temperature": 0}
    answer = httpx.post(f"{serving.url}/v1/completions", json=body, timeout=START_S, trust_env=False)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])


def stream(serving: Gateway, name: str, words: int) -> list[dict[str, Any]]:
    """The events of an answer; the engine is killed by the caller's doing while they come."""
    body = {
        "model": name,
        "prompt": "Count:",
        "max_tokens": words,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
    }
    events: list[dict[str, Any]] = []
    with httpx.stream("POST", f"{serving.url}/v1/completions", json=body, timeout=START_S, trust_env=False) as answer:
        assert answer.status_code == 200
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                events.append(json.loads(line.removeprefix("data: ")))
                if len(events) == 3:
                    os.kill(serving.pids()[name], signal.SIGKILL)
    return events


def ledger(directory: Path) -> DeviceView:
    return read_device(open_ledger(Settings.load(arguments={"directory": str(directory), "device": "host"}), "host"))


def tenant(directory: Path, name: str) -> TenantView:
    return ledger(directory).tenant(name)


def tree(pid: int) -> list[int]:
    """The process and all below it."""
    children = [int(text) for path in Path(f"/proc/{pid}/task").glob("*/children") for text in path.read_text().split()]
    return [pid, *(one for child in children for one in tree(child))]


def resident(pids: list[int]) -> int:
    """Bytes in memory, shared pages counted once for each process."""
    return sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids) * os.sysconf("SC_PAGE_SIZE")


def kill_amid_answer(serving: Gateway, answer: str) -> None:
    """The client is told, in the stream; the next request gets an engine that works."""
    killed = serving.pids()["a"]
    events = stream(serving, "a", 900)
    assert len(events) >= 4
    assert events[-1]["error"]["code"] == "engine_failed"
    assert ask(serving, "a") == answer
    assert serving.pids()["a"] != killed
