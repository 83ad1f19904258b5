"""Runs engines in processes of their own: a job in, token ids and figures out, a deadline on every wait.

    with start(Job(model=path, rounds=[prompts])) as engine:
        result = engine.finish()

Two engines may run at once, a core each (`Job(core=0)`, `Job(core=1)`): start both, then call `go()` on both.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Final, Literal

from elastickv.config import process_environment
from engines.kinds import KINDS, Kind, Name
from engines.warm import Process, Warm

Prompt = list[int] | str
Damage = Literal["none", "corrupt", "corrupt_all", "unmap"]

START_SECONDS: Final = 240.0
ROUND_SECONDS: Final = 600.0
END_SECONDS: Final = 5.0
CORES: Final = sorted(os.sched_getaffinity(0), reverse=process_environment().get("PYTEST_XDIST_WORKER") == "gw1")
"""To bind engines to. The second of two workers begins with the last one: one engine of each has a core to itself."""
UNDER_SECONDS: Final = 90.0
"""A checker writes its summary when the process has ended in order."""
LATE: Final = ("ELASTICKV", "PYTEST_", "PYTHONPATH", "ENGINE_TEST_PLACE", "XDG_RUNTIME_DIR")
"""Variables that importing an engine does not read."""
_AT_START: Final = frozenset(process_environment())
"""Names. An engine that a test imports into this process sets others, which are not every engine's."""
_WARM: Final[dict[Name, tuple[dict[str, str], Warm]]] = {}
"""With the variables that its imports have read. A job with others has a new interpreter."""


@dataclass(frozen=True)
class Job:
    """What one engine is to do. `rounds`: each a list of prompts sent at once, one round after another.

    `core`: the CPU that the engine is bound to, None: all of them. `damage_at`: in every round, before this step,
    `damage_blocks` blocks in use are damaged: "corrupt" overwrites them, "unmap" takes the memory behind them away,
    "none" leaves them alone, "corrupt_all" overwrites every block that there is (of a plain engine); several words are
    for a round each.
    `probe`: a method of the (first) worker, called before every step; a round has its answers. SGLang: "running", how
    many requests are.
    `engine` and `environment` are laid over the kind's own, `environment` over this process's own, too.
    `moves`: the fields of moves.Moves.
    """

    model: Path
    rounds: Sequence[Sequence[Prompt]]
    max_tokens: int = 64
    engine: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    core: int | None = None
    logprobs: int | None = None
    damage: Damage | Sequence[Damage] = "corrupt"
    damage_at: int = -1
    damage_blocks: int = 4
    probe: str | None = None
    order: dict[str, Any] | None = None
    """A limit ordered before a step of a vLLM in one process: step, directory, device, name, limit, now."""
    moves: dict[str, Any] | None = None
    kind: Name = "vllm"
    under: Sequence[str] = ()
    """A program and its arguments that runs the engine's process, such as a checker of memory accesses."""
    warm: bool = False
    """Whether its process may be a fork of one that has imported the engine, see warm.py: 15 s less in each."""

    def message(self) -> dict[str, Any]:
        return {
            "model": str(self.model),
            "rounds": [list(prompts) for prompts in self.rounds],
            "max_tokens": self.max_tokens,
            "engine": {**KINDS[self.kind].arguments, **self.engine},
            "logprobs": self.logprobs,
            "damage": [self.damage] * len(self.rounds) if isinstance(self.damage, str) else list(self.damage),
            "damage_at": self.damage_at,
            "damage_blocks": self.damage_blocks,
            "core": self.core,
            "probe": self.probe,
            "order": self.order,
            "moves": self.moves,
        }


