"""Which ledgers there are, and which one a caller means. Nothing here creates a file."""

from __future__ import annotations

from pathlib import Path

from elastickv import _core
from elastickv.config import Settings
from elastickv.errors import ConfigError, NotFound
from elastickv.ledger import open_ledger

__all__ = ["device_names", "no_ledger_text", "open_chosen_ledger"]

SUFFIX = ".ledger"


def device_names(directory: Path) -> list[str]:
    """The devices that have a ledger in the directory, sorted; empty if the directory is absent."""
    return sorted(path.name.removesuffix(SUFFIX) for path in directory.glob(f"[!.]*{SUFFIX}"))


def no_ledger_text(directory: Path) -> str:
    """What to say when the directory holds no ledger."""
    return f"no ledger in {directory}; start an engine with `elastickv run`, or name another directory with --dir"


def open_chosen_ledger(settings: Settings) -> _core.Ledger:
    """Opens the ledger of `settings.device`; with "auto", of the only device that has one."""
    names = device_names(settings.directory)
    if not names:
        raise NotFound(no_ledger_text(settings.directory), directory=str(settings.directory))
    if settings.device != "auto":
        return open_ledger(settings, _device_id(settings.device, names))
    if len(names) > 1:
        text = f"{len(names)} devices have a ledger in {settings.directory}; choose one with --device"
        raise ConfigError(f"{text}: {', '.join(names)}")
    return open_ledger(settings, names[0])


def _device_id(device: str, names: list[str]) -> str:
    number = device.removeprefix("cuda:")
    if device in names or not number.isdecimal():
        return device
    # A GPU's number means nothing on the ledger: only the driver knows which UUID it is.
    return _core.open_driver(f"cuda:{number}").device_id
