"""Runs one vLLM engine for harness.py: a job comes on stdin, events go out on a pipe, one JSON object a line each.

Run as a file, in a process of its own, so that nothing of an engine outlives a test.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any, TextIO

EXTENSION = "engine_extension.WorkerExtension"


def main() -> None:
    events = os.fdopen(int(sys.argv[1]), "w", buffering=1)
    job: dict[str, Any] = json.loads(sys.stdin.readline())
    if job.get("core") is not None:
        os.sched_setaffinity(0, {job["core"]})
    began = time.monotonic()
    import vllm

    llm = vllm.LLM(model=job["model"], worker_extension_cls=EXTENSION, disable_log_stats=False, **job["engine"])
    _send(events, event="ready", seconds=time.monotonic() - began, blocks=_blocks(llm), pids=_children())
    for number, prompts in enumerate(job["rounds"]):
        while (line := sys.stdin.readline()).startswith("{"):
            _send(events, event="called", **_call(llm, json.loads(line)))
        if not line:
            return
        _send(events, event="round", **_round(llm, vllm, number, prompts, job))
    _send(events, event="done", counters=_counters(llm), peak_bytes=_peak_bytes())
    sys.stdin.readline()


def _call(llm: Any, call: dict[str, Any]) -> dict[str, Any]:
    """A method of the engine, by name; what it raises is told and ends nothing."""
    try:
        return {"result": getattr(llm, call["name"])(*call["args"]), "error": None}
    except Exception as error:  # noqa: BLE001 - the test on the other side of the pipe decides what it means
        return {"result": None, "error": f"{type(error).__name__}: {error}"}


class _Order:
    """A limit that is ordered before a step, from here, and what the tenant holds after each step from then on."""

    def __init__(self, job: dict[str, Any], llm: Any) -> None:
        self.order, self.held = job["order"], list[list[int]]()
        self._llm = llm

    def before(self, step: int) -> None:
        if self.order is not None and step == self.order["step"]:
            self._ledger().order_limit(self.order["name"], self.order["limit"], self.order["now"])

    def after(self, step: int) -> None:
        if self.order is not None and step >= self.order["step"] - 1:
            rows = {row["name"]: row for row in self._ledger().view()["tenants"]}
            row = rows[self.order["name"]]
            core = self._llm.llm_engine.engine_core.engine_core
            held = row["leased"] + row["static_bytes"]
            self.held.append([held, row["limit_held_rev"], row["limit_wanted_rev"], len(core.scheduler.running)])

    def _ledger(self) -> Any:
        from elastickv._core import Ledger

        return Ledger.open(self.order["directory"], self.order["device"])


def _round(llm: Any, vllm: Any, number: int, prompts: list[Any], job: dict[str, Any]) -> dict[str, Any]:
    """Sends all prompts at once and steps the engine until none is left; damages the cache at the step asked for."""
    engine = llm.llm_engine
    params = vllm.SamplingParams(
        temperature=0.0, max_tokens=job["max_tokens"], ignore_eos=True, detokenize=False, logprobs=job["logprobs"]
    )
    for i, prompt in enumerate(prompts):
        engine.add_request(f"{number}-{i}", prompt if isinstance(prompt, str) else {"prompt_token_ids": prompt}, params)
    began, burnt = time.monotonic(), _cpu_seconds()
    tokens: list[list[int]] = [[] for _ in prompts]
    margins: list[list[float]] = [[] for _ in prompts]
    first = [0.0] * len(prompts)
    damaged: list[Any] = []
    cached = [0] * len(prompts)
    probed: list[Any] = []
    steps = 0
    order = _Order(job, llm)
    while engine.has_unfinished_requests():
        if steps == job["damage_at"]:
            damaged = llm.collective_rpc(f"{job['damage']}_blocks", args=(job["damage_blocks"],))
        if job["probe"]:
            probed.append(llm.collective_rpc(job["probe"])[0])
        order.before(steps)
        for output in engine.step():
            i = int(output.request_id.split("-")[1])
            tokens[i] = list(output.outputs[0].token_ids)
            cached[i] = output.num_cached_tokens or 0
            first[i] = first[i] or time.monotonic() - began
            if output.outputs[0].logprobs and output.finished:
                margins[i] = [_margin(entry) for entry in output.outputs[0].logprobs]
        order.after(steps)
        steps += 1
    seconds = time.monotonic() - began
    return {
        "tokens": tokens,
        "margins": margins,
        "first": first,
        "steps": steps,
        "seconds": seconds,
        "cpu_seconds": _cpu_seconds() - burnt,
        "damaged": damaged,
        "probed": probed,
        "held": order.held,
        "cached": cached,
    }


def _margin(entry: Any) -> float:
    """How far the best token is ahead of the second, in log probability."""
    best = sorted((value.logprob for value in entry.values()), reverse=True)
    return float(best[0] - best[1])


def _blocks(llm: Any) -> int:
    config = llm.llm_engine.vllm_config.cache_config
    return int(config.num_gpu_blocks or 0)


def _counters(llm: Any) -> dict[str, float]:
    return {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}


def _children() -> list[int]:
    """This process and every one below it."""
    found: list[int] = []
    queue = [os.getpid()]
    while queue:
        pid = queue.pop()
        found.append(pid)
        for task in Path(f"/proc/{pid}/task").iterdir():
            queue.extend(int(word) for word in (task / "children").read_text(encoding="ascii").split())
    return found


def _peak_bytes() -> int:
    """Peak resident bytes of all processes of this engine, shared pages counted in each."""
    lines = [
        line for pid in _children() for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    ]
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def _cpu_seconds() -> float:
    """Processor seconds that all processes of this engine have used."""
    total = 0
    for pid in _children():
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
        total += int(fields[11]) + int(fields[12])
    return total / os.sysconf("SC_CLK_TCK")


def _send(events: TextIO, **event: Any) -> None:
    events.write(json.dumps(event) + "\n")


if __name__ == "__main__":
    main()
