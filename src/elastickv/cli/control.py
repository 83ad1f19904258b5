"""`elastickv control`: serve the control socket, or send one request to it."""

from __future__ import annotations

import asyncio
import json
import signal
from typing import Annotated

import msgspec
import typer

from elastickv.cli import options as opt
from elastickv.config import Settings
from elastickv.control.client import Client
from elastickv.control.protocol import PROTOCOL
from elastickv.control.server import ControlServer
from elastickv.errors import InvalidArgument
from elastickv.units import parse_seconds

__all__ = ["app", "call", "serve"]

app = typer.Typer(invoke_without_command=True, rich_markup_mode=None)


@app.callback()
def serve(context: typer.Context, directory: opt.Directory = None) -> None:
    """Serve the control socket of the ledgers' directory until SIGTERM or Ctrl-C.

    An orchestrator asks and orders through it, in lines of JSON: see docs/control.md.
    """
    settings = Settings.load(options={"directory": directory})
    if context.invoked_subcommand is None:
        asyncio.run(_serve(settings))
    else:
        context.obj = settings


@app.command()
def call(
    context: typer.Context,
    op: Annotated[str, typer.Argument(help="hello, list, get, set, watch, fit, trim or forget.", show_default=False)],
    fields: Annotated[list[str] | None, typer.Argument(metavar="[FIELD=VALUE]...", show_default=False)] = None,
    timeout: Annotated[str, typer.Option(metavar="SECONDS", help="For an answer.")] = "10",
) -> None:
    """Send one request to a running control server and print its result as JSON; watch prints a line for each view.

    A value is JSON where it can be read as such (5, true, null), and a text otherwise (chat, 8GiB).
    """
    settings: Settings = context.obj
    with Client(str(settings.directory), timeout=parse_seconds(timeout, "--timeout")) as client:
        for result in client.stream(op, **_fields(fields or [])):
            print(msgspec.json.encode(result).decode(), flush=True)


async def _serve(settings: Settings) -> None:
    asked = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, asked.set)
    async with ControlServer(settings) as server:
        print(f"control socket {server.path}, protocol {PROTOCOL}; Ctrl-C ends it", flush=True)
        await asked.wait()


def _fields(texts: list[str]) -> dict[str, object]:
    pairs = [text.partition("=") for text in texts]
    for name, equals, _ in pairs:
        if not equals or not name:
            raise InvalidArgument(f"control call: {name!r} is no FIELD=VALUE", value=name)
    return {name: _value(text) for name, _, text in pairs}


def _value(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return text
