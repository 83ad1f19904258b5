"""Runs one SGLang engine for harness.py: a job comes on stdin, events go out on a pipe, one JSON object a line each.

What is to happen between two steps happens in the scheduler's process, see inside.py.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from processes import call, cpu_seconds, family, peak_bytes, send


def main() -> None:
    events = os.fdopen(int(sys.argv[1]), "w", buffering=1)
    job: dict[str, Any] = json.loads(sys.stdin.readline())
    if job["core"] is not None:
        os.sched_setaffinity(0, {job["core"]})
    place = Path(os.environ["ENGINE_TEST_PLACE"])
    began = time.monotonic()
    import sglang

    engine = sglang.Engine(model_path=job["model"], **job["engine"])
    tokens = int(engine.get_server_info()["max_total_num_tokens"])
    pages = tokens // job["engine"]["page_size"]
    send(events, event="ready", seconds=time.monotonic() - began, blocks=pages, pids=family())
    retractions = 0
    for number, prompts in enumerate(job["rounds"]):
        while (line := sys.stdin.readline()).startswith("{"):
            send(events, event="called", **call(engine, json.loads(line)))
        if not line:
            break
        (place / "round").write_text(str(number), encoding="ascii")
        done = _round(engine, prompts, job["max_tokens"])
        retractions += sum(done["retracted"])
        send(
            events,
            event="round",
            preemptions=retractions,
            **done,
            **json.loads((place / "inside.json").read_text(encoding="ascii")),
        )
    else:
        send(events, event="done", counters={}, peak_bytes=peak_bytes())
        sys.stdin.readline()
    engine.shutdown()


def _round(engine: Any, prompts: list[Any], max_tokens: int) -> dict[str, Any]:
    """Sends all prompts at once and waits for all answers: what a round has."""
    params = {"temperature": 0.0, "max_new_tokens": max_tokens, "ignore_eos": True}
    began, burnt = time.monotonic(), cpu_seconds()
    answers = engine.generate(input_ids=prompts, sampling_params=params)
    seconds = time.monotonic() - began
    facts = [answer["meta_info"] for answer in answers]
    return {
        "tokens": [answer["output_ids"] for answer in answers],
        "margins": [],
        "first": [],
        "seconds": seconds,
        "cpu_seconds": cpu_seconds() - burnt,
        "cached": [fact["cached_tokens"] for fact in facts],
        "retracted": [fact["num_retractions"] for fact in facts],
    }


if __name__ == "__main__":
    main()
