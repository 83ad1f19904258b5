"""`elastickv model`: models of a running gateway come, go, sleep and wake."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from elastickv.cli import options as opt
from elastickv.config import Settings
from elastickv.errors import ConfigError, InvalidArgument
from elastickv.gateway.base import ModelView
from elastickv.gateway.records import default_state
from elastickv.units import format_seconds, parse_seconds

if TYPE_CHECKING:
    from elastickv.gateway.client import AdminClient

__all__ = ["add", "app", "list_models", "remove", "sleep", "wake"]

app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Models of a running gateway: add, remove, sleep, wake, list."
)

_REASON: Final = 240

Name = Annotated[str, typer.Argument(metavar="NAME", show_default=False)]
Url = Annotated[
    str | None,
    typer.Option(metavar="URL", help="The gateway's [default: the one of the ledgers' directory].", show_default=False),
]
KeyFile = Annotated[
    str | None,
    typer.Option(metavar="FILE", help="The gateway's admin key [default: ELASTICKV_ADMIN_KEY].", show_default=False),
]
Timeout = Annotated[str, typer.Option(metavar="SECONDS", help="For the order to be carried out.")]


@app.command(name="list")
def list_models(
    url: Url = None,
    admin_key_file: KeyFile = None,
    state: opt.State = None,
    directory: opt.Directory = None,
    as_json: opt.Json = False,
) -> None:
    """Show every model: its state, since when and why, its requests."""
    with _client(url, admin_key_file, state, directory, "10") as client:
        models = client.models()
    if as_json:
        print(json.dumps({"models": msgspec.to_builtins(models)}, indent=2))
    elif not models:
        print("no models; add one with `elastickv model add NAME=PATH`")
    else:
        _print(models)


@app.command()
def add(
    model: Annotated[str, typer.Argument(metavar="NAME[=PATH]", show_default=False)],
    keys: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", show_default=False)] = None,
    wait: Annotated[bool, typer.Option(help="Wait until it is ready.")] = True,
    timeout: Timeout = "600",
    url: Url = None,
    admin_key_file: KeyFile = None,
    state: opt.State = None,
    directory: opt.Directory = None,
) -> None:
    """Serve one more model. KEYs are those of a file of models, as in: floor=4GiB sleep=idle 'args=["--seed", "1"]'.

    A VALUE is JSON where it can be read as such, and a text otherwise.
    """
    name, _, path = model.partition("=")
    entry = ({"path": path} if path else {}) | dict(_pair(text) for text in keys or [])
    with _client(url, admin_key_file, state, directory, timeout) as client:
        _say(client.add(name, entry))
        if wait:
            for view in client.starting(name):
                _say(view)


@app.command()
def remove(
    name: Name,
    timeout: Timeout = "180",
    url: Url = None,
    admin_key_file: KeyFile = None,
    state: opt.State = None,
    directory: opt.Directory = None,
) -> None:
    """Serve it no more: its requests end, then its engines."""
    with _client(url, admin_key_file, state, directory, timeout) as client:
        client.remove(name)
    print(f"{name}: removed")


@app.command()
def sleep(
    name: Name,
    timeout: Timeout = "300",
    url: Url = None,
    admin_key_file: KeyFile = None,
    state: opt.State = None,
    directory: opt.Directory = None,
) -> None:
    """Put it to sleep once its requests have ended; its memory goes back. The next request wakes it."""
    with _client(url, admin_key_file, state, directory, timeout) as client:
        _say(client.sleep(name))


@app.command()
def wake(
    name: Name,
    timeout: Timeout = "600",
    url: Url = None,
    admin_key_file: KeyFile = None,
    state: opt.State = None,
    directory: opt.Directory = None,
) -> None:
    """Wake it, or start it if it is stopped or has failed, and wait until it is ready."""
    with _client(url, admin_key_file, state, directory, timeout) as client:
        _say(client.wake(name))


def _client(
    url: str | None, key_file: str | None, state: str | None, directory: str | None, timeout: str
) -> AdminClient:
    # Here and not above: `elastickv status` must not wait for an HTTP client's imports.
    from elastickv.gateway.client import AdminClient, gateway_url

    settings = Settings.load(options={"directory": directory})
    where = url or gateway_url(Path(state) if state else default_state(settings.directory))
    return AdminClient(where, _key(key_file) or settings.admin_key, parse_seconds(timeout, "--timeout"))


def _key(file: str | None) -> str | None:
    if file is None:
        return None
    from elastickv.gateway.auth import keys_of_file

    keys = keys_of_file(Path(file))
    if len(keys) != 1:
        raise ConfigError(f"{file}: {len(keys)} keys; the file must hold the gateway's admin key, and nothing else")
    return keys[0]


def _pair(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise InvalidArgument(f"model add: {text!r} is no KEY=VALUE", value=text)
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def _say(view: ModelView) -> None:
    print(f"{view.name}: {view.state.value} ({view.reason})", flush=True)


def _print(models: list[ModelView]) -> None:
    table = Table(box=None, pad_edge=False, padding=(0, 1))
    for name in ("NAME", "STATE", "SINCE"):
        table.add_column(name, no_wrap=True)
    for name in ("RUNNING", "WAITING"):
        table.add_column(name, justify="right")
    table.add_column("WHY", overflow="fold")
    now = time.time()
    for model in models:
        since = format_seconds(round(max(0.0, now - model.since)))
        counts = (str(model.outstanding), str(model.queued))
        table.add_row(model.name, model.state.value, since, *counts, model.reason[:_REASON])
    Console(highlight=False, markup=False).print(table)
