"""What the gateway adds to an engine that is called directly.

    python benchmarks/gateway/overhead.py [--rate 50 --seconds 30 --repeats 5 --streams 1000]

A stand-in for an engine, in a process of its own, answers by the clock. The same requests go to it directly and through
`elastickv serve`, in turns. "TTFT": a Poisson load at --rate; what is added is the difference of two neighbouring
rounds, the median of all pairs. "first event": requests one after another, direct and not in turns; each event says
when the engine wrote it, so this is the way from the engine's write to the client's read. "idle streams": so many
streams are held open through the gateway, each with its first event; the figure is the gateway's resident memory.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.common import load, options
from benchmarks.common.result import RESULTS, ROOT, Result, Row, Target
from benchmarks.common.schedule import Shape, alternate, poisson
from benchmarks.common.stats import percentile
from elastickv.config import process_environment

FULL = {"rate": 50.0, "seconds": 30.0, "repeats": 5, "events": 500, "streams": 1000, "seed": 7}
SMALL = {"rate": 20.0, "seconds": 2.0, "repeats": 1, "events": 20, "streams": 50}
ABOUT = {
    "rate": "requests a second",
    "seconds": "of a round",
    "repeats": "measured rounds of each side",
    "events": "first events that are timed on each side",
    "streams": "held open at once",
    "seed": "of arrivals and prompts",
}
SHAPE = Shape(200, 16)
START_S = 60.0
STREAMS_S = 120.0
AT_ONCE = 50
SIDES = ("without", "with")
TTFT_P50 = Target("with", "most", 3.0)
TTFT_P99 = Target("with", "most", 5.0)
FIRST_EVENT = Target("with", "most", 2.0)
MEMORY = Target("with", "most", 200.0)


class Place:
    """The two addresses, and the gateway's process."""

    def __init__(self, engine: str, gateway: str, pid: int) -> None:
        self.urls = {"without": engine, "with": gateway}
        self._process = Path(f"/proc/{pid}")

    def resident(self) -> float:
        """The gateway's, in MB."""
        return int((self._process / "statm").read_text(encoding="ascii").split()[1]) * resource.getpagesize() / 1e6

    def busy(self) -> float:
        """Milliseconds of processor time that the gateway has taken so far."""
        fields = (self._process / "stat").read_text(encoding="ascii").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) * 1e3 / os.sysconf("SC_CLK_TCK")


@contextmanager
def started(words: list[str], folder: Path) -> Iterator[subprocess.Popen[str]]:
    with (
        (folder / "log").open("a") as log,
        subprocess.Popen(words, stdout=subprocess.PIPE, stderr=log, text=True, env=environment()) as process,
    ):
        try:
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


def environment() -> dict[str, str]:
    """Without the caller's own settings."""
    return {name: value for name, value in process_environment().items() if not name.startswith("ELASTICKV")}


@contextmanager
def both(folder: Path) -> Iterator[Place]:
    """The engine, and a gateway in front of it."""
    with started([sys.executable, str(ROOT / "benchmarks/gateway/paced_engine.py")], folder) as engine:
        line = engine.stdout.readline() if engine.stdout else ""
        address = f"http://127.0.0.1:{int(line)}"
        models = folder / "models.toml"
        port = free_port()
        limits = "concurrency = 4000\nqueue = 4000\n"
        models.write_text(f'[gateway]\nport = {port}\n[models.paced]\naddress = ["{address}"]\n{limits}')
        words = [sys.executable, "-m", "elastickv.cli", "serve", str(models), "--dir", str(folder / "ledgers")]
        with started(words, folder) as gateway:
            url = f"http://127.0.0.1:{port}"
            wait_ready(url, gateway, folder)
            yield Place(address, url, gateway.pid)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def wait_ready(url: str, gateway: subprocess.Popen[str], folder: Path) -> None:
    until = time.monotonic() + START_S
    while time.monotonic() < until and gateway.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/v1/models", timeout=5) as answer:
                if json.load(answer)["data"][0]["state"] == "ready":
                    return
        except OSError:
            pass
        time.sleep(0.05)
    raise RuntimeError(f"the gateway did not serve: {(folder / 'log').read_text()[-2000:]}")


