"""Fleets of stand-in engines, for the tests of this folder."""

from __future__ import annotations

import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx

from elastickv.config import Settings
from elastickv.gateway.fleet import EngineFleet
from elastickv.gateway.replica import Patience
from elastickv.gateway.spec import GatewaySpec, ModelSpec

PROGRAM = Path(__file__).with_name("engine_program.py")
QUICK = Patience(backoff=(0.05,), retry=60.0, poll=0.02, look=0.05, probe=0.2, hung=1.0, wake_retry=0.5)
WAIT_S = 60.0
"""For what takes a fraction of a second on a machine that has nothing else to do."""


def command(*more: str) -> tuple[str, ...]:
    return (sys.executable, str(PROGRAM), "--port", "{port}", "--model", "{name}", *more)


def program(name: str, *more: str, **keys: Any) -> ModelSpec:
    """A model whose engine is the stand-in, with further arguments of its own."""
    return ModelSpec(name, command=command(*more), **keys)


def deadline() -> float:
    return time.monotonic() + WAIT_S


def settings_for(directory: Path, capacity: str = "64MiB") -> Settings:
    return Settings.load(options={"directory": str(directory), "device": "host", "capacity": capacity})


@asynccontextmanager
async def fleet_of(
    directory: Path, *models: ModelSpec, patience: Patience = QUICK, grace: float = 30.0, **more: Any
) -> AsyncIterator[EngineFleet]:
    """Started, and stopped at the end, whatever happens."""
    fleet = EngineFleet(GatewaySpec(models, orphan_grace=grace), settings_for(directory, **more), patience=patience)
    try:
        await fleet.start()
        yield fleet
    finally:
        await fleet.stop(0.0)


async def until(holds: Callable[[], bool], what: str) -> None:
    """Waits for a fact."""
    import asyncio

    end = deadline()
    while not holds():
        if time.monotonic() >= end:
            raise TimeoutError(f"waited {WAIT_S:.0f} s for {what}")
        await asyncio.sleep(0.02)


async def tell(url: str, **what: Any) -> None:
    """Tells a stand-in how to go on."""
    async with httpx.AsyncClient(trust_env=False, timeout=WAIT_S) as client:
        (await client.post(f"{url}/tell", json=what)).raise_for_status()


async def told(url: str) -> dict[str, Any]:
    """What a stand-in has seen."""
    async with httpx.AsyncClient(trust_env=False, timeout=WAIT_S) as client:
        answer = await client.get(f"{url}/told")
        seen: dict[str, Any] = answer.json()
        return seen
