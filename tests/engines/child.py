"""Runs one vLLM engine for harness.py: a job comes on stdin, events go out on a pipe, one JSON object a line each.

Run as a file, in a process of its own, so that nothing of an engine outlives a test.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

from moves import Moves
from processes import call, cpu_seconds, family, peak_bytes, send

EXTENSION = "engine_extension.WorkerExtension"


def main() -> None:
    events = os.fdopen(int(sys.argv[1]), "w", buffering=1)
    job: dict[str, Any] = json.loads(sys.stdin.readline())
    if job.get("core") is not None:
        os.sched_setaffinity(0, {job["core"]})
    began = time.monotonic()
    import vllm

    llm = vllm.LLM(model=job["model"], worker_extension_cls=EXTENSION, disable_log_stats=False, **job["engine"])
    send(events, event="ready", seconds=time.monotonic() - began, blocks=_blocks(llm), pids=family())
    moves = Moves.of(job["moves"])
    for number, prompts in enumerate(job["rounds"]):
        while (line := sys.stdin.readline()).startswith("{"):
            send(events, event="called", **call(llm, json.loads(line)))
        if not line:
            return
        send(events, event="round", **_round(llm, vllm, number, prompts, job, moves))
    send(events, event="done", counters=_counters(llm), peak_bytes=peak_bytes())
    sys.stdin.readline()


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


def _round(
    llm: Any, vllm: Any, number: int, prompts: list[Any], job: dict[str, Any], moves: Moves | None
) -> dict[str, Any]:
    """Sends all prompts at once and steps the engine until none is left; damages the cache at the step asked for."""
    engine = llm.llm_engine
    params = vllm.SamplingParams(
        temperature=0.0, max_tokens=job["max_tokens"], ignore_eos=True, detokenize=False, logprobs=job["logprobs"]
    )
    for i, prompt in enumerate(prompts):
        engine.add_request(f"{number}-{i}", prompt if isinstance(prompt, str) else {"prompt_token_ids": prompt}, params)
    began, burnt = time.monotonic(), cpu_seconds()
    tokens: list[list[int]] = [[] for _ in prompts]
    margins: list[list[float]] = [[] for _ in prompts]
    first = [0.0] * len(prompts)
    damaged: list[Any] = []
    cached = [0] * len(prompts)
    probed: list[Any] = []
    steps = 0
    order = _Order(job, llm)
    while engine.has_unfinished_requests():
        if steps == job["damage_at"] and job["damage"][number] != "none":
            damaged = llm.collective_rpc(f"{job['damage'][number]}_blocks", args=(job["damage_blocks"],))
        if job["probe"]:
            probed.append(llm.collective_rpc(job["probe"])[0])
        order.before(steps)
        if moves:
            moves.before(steps)
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
        "cpu_seconds": cpu_seconds() - burnt,
        "damaged": damaged,
        "probed": probed,
        "held": order.held,
        "cached": cached,
        "moved": moves.ordered if moves else 0,
        "preemptions": int(_counters(llm)["vllm:num_preemptions"]),
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


if __name__ == "__main__":
    main()
