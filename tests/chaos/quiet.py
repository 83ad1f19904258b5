"""The quiet point: nobody works, and every book is compared with every other and with the kernel."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

from chaos import checks, kernel
from elastickv import _core
from elastickv.errors import DeadlineExceeded, NotFound
from elastickv.ledger import DeviceView, read_device

if TYPE_CHECKING:
    from chaos.conductor import Conductor

QUIET_S = 60.0
AGREE_S = 15.0


def quiet_point(conductor: Conductor) -> None:
    """Stops the work, checks, and goes on."""
    report = conductor.report
    for life in conductor.lives.values():
        if life.stopped:
            life.resume()
    asked = time.monotonic()
    told: set[int] = set()
    while time.monotonic() < asked + QUIET_S:
        for life in conductor.lives.values():
            if life.ready and not life.doom and life.spec.life not in told:
                told.add(life.spec.life)
                life.quiet = None
                life.tell("heal")
                life.tell("quiet", conductor.step_number)
        waiting = [life.name for life in conductor.lives.values() if life.quiet is None]
        if not waiting and len(conductor.lives) == len(conductor.names):
            break
        conductor.pump(0.05)
    else:
        report.violation(f"no quiet point within {QUIET_S:.0f} s: {waiting} did not come to rest")
    _compare(conductor)
    for life in conductor.lives.values():
        life.quiet = None
        life.tell("go")
    report.done("quiet points", f"after {time.monotonic() - asked:.2f} s")


def _compare(conductor: Conductor) -> None:
    """What each said of itself, then ledger and kernel until they agree or the deadline has passed."""
    report = conductor.report
    for life in conductor.lives.values():
        if life.quiet is None:
            continue
        report.counts["blocks checked"] += life.quiet["checked"]
        if life.quiet["integrity"] != "ok":
            report.violation(f"{life.name}: {life.quiet['integrity']}")
        if life.quiet["leaked"]:
            report.violation(f"{life.name}: {life.quiet['leaked']} driver calls that give back have failed")
    until = time.monotonic() + AGREE_S
    while found := _disagreements(conductor):
        if time.monotonic() >= until or conductor.options.rogue:
            break
        conductor.pump(0.02)
    for text in found:
        report.violation(f"at a quiet point: {text}")


def _view(conductor: Conductor) -> DeviceView | None:
    try:
        return read_device(_core.Ledger.open(str(conductor.options.directory), "host"))
    except (DeadlineExceeded, NotFound):
        return None


def _disagreements(conductor: Conductor) -> list[str]:
    lives = [life for life in conductor.lives.values() if life.quiet is not None]
    view = _view(conductor)
    if view is None:
        return ["the ledger cannot be read although nobody is stopped"]
    found = checks.ledger_holds(view)
    for life in lives:
        held = kernel.allocated([life.pid])
        found += checks.books_agree(life.name, held, view)
        shown = kernel.mapped(life.pid)
        if shown != held:
            found.append(f"{life.name}: {shown} bytes in page tables, {held} allocated")
        found += checks.limit_holds(life.name, view)
    living = {life.name for life in lives}
    strangers = [tenant.name for tenant in view.living if tenant.name not in living]
    if strangers and not conductor.options.rogue:
        found.append(f"rows live of tenants that do not: {strangers}")
    return found + checks.files_are_known(os.listdir(conductor.options.directory))  # noqa: PTH208 - names