@dataclass(frozen=True)
class Round:
    """One round's outcome. Times are seconds; `margins` are the best token's lead in log probability, if asked for.

    `cpu_seconds` are those of all the engine's processes. On a machine that is busy they say more than `seconds`.
    """

    tokens: list[list[int]]
    margins: list[list[float]]
    first: list[float]
    steps: int
    seconds: float
    cpu_seconds: float
    damaged: list[Any]
    probed: list[Any] = field(default_factory=list)
    held: list[list[int]] = field(default_factory=list)
    """With an order: bytes held, revisions of the limit held and wanted, and requests running, after each step from the
    one before the order on."""
    cached: list[int] = field(default_factory=list)
    """Tokens of each prompt that were found in the prefix cache."""
    retracted: list[int] = field(default_factory=list)
    """How often each request of an SGLang was sent back to wait."""
    moved: int = 0
    """Limits that the job's `moves` have ordered since the engine's start."""
    preemptions: int = 0
    """Requests that were sent back to wait since the engine's start, SGLang says "retracted"."""

    @property
    def tokens_per_second(self) -> float:
        return sum(len(line) for line in self.tokens) / self.seconds

    @property
    def tokens_per_cpu_second(self) -> float:
        return sum(len(line) for line in self.tokens) / self.cpu_seconds


@dataclass(frozen=True)
class Result:
    """What an engine did: its rounds, seconds until it was ready, its counters, peak resident bytes, its log."""

    rounds: list[Round]
    start_seconds: float
    blocks: int
    counters: dict[str, float]
    peak_bytes: int
    log: str

    @property
    def tokens(self) -> list[list[int]]:
        """Of all rounds, in order."""
        return [line for part in self.rounds for line in part.tokens]

    @property
    def preemptions(self) -> int:
        """Requests that were sent back to wait."""
        return self.rounds[-1].preemptions

    @property
    def prefix_hits(self) -> int:
        """Tokens that were found in the prefix cache."""
        cached = sum(sum(part.cached) for part in self.rounds)
        return int(self.counters.get("vllm:prefix_cache_hits", cached))


class EngineFailed(Exception):
    """The engine's process ended or was silent for too long; the text ends with its log's last lines."""


