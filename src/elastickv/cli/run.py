"""`elastickv run -- COMMAND`: start an engine with the plug-in on."""

from __future__ import annotations

import os
import shutil
import sys
from typing import Annotated, NoReturn

import typer

from elastickv.cli import options as opt
from elastickv.config import Settings
from elastickv.engines import managed_environment
from elastickv.errors import AccessDenied, InvalidArgument, NotFound

__all__ = ["run"]

EXAMPLE = "elastickv run --name chat --floor 8GiB -- vllm serve MODEL"


def run(
    context: typer.Context,
    command: Annotated[list[str] | None, typer.Argument(metavar="[--] COMMAND", show_default=False)] = None,
    name: opt.Name = None,
    floor: opt.Floor = None,
    limit: opt.Limit = None,
    weight: opt.Weight = None,
    priority: opt.Priority = None,
    device: opt.Device = None,
    capacity: opt.Capacity = None,
    headroom: opt.Headroom = None,
    static: opt.Static = None,
    start_wait: opt.StartWait = None,
    directory: opt.Directory = None,
    virtual: opt.Virtual = None,
    page: opt.Page = None,
    max_extent: opt.MaxExtent = None,
    idle_release: opt.IdleRelease = None,
    cache_release: opt.CacheRelease = None,
    cache_limit: opt.CacheLimit = None,
    give_back_wait: opt.GiveBackWait = None,
    stock: opt.Stock = None,
    hold_windows: opt.HoldWindows = None,
    sleep_dir: opt.SleepDir = None,
    log: opt.Log = None,
) -> None:
    """Start an engine managed: everything after -- is the command, and it replaces this process.

    Every option is checked before anything starts. The engine then serves managed or refuses to start and says why.
    """
    options = {name: value for name, value in context.params.items() if name != "command"}
    settings = Settings.load(options={"enabled": "1", **options})
    if not command:
        raise InvalidArgument(f"run: no command; write it after --, as in: {EXAMPLE}")
    _replace_process(command, managed_environment(settings))


def _replace_process(command: list[str], environment: dict[str, str]) -> NoReturn:
    program = shutil.which(command[0], path=environment.get("PATH"))
    if program is None:
        raise NotFound(f"run: no program {command[0]!r} on the PATH; install it, or write its whole path")
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        os.execve(program, command, environment)
    except OSError as error:
        raise AccessDenied(f"run: {program} cannot be started: {error.strerror}") from None
