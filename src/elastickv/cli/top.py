"""`elastickv top`: a device's tenants, live, and the models of a gateway that runs.

A thread reads the ledger and hands over frozen views; this thread draws the newest one and listens for the key.
"""

from __future__ import annotations

import os
import queue
import select
import sys
import termios
import threading
import time
import tty
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from elastickv import _core
from elastickv.cli import options as opt
from elastickv.cli.bars import LEGEND, bar, device_parts, number_line, short, state_of
from elastickv.config import Settings
from elastickv.errors import ElasticKVError, InvalidArgument
from elastickv.gateway.base import ModelView
from elastickv.gateway.records import default_state, read_view
from elastickv.ledger import DeviceView, TenantView, read_device
from elastickv.ledgers import open_chosen_ledger
from elastickv.units import format_seconds, parse_seconds

__all__ = ["Poller", "Sample", "frame", "plain_lines", "top"]

NAME_WIDTH: Final = 12
BAR_WIDTH: Final = 40
QUIT_KEYS: Final = ("q", "Q")
STATE_STYLES: Final = {
    "ready": "green",
    "asleep": "blue",
    "starting": "yellow",
    "draining": "yellow",
    "waking": "yellow",
    "failed": "bold red",
    "stopped": "dim",
}


@dataclass(frozen=True)
class Sample:
    """One reading of the ledger. `clock` is the local time of day, `models` are those of a gateway that runs."""

    clock: str
    view: DeviceView
    models: tuple[ModelView, ...] = ()


class Poller:
    """Reads a ledger every `interval` seconds in a thread of its own and keeps the samples in order.

    `state`: the directory of a gateway, which need not run.
    """

    def __init__(self, ledger: _core.Ledger, interval: float, state: Path | None = None) -> None:
        self._ledger = ledger
        self._state = state
        self._interval = interval
        self._stop = threading.Event()
        self._queue: queue.SimpleQueue[Sample | ElasticKVError] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="elastickv-top", daemon=True)

    def __enter__(self) -> Poller:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(timeout=5)

    def next(self, timeout: float) -> Sample | None:
        """The next sample, or None if none comes within `timeout` seconds. Raises what the reading raised."""
        try:
            sample = self._queue.get(timeout=timeout)
        except queue.Empty:
            return None
        if isinstance(sample, ElasticKVError):
            raise sample
        return sample

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                gateway = read_view(self._state) if self._state is not None else None
                models = gateway.models if gateway is not None else ()
                self._queue.put(Sample(time.strftime("%H:%M:%S"), read_device(self._ledger), models))
            except ElasticKVError as error:
                self._queue.put(error)
                return
            self._stop.wait(self._interval)


def top(
    plain: Annotated[bool, typer.Option("--plain", help="Lines instead of a live view.")] = False,
    count: Annotated[int, typer.Option(metavar="N", help="Leave after N samples; 0: never.", show_default=False)] = 0,
    interval: Annotated[str, typer.Option(metavar="SECONDS", help="Time between two samples.")] = "0.5",
    device: opt.Device = None,
    directory: opt.Directory = None,
    state: opt.State = None,
) -> None:
    """Watch a device: a bar for each tenant and one for the device. q leaves.

    Where a gateway runs (`elastickv serve`), its models and their states stand below. Without a terminal, or with
    --plain, each sample is a few lines.
    """
    seconds = parse_seconds(interval, "--interval")
    if seconds < 0.05 or count < 0:
        raise InvalidArgument(f"top: --interval {interval} --count {count}; the least are 50ms and 0")
    settings = Settings.load(options={"device": device, "directory": directory})
    ledger = open_chosen_ledger(settings)
    console = Console(highlight=False)
    with Poller(ledger, seconds, Path(state) if state else default_state(settings.directory)) as poller:
        if plain or not console.is_terminal:
            _print_lines(poller, count, seconds)
        else:
            _show_live(poller, count, console)


def frame(sample: Sample, hint: str = "q quits") -> RenderableType:
    """The whole picture of one sample, 80 columns wide. `hint` stands in the right corner, in seven letters."""
    view = sample.view
    running = sum(tenant.alive for tenant in view.tenants)
    total = device_parts(view)
    head = f"elastickv  {view.device}  {running} running  {sample.clock}"
    rows: list[RenderableType] = [
        Text.assemble((head, "bold"), " " * max(2, 79 - len(head) - 7), (hint, "dim")),
        _row("device", bar(total, view.capacity, BAR_WIDTH), f"{short(total.total)} of {short(view.capacity)}"),
    ]
    if view.unmanaged:
        rows.append(Text(f"{'':{NAME_WIDTH}} {short(view.unmanaged)} used outside elastickv", style="dim"))
    for tenant in view.tenants:
        rows.append(Text(""))
        rows.extend(_tenant_rows(tenant, view.capacity))
    if sample.models:
        rows.extend([Text(""), Text("models of the gateway", style="bold")])
        rows.extend(_model_row(model) for model in sample.models)
    rows.extend([Text(""), Text(LEGEND, style="dim")])
    return Group(*rows)