class Engine:
    """A running engine. Not thread-safe. `pids` are its processes, known once it is ready."""

    def __init__(self, job: Job, process: subprocess.Popen[str] | Process, events: IO[bytes], log: Path) -> None:
        self.job = job
        self.process = process
        self.pids: list[int] = []
        self.blocks = 0
        self._events = events
        self._log = log
        self._buffer = b""
        self._ready: dict[str, Any] | None = None
        self._rounds: list[Round] = []
        self._sent = 0

    def wait_ready(self, seconds: float = START_SECONDS) -> None:
        if self._ready is None:
            self._ready = self._next("ready", time.monotonic() + seconds)
            self.pids, self.blocks = list(self._ready["pids"]), int(self._ready["blocks"])

    def call(self, name: str, *args: Any, seconds: float = START_SECONDS) -> tuple[Any, str | None]:
        """Calls a method of the engine's object between two rounds: what it returned, and what it raised as text."""
        self.wait_ready()
        self._say(json.dumps({"name": name, "args": list(args)}))
        event = self._next("called", time.monotonic() + seconds)
        return event["result"], event["error"]

    def go(self) -> None:
        """Lets the engine begin its next round; returns at once."""
        self.wait_ready()
        self._say("go")
        self._sent += 1

    def wait_round(self, seconds: float = ROUND_SECONDS) -> Round:
        event = self._next("round", time.monotonic() + seconds)
        self._rounds.append(Round(**event))
        return self._rounds[-1]

    def finish(self, seconds: float = ROUND_SECONDS) -> Result:
        """Runs what is left, each round within `seconds`, and ends the engine."""
        self.wait_ready()
        while len(self._rounds) < len(self.job.rounds):
            if self._sent == len(self._rounds):
                self.go()
            self.wait_round(seconds)
        done = self._next("done", time.monotonic() + 30)
        self._say("end")
        ready = self._ready or {}
        return Result(
            self._rounds, ready["seconds"], self.blocks, done["counters"], done["peak_bytes"], self._log.read_text()
        )

    def log(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")

    def _say(self, word: str) -> None:
        if self.process.stdin is None:
            raise EngineFailed("the engine's stdin is not a pipe")
        with suppress(BrokenPipeError):
            self.process.stdin.write(word + "\n")
            self.process.stdin.flush()

    def _next(self, kind: str, deadline: float) -> dict[str, Any]:
        with selectors.DefaultSelector() as selector:
            selector.register(self._events, selectors.EVENT_READ)
            while b"\n" not in self._buffer:
                left = deadline - time.monotonic()
                if left <= 0 or not selector.select(left):
                    raise EngineFailed(f"no {kind!r} from the engine in time; its log ends:\n{self._tail()}")
                chunk = os.read(self._events.fileno(), 1 << 16)
                if not chunk:
                    code = self.process.wait(30)
                    raise EngineFailed(f"the engine ended with {code} before {kind!r}; its log ends:\n{self._tail()}")
                self._buffer += chunk
        line, self._buffer = self._buffer.split(b"\n", 1)
        event: dict[str, Any] = json.loads(line)
        if event.pop("event") != kind:
            raise EngineFailed(f"the engine sent {line[:80]!r} where {kind!r} was due")
        return event

    def _tail(self) -> str:
        return "\n".join(self.log().splitlines()[-40:])


@contextmanager
def start(job: Job) -> Iterator[Engine]:
    """Starts an engine and, whatever happens, ends every process of it."""
    inward, outward = os.pipe()
    with (
        tempfile.TemporaryDirectory(prefix="elastickv-engine-") as place,
        os.fdopen(inward, "rb", buffering=0) as events,
    ):
        log = Path(place, "log")
        try:
            with log.open("wb") as file:
                process = _process(job, Path(place), file, outward)
        finally:
            os.close(outward)
        try:
            engine = Engine(job, process, events, log)
            if process.stdin is not None:
                process.stdin.write(json.dumps(job.message()) + "\n")
                process.stdin.flush()
            yield engine
        finally:
            _end(process, UNDER_SECONDS if job.under else END_SECONDS)


def _process(job: Job, place: Path, log: IO[bytes], events: int) -> subprocess.Popen[str] | Process:
    kind = KINDS[job.kind]
    environment = _environment(kind, job, place)
    command = [str(kind.child), str(events)]
    if job.warm and not job.under and (job.core is not None or not kind.threads(0)):  # a thread more cannot be forked
        late = (*LATE, *kind.late)
        early = {name: value for name, value in environment.items() if not name.startswith(late)}
        if kind.name not in _WARM:
            _WARM[kind.name] = early, Warm(kind.modules, environment)
        if _WARM[kind.name][0] == early:
            spares = kind.spares(environment, {**kind.arguments, **job.engine})
            return _WARM[kind.name][1].start(command, environment, log, events, spares)
    return subprocess.Popen(
        [*job.under, sys.executable, *command],
        stdin=subprocess.PIPE,
        stdout=log,
        stderr=log,
        env=environment,
        text=True,
        pass_fds=[events],
        start_new_session=True,
    )


def run(job: Job) -> Result:
    """One engine alone, from start to end."""
    with start(job) as engine:
        return engine.finish()


def _environment(kind: Kind, job: Job, place: Path) -> dict[str, str]:
    strange = ("ELASTICKV", *kind.private)
    own = {
        name: value
        for name, value in process_environment().items()
        if not name.startswith(strange) and (name in _AT_START or name.startswith(LATE))
    }
    threads = {} if job.core is None else kind.threads(job.core)
    environment = {**own, **kind.environment, **threads, **job.environment}
    path = [str(folder) for folder in kind.path]
    if kind.points:
        path.append(str(place))
        (place / "elastickv_tests-0.dist-info").mkdir()
        (place / "elastickv_tests-0.dist-info/METADATA").write_text("Name: elastickv_tests\nVersion: 0\n")
        (place / "elastickv_tests-0.dist-info/entry_points.txt").write_text(kind.points)
        environment["ENGINE_TEST_PLACE"] = str(place)
        (place / "job.json").write_text(json.dumps(job.message()))
    environment["PYTHONPATH"] = os.pathsep.join([*path, environment.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    return environment


def _end(process: subprocess.Popen[str] | Process, seconds: float) -> None:
    """Some seconds to leave in order, then the whole group is killed."""
    if process.stdin is not None:
        with suppress(OSError):
            process.stdin.close()
    with suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(10)
