"""The options that several verbs share. Their texts and defaults are those of the settings."""

from __future__ import annotations

from typing import Annotated, Any, Final

import typer

from elastickv.config import VARIABLES

__all__ = [
    "CacheLimit",
    "CacheRelease",
    "Capacity",
    "Device",
    "Directory",
    "Floor",
    "GiveBackWait",
    "Headroom",
    "HoldWindows",
    "IdleRelease",
    "Json",
    "Limit",
    "Log",
    "MaxExtent",
    "Name",
    "Page",
    "Priority",
    "SleepDir",
    "StartWait",
    "State",
    "Static",
    "Stock",
    "Virtual",
    "Weight",
]

_METAVARS: Final = {
    "directory": "PATH",
    "device": "DEVICE",
    "name": "NAME",
    "weight": "N",
    "priority": "N",
    "idle_release": "SECONDS",
    "cache_release": "SECONDS",
    "give_back_wait": "MS",
    "hold_windows": "auto|always",
    "static": "auto|checkpoint|none|SIZE",
    "start_wait": "SECONDS",
    "sleep_dir": "PATH",
    "log": "LEVEL",
}


def _setting(field: str) -> Any:
    variable = next(v for v in VARIABLES if v.field == field)
    text = f"{variable.doc} [{variable.variable}; default: {variable.default}]"
    return typer.Option(variable.option, help=text, metavar=_METAVARS.get(field, "SIZE"), show_default=False)


Directory = Annotated[str | None, _setting("directory")]
Device = Annotated[str | None, _setting("device")]
Capacity = Annotated[str | None, _setting("capacity")]
Headroom = Annotated[str | None, _setting("headroom")]
Static = Annotated[str | None, _setting("static")]
StartWait = Annotated[str | None, _setting("start_wait")]
Name = Annotated[str | None, _setting("name")]
Floor = Annotated[str | None, _setting("floor")]
Limit = Annotated[str | None, _setting("limit")]
Weight = Annotated[str | None, _setting("weight")]
Priority = Annotated[str | None, _setting("priority")]
Virtual = Annotated[str | None, _setting("virtual")]
Page = Annotated[str | None, _setting("page")]
MaxExtent = Annotated[str | None, _setting("max_extent")]
IdleRelease = Annotated[str | None, _setting("idle_release")]
CacheRelease = Annotated[str | None, _setting("cache_release")]
CacheLimit = Annotated[str | None, _setting("cache_limit")]
GiveBackWait = Annotated[str | None, _setting("give_back_wait")]
Stock = Annotated[str | None, _setting("stock")]
HoldWindows = Annotated[str | None, _setting("hold_windows")]
SleepDir = Annotated[str | None, _setting("sleep_dir")]
Log = Annotated[str | None, _setting("log")]
State = Annotated[
    str | None,
    typer.Option(
        metavar="PATH", help="The gateway's private directory [default: gateway, in the ledgers'].", show_default=False
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object, for a program to read.")]