def plain_lines(sample: Sample) -> list[str]:
    """The same as lines: one for the device, one for each tenant, `key=value` after the name."""
    view = sample.view
    total = device_parts(view).total
    lines = [f"{sample.clock} device={view.device} held={_tight(total)} capacity={_tight(view.capacity)}"]
    for tenant in view.tenants:
        parts = tenant.parts
        numbers = {
            "weights": parts.static,
            "used": parts.used,
            "cached": parts.cached,
            "free": parts.mapped_free,
            "transit": parts.transit,
            "lease": tenant.held,
            "asked": tenant.limit_wanted,
            "limit": tenant.limit,
        }
        text = " ".join(f"{key}={_tight(value)}" for key, value in numbers.items())
        lines.append(f"{sample.clock} {tenant.name} {text} state={state_of(tenant)!r}")
    for model in sample.models:
        lines.append(
            f"{sample.clock} model={model.name} state={model.state.value} for={_tight_age(model)} why={model.reason!r}"
        )
    return lines


def _age(model: ModelView) -> str:
    return format_seconds(round(max(0.0, time.time() - model.since)))


def _tight_age(model: ModelView) -> str:
    return _age(model).replace(" ", "")


def _model_row(model: ModelView) -> Text:
    state = Text(f"{model.state.value:9}", style=STATE_STYLES.get(model.state.value, ""))
    since = f" {_age(model):>8}  "
    room = 79 - NAME_WIDTH - 1 - 9 - len(since)
    reason = model.reason if len(model.reason) <= room else f"{model.reason[: room - 1]}…"
    name = (f"{model.name[:NAME_WIDTH]:{NAME_WIDTH}} ", "bold")
    return Text.assemble(name, state, since, (reason, "dim"), no_wrap=True)


def _tight(size: int | None) -> str:
    return short(size).replace(" ", "")


def _row(name: str, cells: Text, numbers: str) -> Text:
    return Text.assemble((f"{name[:NAME_WIDTH]:{NAME_WIDTH}} ", "bold"), cells, f"  {numbers}", no_wrap=True)


def _tenant_rows(tenant: TenantView, capacity: int) -> Iterator[Text]:
    parts = tenant.parts
    limit = tenant.limit
    most = f"limit {short(limit)}" if limit is not None else "no limit"
    yield _row(tenant.name, bar(parts, capacity, BAR_WIDTH, limit), f"{short(tenant.held)}, {most}")
    if tenant.alive:
        yield Text(f"{'':{NAME_WIDTH}} {number_line(parts)}", style="dim", no_wrap=True)
    if parts.static:
        yield Text(f"{'':{NAME_WIDTH}} weights and graphs {short(parts.static)}", style="dim", no_wrap=True)
    state = state_of(tenant)
    if state != "running":
        yield Text(f"{'':{NAME_WIDTH}} {state}", style="bold yellow", no_wrap=True)


def _print_lines(poller: Poller, count: int, seconds: float) -> None:
    seen = 0
    while count == 0 or seen < count:
        sample = poller.next(timeout=max(5.0, 2 * seconds))
        if sample is not None:
            print("\n".join(plain_lines(sample)), flush=True)
            seen += 1


def _show_live(poller: Poller, count: int, console: Console) -> None:
    seen = 0
    with _keys() as pressed, Live(console=console, screen=count == 0, auto_refresh=False) as live:
        while (count == 0 or seen < count) and pressed() not in QUIT_KEYS:
            sample = poller.next(timeout=0.1)
            if sample is not None:
                live.update(frame(sample), refresh=True)
                seen += 1


@contextmanager
def _keys() -> Iterator[Callable[[], str]]:
    """Gives a function that returns the key pressed since the last call, or "". The terminal is put back at the end."""
    if not sys.stdin.isatty():
        yield str
        return
    file = sys.stdin.fileno()

    def pressed() -> str:
        ready, _, _ = select.select([file], [], [], 0)
        return os.read(file, 1).decode("latin-1") if ready else ""

    before = termios.tcgetattr(file)
    tty.setcbreak(file)
    try:
        yield pressed
    finally:
        termios.tcsetattr(file, termios.TCSADRAIN, before)
