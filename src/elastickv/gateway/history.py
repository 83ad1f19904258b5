"""What was seen over time: each device's memory by tenant, the models' queues and latencies, hand-overs, moves.

A sample is taken a second, and KEPT of them are kept. A sample is a few hundred bytes for each model and tenant, and a
ledger has at most 64 tenants.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from elastickv.gateway.base import ModelView
from elastickv.gateway.stats import ModelStats, Stats
from elastickv.ledger import DeviceView, TenantView
from elastickv.telemetry.reader import LedgerReader

__all__ = ["HandOver", "History", "hand_over"]

KEPT: Final = 900
"""Samples, and as many events: a quarter of an hour at one a second."""


@dataclass(frozen=True)
class HandOver:
    """Memory that tenants gave back because neighbours asked, and whoever took some meanwhile. Bytes."""

    bytes: int
    givers: dict[str, int]
    takers: dict[str, int]


def hand_over(before: DeviceView, after: DeviceView) -> HandOver | None:
    """What changed hands between two readings of a ledger; None where no neighbour answered, or gave nothing.

    A giver has answered a neighbour and holds less than before. A taker holds more than before, or has come; one that
    is still waiting is named with 0.
    """
    known = {(tenant.name, tenant.incarnation): tenant for tenant in before.living}
    givers: dict[str, int] = {}
    takers: dict[str, int] = {}
    for tenant in after.living:
        was = known.get((tenant.name, tenant.incarnation))
        more = tenant.held - (was.held if was else 0)
        if was and tenant.counters.answered > was.counters.answered and more < 0:
            givers[tenant.name] = -more
        elif more > 0 or tenant.demand:
            takers[tenant.name] = max(0, more)
    return HandOver(sum(givers.values()), givers, takers) if givers else None


class History:
    """Takes samples and hands them out as plain values for JSON. Thread-safe; `look` is called by one thread at a time.

    `clock` gives Unix time.
    """

    def __init__(self, directory: Path, stats: Stats, clock: Callable[[], float] = time.time) -> None:
        self._reader = LedgerReader(directory, "history")
        self._stats = stats
        self._clock = clock
        self._lock = threading.Lock()
        self._number = 0
        self._samples: deque[dict[str, Any]] = deque(maxlen=KEPT)
        self._events: deque[dict[str, Any]] = deque(maxlen=KEPT)
        self._devices: dict[str, DeviceView | None] = {}
        self._models: list[dict[str, Any]] = []
        self._total = ModelStats()
        self._last_move: dict[str, float] = {}

    def look(self, models: Sequence[ModelView]) -> None:
        """One sample. Reads the ledgers, which may take as long as their locks are held."""
        devices = dict(self._reader.read())
        now = self._clock()
        figures = {model.name: self._stats.model(model.name) for model in models}
        total = self._stats.total()
        with self._lock:
            self._number += 1
            self._note_hand_overs(devices, now)
            self._note_moves(models)
            self._devices, self._total = devices, total
            self._models = [_model(model, figures[model.name]) for model in models]
            self._samples.append(
                {
                    "n": self._number,
                    "t": round(now, 3),
                    "devices": {name: _memory(view) for name, view in devices.items() if view is not None},
                    "models": {model.name: _counted(model, figures[model.name]) for model in models},
                    "latency": _latency(total),
                }
            )

    def since(self, number: int) -> dict[str, Any]:
        """The samples and events after that number (0: all that are kept), and how things stand."""
        with self._lock:
            return {
                "n": self._number,
                "now": round(self._clock(), 3),
                "devices": {name: _device(view) for name, view in self._devices.items()},
                "models": self._models,
                "total": self._total,
                "samples": [sample for sample in self._samples if sample["n"] > number],
                "events": [event for event in self._events if event["n"] > number],
            }

    def _note_hand_overs(self, devices: dict[str, DeviceView | None], now: float) -> None:
        for name, after in devices.items():
            before = self._devices.get(name)
            found = hand_over(before, after) if before is not None and after is not None else None
            if found is not None:
                self._event("hand-over", now, device=name, givers=found.givers, takers=found.takers, bytes=found.bytes)

    def _note_moves(self, models: Sequence[ModelView]) -> None:
        for model in models:
            for move in model.moves:
                if move.at > self._last_move.get(model.name, 0.0):
                    self._last_move[model.name] = move.at
                    states = {"origin": move.origin.value, "to": move.to.value}
                    self._event("move", move.at, model=model.name, reason=move.reason, lasted=move.lasted, **states)
        for name in self._last_move.keys() - {model.name for model in models}:
            del self._last_move[name]

    def _event(self, kind: str, at: float, **values: Any) -> None:
        self._events.append({"n": self._number, "t": round(at, 3), "kind": kind, **values})


def _memory(view: DeviceView) -> dict[str, Any]:
    """Of a sample: [in use, could be given back] in bytes for each tenant, and what is used outside elastickv."""
    held = {}
    for tenant in view.living:
        parts = tenant.parts
        held[tenant.name] = (parts.static + parts.used + parts.transit, parts.cached + parts.mapped_free)
    return {"tenants": held, "outside": view.unmanaged}


def _counted(model: ModelView, stats: ModelStats) -> tuple[float, int, int]:
    """Of a sample: tokens a second, requests that wait, requests that run."""
    return round(stats.tokens_per_s, 2), model.queued, model.outstanding


def _latency(total: ModelStats) -> list[float | None]:
    """Of a sample: P50 and P99 of TTFT, P50 and P99 of TPOT, in seconds."""
    figures = (total.ttft.p50, total.ttft.p99, total.tpot.p50, total.tpot.p99)
    return [None if value is None else round(value, 5) for value in figures]


def _device(view: DeviceView | None) -> dict[str, Any] | None:
    if view is None:
        return None
    tenants = [_tenant(tenant) for tenant in view.tenants]
    return {"capacity": view.capacity, "outside": view.unmanaged, "free": view.free, "tenants": tenants}


def _tenant(tenant: TenantView) -> dict[str, Any]:
    return {
        "name": tenant.name,
        "engine": tenant.engine,
        "alive": tenant.alive,
        "asleep": tenant.asleep,
        "parts": tenant.parts,
        "held": tenant.held,
        "floor": tenant.floor,
        "limit": tenant.limit,
        "limit_wanted": tenant.limit_wanted,
        "limit_agreed": not tenant.alive or tenant.wanted == tenant.applied,
        "demand": tenant.demand,
        "weight": tenant.weight,
        "priority": tenant.priority,
        "late": tenant.counters.late,
    }


def _model(model: ModelView, stats: ModelStats) -> dict[str, Any]:
    """Without its moves, which are events."""
    return {
        "name": model.name,
        "state": model.state.value,
        "reason": model.reason,
        "since": model.since,
        "policy": model.policy,
        "queued": model.queued,
        "outstanding": model.outstanding,
        "replicas": len(model.replicas),
        "ready": sum(replica.ready for replica in model.replicas),
        "tenants": model.tenants,
        "stats": stats,
    }
