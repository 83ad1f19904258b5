"""Proof that a running engine is managed: what the ledger says it has mapped is what the kernel says.

On the host every mapping of an elastic cache is listed in /proc/PID/smaps under the name of its memory file. The sum
over the engine's processes must equal the mapped bytes that its ranks report on the ledger. Its processes are those
that have the same page table in memory: who started whom differs from engine to engine.
"""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from elastickv.cli.checks import Finding
from elastickv.config import Settings
from elastickv.ledger import TenantView, read_device
from elastickv.ledgers import open_chosen_ledger
from elastickv.units import format_size

__all__ = ["KernelBytes", "kernel_bytes", "process_tree", "prove", "ranks_of"]

MAPPING: Final = "/memfd:elastickv"
TABLE: Final = "/memfd:elastickv-pages"
TRIES: Final = 20
PAUSE_S: Final = 0.1


@dataclass(frozen=True)
class KernelBytes:
    """What the kernel counts over some processes, in bytes: mapped addresses, and pages really there."""

    mapped: int
    resident: int


def process_tree(pid: int, proc: Path = Path("/proc")) -> list[int]:
    """A process and all its descendants that are there now."""
    children: dict[int, list[int]] = {}
    for entry in proc.iterdir():
        if entry.name.isdecimal():
            parent = _parent(entry)
            if parent is not None:
                children.setdefault(parent, []).append(int(entry.name))
    found = [pid]
    for one in found:
        found.extend(children.get(one, []))
    return found


def ranks_of(pid: int, proc: Path = Path("/proc")) -> list[int]:
    """The process that schedules, and every process that has its page table: its ranks, wherever they run.

    PermissionError where the first one cannot be read; others that cannot be are somebody else's.
    """
    tables = _tables(proc / str(pid))
    found = [pid]
    for entry in proc.iterdir():
        if entry.name.isdecimal() and int(entry.name) != pid:
            with suppress(PermissionError):
                if not tables.isdisjoint(_tables(entry)):
                    found.append(int(entry.name))
    return found


def _tables(entry: Path) -> set[tuple[str, str]]:
    """Device and inode of the page tables that a process has mapped."""
    try:
        text = (entry / "maps").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return set()
    rows = [line.split() for line in text.splitlines() if TABLE in line]
    return {(row[3], row[4]) for row in rows if row[5] == TABLE}


def kernel_bytes(pids: list[int], proc: Path = Path("/proc")) -> KernelBytes:
    """Sums the elastic mappings of processes. One that ends meanwhile counts nothing."""
    mapped = resident = 0
    for pid in pids:
        try:
            text = (proc / str(pid) / "smaps").read_text(encoding="utf-8", errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            continue
        ours = False
        for line in text.splitlines():
            words = line.split()
            if words and not words[0].endswith(":"):
                ours = len(words) > 5 and words[5] == MAPPING
            elif ours and words[0] == "Size:":
                mapped += int(words[1]) * 1024
            elif ours and words[0] == "Rss:":
                resident += int(words[1]) * 1024
    return KernelBytes(mapped, resident)


def prove(settings: Settings, name: str) -> Finding:
    """Whether the tenant runs and its mapped bytes agree with the kernel's, looked at until both stand still."""
    ledger = open_chosen_ledger(settings)
    check = f"tenant {name}"
    text = ""
    for _ in range(TRIES):
        view = read_device(ledger)
        tenant = next((tenant for tenant in view.tenants if tenant.name == name), None)
        if tenant is None:
            known = ", ".join(tenant.name for tenant in view.tenants) or "none"
            return Finding(check, "bad", f"no such name on the ledger: it is not managed here; the names are {known}")
        if not tenant.alive:
            return Finding(check, "bad", "not running; what runs under this name is not managed")
        if view.device != "host":
            return _by_ledger(check, tenant)
        try:
            counted = kernel_bytes(ranks_of(tenant.pid))
        except PermissionError as error:
            return Finding(check, "bad", f"the kernel's figures cannot be read: {error}; run this as the engine's user")
        if 0 < counted.mapped == tenant.mapped:
            return Finding(check, "ok", _agreement(tenant, counted))
        text = _difference(tenant, counted)
        time.sleep(PAUSE_S)
    return Finding(check, "bad", text)


def _agreement(tenant: TenantView, counted: KernelBytes) -> str:
    return (
        f"managed: {tenant.engine or 'engine'} (pid {tenant.pid}) has {format_size(tenant.mapped)} mapped by the "
        f"ledger and by the kernel, {format_size(counted.resident)} resident; {tenant.layout or 'layout not told'}"
    )


def _difference(tenant: TenantView, counted: KernelBytes) -> str:
    return (
        f"the ledger says {format_size(tenant.mapped)} mapped, the kernel says {format_size(counted.mapped)} in "
        f"process {tenant.pid} and its ranks, and so at each of {TRIES} looks: it is not managed, or it maps "
        "without a pause"
    )


def _by_ledger(check: str, tenant: TenantView) -> Finding:
    text = f"managed: it runs (pid {tenant.pid}) and has {format_size(tenant.mapped)} mapped by the ledger"
    return Finding(check, "ok", f"{text}; no kernel's figure is there to compare on a GPU")


def _parent(entry: Path) -> int | None:
    try:
        text = (entry / "stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The second field is the program's name in brackets, which may hold anything, brackets too.
    return int(text.rpartition(")")[2].split()[1])
