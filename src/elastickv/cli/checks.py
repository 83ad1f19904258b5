"""What `elastickv doctor` looks at. Each check gives one finding and changes nothing."""

from __future__ import annotations

import importlib.metadata
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from elastickv import _core
from elastickv.config import Settings
from elastickv.engines import NAMES, adapter
from elastickv.errors import ElasticKVError
from elastickv.ledger import open_ledger, read_device
from elastickv.ledgers import device_names
from elastickv.memory import gpu
from elastickv.units import format_size

__all__ = ["Finding", "directory", "driver", "engine_checks", "everything", "ledgers"]

PLUGIN_GROUPS: Final = {"vllm": "vllm.general_plugins", "sglang": "sglang.srt.plugins"}


@dataclass(frozen=True)
class Finding:
    """The outcome of one check: "ok", "note" (nothing is wrong, but look), or "bad"."""

    check: str
    outcome: str
    text: str


def everything(settings: Settings) -> Iterator[Finding]:
    """All checks in order, each when it is asked for."""
    yield Finding("package", "ok", f"elastickv {importlib.metadata.version('elastickv')}, native core loads")
    yield directory(settings.directory)
    yield from ledgers(settings)
    yield driver("host", needed=True)
    yield driver("cuda:0", needed=False)
    for engine in NAMES:
        yield from engine_checks(engine)


def directory(path: Path) -> Finding:
    """Whether the directory is private: ours, mode 0700, no symlink."""
    check = "directory"
    try:
        found = path.lstat()
    except FileNotFoundError:
        return Finding(check, "ok", f"{path} is not there yet; the first engine makes it")
    if stat.S_ISLNK(found.st_mode) or not stat.S_ISDIR(found.st_mode):
        return Finding(check, "bad", f"{path} is not a directory of its own; remove it, or choose another with --dir")
    if found.st_uid != os.geteuid():
        return Finding(
            check, "bad", f"{path} belongs to user {found.st_uid}, not {os.geteuid()}; choose another with --dir"
        )
    mode = stat.S_IMODE(found.st_mode)
    if mode != 0o700:
        return Finding(check, "bad", f"{path} has mode {mode:04o}, others may look in; run: chmod 700 {path}")
    return Finding(check, "ok", f"{path} is private")


def ledgers(settings: Settings) -> Iterator[Finding]:
    """Whether each ledger can be read, and which names on it are not running."""
    try:
        names = device_names(settings.directory)
    except OSError as error:
        yield Finding("ledger", "bad", f"{settings.directory} cannot be listed: {error.strerror}")
        return
    if not names:
        yield Finding("ledger", "ok", "none yet")
    for name in names:
        try:
            view = read_device(open_ledger(settings, name))
        except ElasticKVError as error:
            yield Finding(f"ledger {name}", "bad", str(error))
            continue
        running = [tenant.name for tenant in view.tenants if tenant.alive]
        kept = [tenant.name for tenant in view.tenants if not tenant.alive]
        text = f"{format_size(view.capacity)} shared; running: {', '.join(running) or 'nobody'}"
        yield Finding(f"ledger {name}", "ok", text)
        if kept:
            text = f"not running, hold nothing, limit kept for their next start: {', '.join(kept)}"
            yield Finding(f"ledger {name}", "note", text)


def driver(device: str, *, needed: bool) -> Finding:
    """Whether a device's driver opens here."""
    check = f"driver {device.partition(':')[0]}"
    try:
        opened = _core.open_driver(device)
        free, total = opened.memory_info() if opened.on_cpu else _gpu_memory(opened.device_id)
    except ElasticKVError as error:
        return Finding(check, "bad" if needed else "note", f"not usable here: {error}")
    text = (
        f"{opened.device_id}, page {format_size(opened.granularity)}, {format_size(free)} free of {format_size(total)}"
    )
    return Finding(check, "ok", text)


def _gpu_memory(uuid: str) -> tuple[int, int]:
    """(free, total), without a CUDA context."""
    total, used = gpu.device_memory(uuid)
    return total - used, total


def engine_checks(name: str) -> Iterator[Finding]:
    """Whether an engine is installed, is a version that is managed, and would find the plug-in."""
    engine = adapter(name)
    version = engine.installed_version()
    if version is None:
        yield Finding(name, "note", f"not installed in this Python; {engine.versions} would be managed")
        return
    problems = engine.problems()
    for problem in problems:
        yield Finding(name, "bad", problem)
    if not problems:
        yield Finding(name, "ok", f"version {version}; {engine.versions} is managed")
    yield from _plugin(name)


def _plugin(name: str) -> Iterator[Finding]:
    """Whether the plug-in loads. That it is not registered at all is one of the adapter's problems."""
    check = f"{name} plug-in"
    for point in importlib.metadata.entry_points(group=PLUGIN_GROUPS[name]):
        if point.name != "elastickv":
            continue
        try:
            point.load()
        except (ImportError, AttributeError) as error:
            yield Finding(check, "bad", f"{point.value} does not load: {error}; install elastickv again")
        else:
            yield Finding(check, "ok", f"{point.value}, switched on by ELASTICKV=1 or `elastickv run`")
