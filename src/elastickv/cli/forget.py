"""`elastickv forget NAME`: drop a name that does not run, and the limit that is kept for it."""

from __future__ import annotations

from typing import Annotated

import typer

from elastickv.cli import options as opt
from elastickv.config import Settings
from elastickv.ledgers import open_chosen_ledger

__all__ = ["forget"]


def forget(
    name: Annotated[str, typer.Argument(help="The name, which must not be running.", show_default=False)],
    device: opt.Device = None,
    directory: opt.Directory = None,
) -> None:
    """Drop a name that is not running from the ledger, with the limit that is kept for its next start."""
    open_chosen_ledger(Settings.load(options={"device": device, "directory": directory})).forget(name)
    print(f"{name} is forgotten")
