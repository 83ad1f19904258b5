"""`elastickv limit NAME SIZE`: order a limit and wait until the tenant holds it."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from elastickv import _core
from elastickv.cli import options as opt
from elastickv.cli.ledgers import open_chosen_ledger
from elastickv.config import Settings
from elastickv.errors import DeadlineExceeded, ElasticKVError, NotFound
from elastickv.ledger import TenantView, read_device
from elastickv.units import format_seconds, format_size, parse_seconds, parse_size_or_none

__all__ = ["limit"]


def limit(
    name: Annotated[str, typer.Argument(help="The tenant.", show_default=False)],
    size: Annotated[
        str, typer.Argument(help="Bytes or a size such as 8GiB; none takes the limit away.", show_default=False)
    ],
    timeout: Annotated[str, typer.Option(metavar="SECONDS", help="How long to wait for the tenant.")] = "5",
    device: opt.Device = None,
    directory: opt.Directory = None,
    as_json: opt.Json = False,
) -> None:
    """Set the most bytes that a tenant may hold, and wait until the tenant has acknowledged it.

    Fails if it does not within the timeout. For a name that is not running, the limit is kept for its next start.
    """
    wanted = parse_size_or_none(size, "SIZE")
    seconds = parse_seconds(timeout, "--timeout")
    settings = Settings.load(options={"device": device, "directory": directory})
    ledger = open_chosen_ledger(settings)
    revision = ledger.order_limit(name, wanted)
    tenant = _tenant(ledger, name)
    failure = _wait(ledger, name, revision, seconds) if tenant.alive else None
    tenant = _tenant(ledger, name)
    if as_json:
        print(
            json.dumps(
                {
                    "name": name,
                    "limit": wanted,
                    "revision": revision,
                    "running": tenant.alive,
                    "acknowledged": tenant.alive and failure is None,
                    "limit_held": tenant.limit_held if tenant.alive else None,
                    "held": tenant.held,
                }
            )
        )
    if failure is not None:
        raise failure
    if not as_json:
        print(_outcome(tenant, wanted))


def _tenant(ledger: _core.Ledger, name: str) -> TenantView:
    return read_device(ledger).tenant(name)


def _wait(ledger: _core.Ledger, name: str, revision: int, seconds: float) -> ElasticKVError | None:
    try:
        ledger.wait_limit(name, revision, round(seconds * 1000))
    except DeadlineExceeded:
        now = _tenant(ledger, name)
        return DeadlineExceeded(
            f"limit: {name} did not acknowledge within {format_seconds(seconds)}: it has "
            f"acknowledged {format_size(now.limit_held)} and holds {format_size(now.held)}; the order stands "
            f"(revision {revision}) and it gets nothing above the limit, see `elastickv status`",
            name=name,
            revision=revision,
            seconds=seconds,
        )
    except NotFound:
        return NotFound(
            f"limit: {name} stopped before it acknowledged; the limit is kept for its next start",
            name=name,
            revision=revision,
        )
    return None


def _outcome(tenant: TenantView, wanted: int | None) -> str:
    if not tenant.alive:
        return f"{tenant.name} is not running; limit {format_size(wanted)} is kept for its next start"
    text = f"{tenant.name} goes by limit {format_size(wanted)} and holds {format_size(tenant.held)}"
    if wanted is not None and tenant.held > wanted:
        text += "; it shrinks to the limit as its running requests end"
    return text