def ttft(place: Place, chosen: options.argparse.Namespace, result: Result) -> None:
    """Milliseconds from a request's scheduled time to its first token."""
    rounds: dict[str, list[list[float]]] = {side: [] for side in SIDES}
    busy: list[float] = []
    count = max(2, round(chosen.rate * chosen.seconds))
    for number, side in enumerate(alternate(chosen.repeats + 1, SIDES)):
        arrivals = poisson(chosen.rate, count, chosen.seed + number // 2)
        sent = load.requests(place.urls[side], "paced", arrivals, SHAPE, 30_000, chosen.seed)
        before = place.busy()
        done = load.run(sent)
        result.account(side, f"TTFT, round {number}", done)
        if number >= 2:  # the first round of each side warms up
            rounds[side].append([value * 1e3 for value in done.ttft()])
            busy += [(place.busy() - before) / count] if side == "with" else []
    for percent, target in ((50, TTFT_P50), (99, TTFT_P99)):
        figures = {side: [percentile(one, percent) for one in rounds[side]] for side in SIDES}
        added = [a - b for a, b in zip(figures["with"], figures["without"], strict=True)]
        spoilt = result.failures["with"]
        result.rows.append(Row(f"TTFT: P{percent}", "ms", *(percentile(figures[side], 50) for side in reversed(SIDES))))
        result.rows.append(Row(f"TTFT, added: P{percent}", "ms", percentile(added, 50), target=target, spoilt=spoilt))
    what = f"processor time of the gateway for a request with {SHAPE.answer} tokens"
    result.rows.append(Row(what, "ms", percentile(busy, 50)))
    result.samples |= {f"ttft ms, {side}": [[round(v, 3) for v in one] for one in rounds[side]] for side in SIDES}


async def first_event(url: str) -> float:
    """Milliseconds from the engine's write to the read here."""
    reader, writer = await opened(url, [1, 2], 2)
    try:
        line = await reader.readuntil(b"\n\n")
        now = time.monotonic()
        return (now - json.loads(line.partition(b"data: ")[2])["at"]) * 1e3
    finally:
        writer.close()


async def opened(url: str, prompt: list[int], answer: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A stream whose headers have come."""
    port = int(url.rpartition(":")[2])
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=4096)
    body = json.dumps({"model": "paced", "prompt": prompt, "max_tokens": answer, "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    found = await reader.readuntil(b"\r\n\r\n")
    if not found.startswith(b"HTTP/1.1 200"):
        raise RuntimeError(f"a stream was refused: {found!r}")
    return reader, writer


async def first_events(place: Place, count: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {side: [] for side in SIDES}
    for number in range(count + 5):
        for side in SIDES:
            value = await first_event(place.urls[side])
            if number >= 5:
                times[side].append(value)
    return times


def forward(place: Place, count: int, result: Result) -> None:
    times = asyncio.run(first_events(place, count))
    for percent in (50, 99):
        values = [percentile(times[side], percent) for side in reversed(SIDES)]
        what = f"first event, from the engine's write: P{percent}"
        result.rows.append(Row(what, "ms", *values, target=FIRST_EVENT))
    result.samples |= {f"first event ms, {side}": [round(v, 4) for v in times[side]] for side in SIDES}


async def held(url: str, count: int) -> list[asyncio.StreamWriter]:
    """So many streams, each with its first event."""
    writers: list[asyncio.StreamWriter] = []
    for start in range(0, count, AT_ONCE):
        some = await asyncio.gather(*(opened(url, [1], 1) for _ in range(start, min(count, start + AT_ONCE))))
        for reader, writer in some:
            await reader.readuntil(b"\n\n")
            writers.append(writer)
    return writers


async def idle_streams(place: Place, count: int) -> tuple[float, float]:
    """The gateway's memory before and with them, in MB; waits until the engine has seen all of them go."""
    before = place.resident()
    writers = await asyncio.wait_for(held(place.urls["with"], count), STREAMS_S)
    if (seen := streams_at(place)) != count:
        raise RuntimeError(f"the engine has {seen} of {count} streams")
    during = place.resident()
    for writer in writers:
        writer.close()
    until = time.monotonic() + STREAMS_S
    while (left := streams_at(place)) and time.monotonic() < until:
        await asyncio.sleep(0.05)
    if left:
        raise RuntimeError(f"{left} streams go on at the engine although their clients have gone")
    return before, during


def streams_at(place: Place) -> int:
    with urllib.request.urlopen(f"{place.urls['without']}/streams", timeout=20) as answer:
        return int(answer.read())


def idle(place: Place, count: int, result: Result) -> None:
    before, during = asyncio.run(idle_streams(place, count))
    result.rows.append(Row(f"memory of the gateway with {count} idle streams", "MB", during, target=MEMORY))
    result.rows.append(Row("memory of the gateway before", "MB", before))


def main() -> int:
    chosen = options.parse(__doc__, FULL, SMALL, ABOUT)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    sides = {"with": "through elastickv serve", "without": "called directly"}
    result = Result("gateway/overhead", "", chosen.small, "host", options.settings(chosen), sides)
    with tempfile.TemporaryDirectory(prefix="elastickv-benchmark-") as name, both(Path(name)) as place:
        idle(place, chosen.streams, result)
        forward(place, chosen.events, result)
        ttft(place, chosen, result)
    result.write(chosen.output or RESULTS / "cpu")
    return 0


if __name__ == "__main__":
    sys.exit(main())
