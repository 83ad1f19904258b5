"""`elastickv trim NAME SIZE`: have a tenant give back memory that no request uses, once."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from elastickv.cli import options as opt
from elastickv.config import Settings
from elastickv.ledger import order_trim
from elastickv.ledgers import open_chosen_ledger
from elastickv.units import format_size, parse_seconds, parse_size

__all__ = ["trim"]


def trim(
    name: Annotated[str, typer.Argument(help="The tenant.", show_default=False)],
    size: Annotated[str, typer.Argument(help="Bytes, or a size such as 8GiB.", show_default=False)],
    timeout: Annotated[str, typer.Option(metavar="SECONDS", help="How long to wait for the tenant.")] = "5",
    device: opt.Device = None,
    directory: opt.Directory = None,
    as_json: opt.Json = False,
) -> None:
    """Have a running tenant give back memory: free pages first, then cached prefixes.

    Nothing that a request uses, and nothing under its floor. It may take the memory again when it needs it.
    """
    asked = parse_size(size, "SIZE")
    seconds = parse_seconds(timeout, "--timeout")
    ledger = open_chosen_ledger(Settings.load(options={"device": device, "directory": directory}))
    given = order_trim(ledger, name, asked, round(seconds * 1000))
    if as_json:
        print(json.dumps({"tenant": name, "asked": asked, "given": given}))
        return
    short = "" if given >= asked else f" of {format_size(asked)}: the rest is in use, or under its floor"
    print(f"{name} gives back {format_size(given)}{short}")
