"""A trace of 27 models, folded onto three behind one `elastickv serve`: in shared memory, and in a static split of it.

    python benchmarks/gateway/replay.py --trace TRACE.csv [--requests 140] [--seconds 75] [--small]

The trace has a line for each request: arrived_at (seconds), model, prompt_tokens, output_tokens. Its models are ordered
by their number of requests and dealt to three: the first 3 to `head`, the next 6 to `middle`, the others to `tail`. Of
its requests evenly many are left out, time is scaled, answers are cut to a part of their length, prompts are random.

Sides: "with" is one budget for all three, whose models sleep when others need their memory; the seldom asked `tail`
does so as soon as it has been idle for --sleep-after. "without" are three plain engines that are always up, each with
a third of the memory that caches have. The same gateway is in front of both. They run one after the other, since they
do not fit on a small machine together: run it on a machine that does nothing else.
"""

from __future__ import annotations

import csv
import json
import math
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import httpx

from benchmarks.common import load, models, options
from benchmarks.common.guard import Guard
from benchmarks.common.load import Load, Request
from benchmarks.common.result import ROOT, Result, Row, Target
from benchmarks.common.stats import percentile, ratio
from elastickv.config import process_environment
from elastickv.demo.engines import ENVIRONMENT, SERVER, free_port

MIB = 1 << 20
MODELS = ("head", "middle", "tail")
SHARES = (3, 6)
"""Models of the trace that are dealt to the first and to the second of MODELS; the third gets the others."""
FULL: Mapping[str, options.Value] = {
    "trace": "../shared/traces/arena_27models.csv",
    "engine": "vllm",
    "model": "smollm2",
    "requests": 140,
    "seconds": 75.0,
    "answer_part": 0.25,
    "most_prompt": 384,
    "most_answer": 128,
    "cache_size": "40MiB",
    "weights_size": "736MiB",
    "sleep_after": "4s",
    "start_deadline": 600.0,
    "deadline": 240.0,
    "seed": 0,
}
SMALL: Mapping[str, options.Value] = {
    "engine": "program",
    "requests": 60,
    "seconds": 6.0,
    "cache_size": "4MiB",
    "weights_size": "8MiB",
    "sleep_after": "0.3s",
    "start_deadline": 120.0,
    "deadline": 60.0,
}
ABOUT = options.ABOUT | {
    "trace": "the file",
    "engine": "vllm, or program: answers without a model",
    "requests": "that are taken from the trace",
    "seconds": "from the first to the last of them",
    "answer_part": "of an answer's length in the trace",
    "most_prompt": "tokens",
    "most_answer": "tokens",
    "cache_size": "memory of caches for each model: all of it for a plain engine",
    "weights_size": "what a model has besides its cache, SmolLM2-135M in float32 731 MiB (docs/vllm.md)",
    "sleep_after": "how long `tail` is idle before it sleeps",
    "deadline": "seconds for a request",
}
MODEL_LEN = 640
"""Tokens; longer than any request here."""
LEAVE_S = 90.0


@dataclass(frozen=True)
class Line:
    """One request of the trace."""

    arrival: float
    model: str
    prompt: int
    answer: int


def read_trace(path: Path) -> list[Line]:
    """In the order of arrival. SystemExit where there is no such file."""
    if not path.is_file():
        raise SystemExit(f"error: --trace {path}: there is no such file")
    with path.open(encoding="utf-8", newline="") as file:
        rows = [
            Line(float(r["arrived_at"]), r["model"], int(r["prompt_tokens"]), int(r["output_tokens"]))
            for r in csv.DictReader(file)
        ]
    return sorted(rows, key=lambda row: row.arrival)


def folded(lines: Sequence[Line], chosen: Any) -> list[Line]:
    """As the module says: fewer requests, three models, scaled times, lengths that fit."""
    ranked = [
        name for name, _ in sorted(Counter(line.model for line in lines).items(), key=lambda one: (-one[1], one[0]))
    ]
    bounds = (SHARES[0], SHARES[0] + SHARES[1])
    group = {name: MODELS[sum(place >= bound for bound in bounds)] for place, name in enumerate(ranked)}
    count = min(chosen.requests, len(lines))
    taken = [lines[math.floor(i * len(lines) / count)] for i in range(count)]
    first = taken[0].arrival
    scale = chosen.seconds / max(1e-9, taken[-1].arrival - first)
    return [
        Line(
            (line.arrival - first) * scale,
            group[line.model],
            max(1, min(line.prompt, chosen.most_prompt)),
            max(4, min(round(line.answer * chosen.answer_part), chosen.most_answer)),
        )
        for line in taken
    ]


def requests(url: str, lines: Sequence[Line], vocabulary: int, seed: int) -> list[Request]:
    rng = random.Random(seed)
    return [
        Request(line.arrival, url, line.model, [rng.randrange(2, vocabulary) for _ in range(line.prompt)], line.answer)
        for line in lines
    ]


