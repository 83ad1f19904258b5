"""How an engine is started: its command, its environment, its port. Pure but for the look at which ports are free."""

from __future__ import annotations

import random
import socket
import sys
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from elastickv.config import Settings
from elastickv.engines import Server, adapter, managed_environment
from elastickv.errors import ConfigError, Unavailable
from elastickv.gateway.spec import ModelSpec

__all__ = ["HOST", "Launch", "check", "choose_port", "launch", "same_engine", "settings_of", "tenant_names"]

HOST: Final = "127.0.0.1"
"""Engines are for the gateway alone."""

_PORTS: Final = range(20_000, 32_000)
"""Below the ports that Linux gives to outgoing connections: an engine opens its port long after it was chosen."""

_ENGINE_FIELDS: Final = (
    "path",
    "engine",
    "args",
    "command",
    "env",
    "device",
    "floor",
    "limit",
    "weight",
    "priority",
    "replicas",
)
_WAIT_PART: Final = 0.8
"""Of the deadline of waking: the engine is to give up before the gateway does."""


@dataclass(frozen=True)
class Launch:
    """What is started."""

    command: tuple[str, ...]
    environment: Mapping[str, str]
    tenant: str
    port: int


def tenant_names(spec: ModelSpec) -> list[str]:
    """Of its replicas: on the ledger, and of their records."""
    if not spec.path and not spec.command:
        return []
    if spec.replicas == 1:
        return [spec.name]
    return [f"{spec.name}.{number}" for number in range(1, spec.replicas + 1)]


def settings_of(spec: ModelSpec, tenant: str, base: Settings) -> Settings:
    """As `elastickv run` would read them. ConfigError where they contradict each other."""
    options: dict[str, str | None] = {
        "enabled": "1",
        "directory": str(base.directory),
        "name": tenant,
        "floor": str(spec.floor) if spec.floor else None,
        "limit": None if spec.limit is None else str(spec.limit),
        "weight": None if spec.weight == 1 else str(spec.weight),
        "priority": None if spec.priority == 0 else str(spec.priority),
        "device": spec.device or (base.device if "device" in base.given else None),
        "capacity": None if base.capacity is None else str(base.capacity),
        # Also on the host, where nothing but the cache counts by default: what sleeps must show what it gives back.
        "static": None if "static" in base.given else "checkpoint",
        "start_wait": None if "start_wait" in base.given else str(max(1.0, spec.wake_deadline * _WAIT_PART)),
    }
    return Settings.load(options=options)


def check(spec: ModelSpec, base: Settings) -> Server:
    """Finds what is wrong with a model before anything is started. NotFound for an engine that is not known."""
    server = adapter(spec.engine).server
    if spec.path.startswith(("/", ".", "~")) and not Path(spec.path).expanduser().exists():
        raise ConfigError(f"model {spec.name}: there is nothing at {spec.path}; correct its path")
    for tenant in tenant_names(spec):
        settings_of(spec, tenant, base)
    return server


def launch(spec: ModelSpec, tenant: str, port: int, base: Settings) -> Launch:
    """The command of the engine's own server, or the model's own command with its placeholders filled in."""
    server = adapter(spec.engine).server
    path = str(Path(spec.path).expanduser()) if spec.path.startswith("~") else spec.path
    if spec.command:
        known = {"{port}": str(port), "{path}": path, "{name}": spec.name, "{host}": HOST}
        command = [_filled(part, known) for part in spec.command] + list(spec.args)
    else:
        command = [sys.executable, *server.arguments(path, spec.name, HOST, port), *spec.args]
    environment = managed_environment(settings_of(spec, tenant, base)) | dict(server.environment) | dict(spec.env)
    return Launch(tuple(command), environment, tenant, port)


def _filled(part: str, known: Mapping[str, str]) -> str:
    for name, value in known.items():
        part = part.replace(name, value)
    return part


def same_engine(one: ModelSpec, other: ModelSpec) -> bool:
    """Whether an engine started for the one is what would be started for the other."""
    return all(getattr(one, name) == getattr(other, name) for name in _ENGINE_FIELDS)


def choose_port(taken: Collection[int]) -> int:
    """A port that nobody listens on now. Unavailable where a hundred tries find none."""
    for _ in range(100):
        port = random.choice(_PORTS)
        if port in taken:
            continue
        with socket.socket() as probe, suppress(OSError):
            probe.bind((HOST, port))
            return port
    raise Unavailable(f"no free port from {_PORTS.start} to {_PORTS.stop - 1} on {HOST} in 100 tries")
