"""`elastickv limit NAME SIZE`: order a limit and wait until the tenant holds it."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated, Final

import typer

from elastickv.cli import options as opt
from elastickv.config import Settings
from elastickv.errors import DeadlineExceeded
from elastickv.ledger import read_device
from elastickv.ledgers import open_chosen_ledger
from elastickv.limits import LimitOrder, limit_order, place_order, wait_for_order
from elastickv.units import format_size, parse_seconds, parse_size_or_none

__all__ = ["KEPT", "limit"]

KEPT: Final = 14
"""Exit code: nobody runs under the name, so the limit is kept for its next start. No error has this one."""


def limit(
    name: Annotated[str, typer.Argument(help="The tenant.", show_default=False)],
    size: Annotated[
        str, typer.Argument(help="Bytes or a size such as 8GiB; none takes the limit away.", show_default=False)
    ],
    now: Annotated[bool, typer.Option("--now", help="Preempt running requests, and wait until that is done.")] = False,
    timeout: Annotated[str, typer.Option(metavar="SECONDS", help="How long to wait for the tenant.")] = "5",
    device: opt.Device = None,
    directory: opt.Directory = None,
    as_json: opt.Json = False,
) -> None:
    """Set the most bytes that a tenant may hold, and wait until the tenant has acknowledged it.

    Leaves with 0 only if it has; with 7 if it has not within the timeout, though the limit is in force for whatever it
    asks for next; with 2, and nothing ordered, if it can never hold that little: under its floor or, --now, under what
    its engine keeps while it runs; with 14 if the name is not running and the limit is kept for its next start.
    """
    wanted = parse_size_or_none(size, "SIZE")
    seconds = parse_seconds(timeout, "--timeout")
    ledger = open_chosen_ledger(Settings.load(options={"device": device, "directory": directory}))
    revision = place_order(ledger, name, wanted, now)
    try:
        order = wait_for_order(ledger, name, revision, seconds)
    except DeadlineExceeded:
        if as_json:
            _print_json(limit_order(read_device(ledger), name, revision))
        raise
    if as_json:
        _print_json(order)
    else:
        print(_outcome(order))
    if order.state == "kept":
        raise typer.Exit(KEPT)


def _print_json(order: LimitOrder) -> None:
    print(json.dumps({**dataclasses.asdict(order), "acknowledged": order.state == "acknowledged"}))


def _outcome(order: LimitOrder) -> str:
    size = format_size(order.wanted.bytes)
    if order.state == "kept":
        return f"{order.tenant} is not running; limit {size} is kept for its next start"
    text = f"{order.tenant} goes by limit {size} and holds {format_size(order.held)}"
    if order.above:
        held = order.wanted.bytes is not None and order.wanted.bytes >= order.least
        down_to = "the limit" if held else f"the {format_size(order.least)} that it keeps while it runs,"
        text += f", {format_size(order.above)} above it; it shrinks to {down_to} as its running requests end"
    elif order.wanted.bytes is not None and order.wanted.bytes > order.capacity:
        text += f"; the device has {format_size(order.capacity)}, so the limit stops nothing"
    return text
