"""`elastickv status`: every tenant of every device, once."""

from __future__ import annotations

import dataclasses
import json

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from elastickv.cli import options as opt
from elastickv.cli.bars import short, state_of
from elastickv.config import Settings
from elastickv.ledger import DeviceView, open_ledger, read_device
from elastickv.ledgers import device_names, no_ledger_text, open_chosen_ledger
from elastickv.units import format_size

__all__ = ["status"]


def status(device: opt.Device = None, directory: opt.Directory = None, as_json: opt.Json = False) -> None:
    """Show every tenant: what it holds, its floor and limit, whether it runs.

    Names that are not running but keep a limit are listed as such.
    """
    settings = Settings.load(options={"device": device, "directory": directory})
    names = device_names(settings.directory)
    if settings.device == "auto" or not names:
        views = [read_device(open_ledger(settings, name)) for name in names]
    else:
        views = [read_device(open_chosen_ledger(settings))]
    if as_json:
        devices = [dataclasses.asdict(view) for view in views]
        print(json.dumps({"directory": str(settings.directory), "devices": devices}, indent=2))
    elif not views:
        print(no_ledger_text(settings.directory))
    else:
        Console(highlight=False).print(Group(*(_device(view) for view in views)))


def _device(view: DeviceView) -> RenderableType:
    outside = f", {format_size(view.unmanaged)} used outside elastickv" if view.unmanaged else ""
    head = Text(f"{view.device}: {format_size(view.held)} held of {format_size(view.capacity)}{outside}", style="bold")
    if not view.tenants:
        return Group(head, Text("  no tenants"))
    table = Table(box=None, pad_edge=False, padding=(0, 1))
    table.add_column("  NAME", overflow="fold")
    for name in ("HELD", "USED", "CACHED", "FREE", "FLOOR", "LIMIT"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("STATE", overflow="fold")
    for tenant in view.tenants:
        usage = tenant.usage
        sizes = (tenant.held, usage.used, usage.cached, usage.mapped_free, tenant.floor, tenant.limit)
        state = f"{state_of(tenant)} (pid {tenant.pid})" if tenant.alive else state_of(tenant)
        table.add_row(
            f"  {tenant.name}", *(short(size) for size in sizes), state, style=None if tenant.alive else "dim"
        )
    return Group(head, table)