def models_file(side: str, chosen: Any, folder: Path) -> str:
    """The file for `elastickv serve`."""
    parts = []
    for number, name in enumerate(MODELS):
        entry = program_entry(side, chosen) if chosen.engine == "program" else vllm_entry(side, chosen, folder, number)
        sleep = "never" if side == "without" else "idle" if name == MODELS[-1] else "pressure"
        entry |= {"sleep": sleep, "sleep_after": chosen.sleep_after}
        entry |= {"start_deadline": chosen.start_deadline, "queue": 1000, "queue_deadline": chosen.deadline}
        env = entry.pop("env")
        parts.append(f"[models.{name}]")
        parts += [f"{key} = {json.dumps(value)}" for key, value in entry.items()]
        parts += [f"[models.{name}.env]", *(f"{key} = {json.dumps(value)}" for key, value in env.items())]
    return "\n".join(parts) + "\n"


def program_entry(side: str, chosen: Any) -> dict[str, Any]:
    script = str(ROOT / "tests/gateway/engine_program.py")
    command = [sys.executable, script, "--port", "{port}", "--model", "{name}", "--static", str(chosen.weights_size)]
    return {"command": command, "env": {} if side == "with" else {"ELASTICKV": "0"}}


def vllm_entry(side: str, chosen: Any, folder: Path, number: int) -> dict[str, Any]:
    most = 2 * len(MODELS) * chosen.cache_size  # more than all caches have: a model that sleeps leaves room
    cache = chosen.cache_size if side == "without" else most
    args = [
        *("--dtype", "float32", "--enforce-eager", "--block-size", "32", "--max-model-len", str(MODEL_LEN)),
        *("--max-num-seqs", "16", "--max-num-batched-tokens", "2048", "--kv-cache-memory-bytes", str(cache)),
        *("--gpu-memory-utilization", "0.1", "--skip-tokenizer-init", "--disable-uvicorn-access-log"),
    ]
    core = str(min(number, 1))  # the first model has a core of its own, on both sides
    env = dict(ENVIRONMENT) | {"VLLM_CPU_OMP_THREADS_BIND": core, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    if side == "with":
        own = {"ELASTICKV_STATIC": "checkpoint", "ELASTICKV_VIRTUAL": str(most)}
        return {"path": str(folder), "args": args, "env": env | own}
    place = ["--model", str(folder), "--served-model-name", "{name}", "--host", "127.0.0.1", "--port", "{port}"]
    return {"command": [*SERVER, *place, *args], "env": env | {"VLLM_PLUGINS": "", "ELASTICKV": "0"}}


@contextmanager
def gateway(side: str, chosen: Any, folder: Path, place: Path, guard: Guard) -> Iterator[str]:
    """`elastickv serve` with all three models ready; its URL. It ends with the block, and its engines with it."""
    place.mkdir()
    file, log, port = place / "models.toml", place / "gateway.log", free_port()
    file.write_text(models_file(side, chosen, folder), encoding="utf-8")
    budget = len(MODELS) * (chosen.cache_size + chosen.weights_size)
    command = [
        sys.executable,
        "-m",
        "elastickv.cli",
        "serve",
        str(file),
        "--port",
        str(port),
        "--capacity",
        str(budget),
    ]
    command += ["--device", "host", "--dir", str(place / "ledgers"), "--state", str(place / "state")]
    own = {name: value for name, value in process_environment().items() if not name.startswith("ELASTICKV")}
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=own, start_new_session=True)
    guard.add(process.pid)
    try:
        url = f"http://127.0.0.1:{port}"
        wait_ready(url, process, log, chosen.start_deadline)
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(LEAVE_S)
        finally:
            process.kill()
            process.wait(20)
            guard.remove(process.pid)


def wait_ready(url: str, process: subprocess.Popen[bytes], log: Path, seconds: float) -> None:
    """Until every model has been ready: one may sleep again by then. SystemExit with the gateway's last lines where one
    fails or it takes too long."""
    began = time.monotonic()
    states: dict[str, str] = {}
    while not states or not set(states.values()) <= {"ready", "draining", "asleep"}:
        time.sleep(0.5)
        with suppress(httpx.HTTPError, KeyError, ValueError):
            states = httpx.get(f"{url}/ready", timeout=10).json()["models"]
        late = time.monotonic() - began > seconds
        if late or process.poll() is not None or "failed" in states.values():
            tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-20:])
            raise SystemExit(f"error: not all models came up within {seconds:.0f} s: {states}\n{tail}")
    print(f"ready after {time.monotonic() - began:.1f} s", flush=True)


@dataclass(frozen=True)
class Side:
    """What one side did. `seen`: the gateway's own data for its page."""

    done: Load
    seen: dict[str, Any]

    def moves(self, to: str) -> int:
        return sum(event["kind"] == "move" and event["to"] == to for event in self.seen["events"])

    def hand_overs(self) -> int:
        return sum(event["kind"] == "hand-over" for event in self.seen["events"])

    def most_held(self) -> float:
        """MiB, by the ledger, at any of the gateway's samples."""
        memory = [one for sample in self.seen["samples"] for one in sample["devices"].values()]
        return max((sum(map(sum, one["tenants"].values())) for one in memory), default=0) / MIB


def run_side(side: str, chosen: Any, lines: Sequence[Line], model: models.Model, place: Path, guard: Guard) -> Side:
    print(f"== {side}", flush=True)
    with gateway(side, chosen, model.folder, place / side, guard) as url:
        warm = [Line(0.0, name, 32, 4) for name in MODELS]
        failed = load.run(requests(url, warm, model.vocabulary, 1), chosen.deadline).failures
        if failed:
            raise SystemExit(f"error: the first request failed: {failed[0].error}")
        seen = httpx.get(f"{url}/admin/watch", timeout=30).json()["n"]
        done = load.run(requests(url, lines, model.vocabulary, chosen.seed), chosen.deadline)
        time.sleep(1.5)  # one more sample of the gateway's
        return Side(done, httpx.get(f"{url}/admin/watch", params={"since": seen}, timeout=30).json())


def record(result: Result, sides: Mapping[str, Side], capacity: float) -> None:
    """The table."""
    with_, without = sides["with"], sides["without"]
    lost = {side: float(len(one.done.failures)) for side, one in sides.items()}
    count = float(len(with_.done.outcomes))
    result.rows.append(Row("requests sent", "", count, float(len(without.done.outcomes))))
    result.rows.append(Row("requests not answered", "", lost["with"], lost["without"], Target("with", "most", 0)))
    for name in ("all", *MODELS):
        for figure in ("ttft", "tpot"):
            for percent in (50, 90, 99) if name == "all" else (50, 99):
                values = [percentile(latencies(one.done, name, figure), percent) * 1e3 for one in (with_, without)]
                spoilt = int(lost["with"])
                result.rows.append(Row(f"{name}: {figure.upper()} P{percent}", "ms", *values, spoilt=spoilt))
    speeds = [one.done.tokens_per_second for one in (with_, without)]
    result.rows.append(Row("tokens a second", "", *speeds, given_ratio=ratio(*speeds)))
    result.rows.append(Row("times that a model went to sleep", "", with_.moves("asleep"), without.moves("asleep")))
    result.rows.append(Row("times that a model was woken", "", with_.moves("waking"), without.moves("waking")))
    result.rows.append(Row("seconds with memory given back to a neighbour", "", with_.hand_overs()))
    held = Target("with", "most", capacity)
    result.rows.append(Row("most memory held at any sample", "MiB", with_.most_held(), target=held))


def latencies(done: Load, name: str, figure: str) -> list[float]:
    return [getattr(one, figure) for one in done.outcomes if name in ("all", one.model)]


def main() -> int:
    chosen = options.parse(__doc__, FULL, SMALL, ABOUT)
    lines = folded(read_trace((ROOT / chosen.trace).resolve()), chosen)
    shown = options.settings(chosen) | {"trace": Path(chosen.trace).name}
    result = Result("gateway/replay", chosen.engine, chosen.small, "host", shown)
    result.sides = {"with": "one budget, models sleep", "without": "static split, all up, plain engines"}
    place = Path(tempfile.mkdtemp(prefix="elastickv-replay-"))
    sides: dict[str, Side] = {}
    with Guard(place) as guard:
        # The program takes any numbers as tokens.
        model = models.Model(place, 256, False) if chosen.engine == "program" else models.prepare(chosen.model, place)
        for side in ("without", "with"):
            try:
                sides[side] = run_side(side, chosen, lines, model, place, guard)
            except BaseException:
                keep_logs(place)
                raise
            result.account(side, side, sides[side].done)
            result.samples[side] = sides[side].done.samples() | {"models": [one.model for one in lines]}
    capacity = len(MODELS) * (chosen.cache_size + chosen.weights_size) / MIB
    events = [one for one in sides["with"].seen["events"] if one["kind"] == "move"]
    result.samples["moves"] = [f"{one['model']}: {one['origin']} -> {one['to']}, {one['reason']}" for one in events]
    record(result, sides, capacity)
    result.write(chosen.output)
    return 0


def keep_logs(place: Path) -> None:
    """The engines' and the gateway's, where it is said."""
    kept = Path(tempfile.mkdtemp(prefix="elastickv-replay-logs-"))
    for log in place.rglob("*.log"):
        shutil.copy(log, kept / f"{log.parent.name}-{log.name}")
    print(f"the logs are in {kept}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
