"""What a gateway is to serve: the file of models, or name=path on the command line, as frozen values.

    [gateway]
    host = "127.0.0.1"
    port = 8000

    [models.chat]
    path = "/models/chat"
    floor = "4GiB"
    args = ["--max-model-len", "8192"]

A key that is not known is an error that names the near ones, and so is a value of the wrong kind.
"""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final, Literal

from elastickv.errors import ConfigError, InvalidArgument
from elastickv.units import parse_seconds, parse_seconds_or_never, parse_size, parse_size_or_none

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["GatewaySpec", "ModelSpec", "SleepPolicy", "load", "model_from_mapping", "parse_pair"]

SleepPolicy = Literal["pressure", "idle", "never"]

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,47}")
"""Also the tenant's name on the ledger, with a replica's number behind it."""


@dataclass(frozen=True)
class ModelSpec:
    """One model. Sizes are bytes, times seconds; None: the engine's or the ledger's own choice."""

    name: str
    path: str = ""
    engine: str = "vllm"
    args: tuple[str, ...] = ()
    """Arguments of the engine's server, as on its command line."""
    command: tuple[str, ...] = ()
    """A whole command instead of the engine's own, with {port}, {path} and {name} where they belong."""
    address: tuple[str, ...] = ()
    """URLs of servers that run elsewhere and are not started, stopped or put to sleep from here."""
    env: tuple[tuple[str, str], ...] = ()
    """Environment variables of its engines, over the gateway's own."""
    device: str | None = None
    """As in `elastickv run --device`; None: the gateway's."""
    replicas: int = 1
    floor: int = 0
    limit: int | None = None
    weight: int = 1
    priority: int = 0
    sleep: SleepPolicy = "pressure"
    """`pressure`: asleep when idle and another tenant waits for memory; `idle`: after `sleep_after` seconds without a
    request; `never`."""
    sleep_after: float = 60.0
    stop_after: float | None = None
    """Seconds asleep until the process ends too; None: never."""
    start: bool = True
    """Whether it is started with the gateway; if not, by its first request."""
    start_deadline: float = 600.0
    drain_deadline: float = 120.0
    wake_deadline: float = 60.0
    concurrency: int = 256
    """Requests that one replica is handed at a time; the others wait in the gateway, where their order is decided."""
    queue: int = 256
    """Requests that may wait."""
    queue_deadline: float = 120.0
    order: Literal["deadline", "fifo"] = "deadline"
    ttft_target: float | None = None
    """Of requests that name none, seconds from arrival."""

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise InvalidArgument(
                f"model name {self.name!r}: use 1 to 48 letters, digits, '.', '_' and '-', a letter or digit first"
            )
        if not self.path and not self.command and not self.address:
            raise InvalidArgument(f"model {self.name}: no path; write the folder of its weights, or its name on a hub")
        for url in self.address:
            if not re.fullmatch(r"https?://[^\s/?#]+/?", url):
                raise InvalidArgument(f"model {self.name}: address {url!r}; write http://HOST:PORT")
        if not 1 <= self.replicas <= 16:
            raise InvalidArgument(f"model {self.name}: replicas = {self.replicas}; 1 to 16 are possible")
        for key in ("queue", "concurrency"):
            if getattr(self, key) < 1:
                raise InvalidArgument(f"model {self.name}: {key} = {getattr(self, key)}; write at least 1")


@dataclass(frozen=True)
class GatewaySpec:
    """Where to serve, and what."""

    models: tuple[ModelSpec, ...]
    host: str = "127.0.0.1"
    port: int = 8000
    keys_file: str | None = None
    """One client key a line; with none, everybody who reaches the address is a client."""
    admin_key_file: str | None = None
    max_body: int = 16 * 1024 * 1024
    max_connections: int = 4096
    orphan_grace: float = 30.0
    """Seconds that engines go on without a gateway, so that one that is started again can adopt them."""
    log_requests: bool = False

    def __post_init__(self) -> None:
        names = [model.name for model in self.models]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ConfigError(f"these models are named more than once: {', '.join(twice)}")
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port = {self.port}; 0 to 65535 are possible")


_SIZES: Final = {"floor": parse_size, "max_body": parse_size}
_READ: Final[Mapping[str, Callable[[str, str], Any]]] = {
    **_SIZES,
    "limit": parse_size_or_none,
    "sleep_after": parse_seconds,
    "stop_after": parse_seconds_or_never,
    "start_deadline": parse_seconds,
    "drain_deadline": parse_seconds,
    "wake_deadline": parse_seconds,
    "queue_deadline": parse_seconds,
    "orphan_grace": parse_seconds,
}
_CHOICES: Final[Mapping[str, tuple[str, ...]]] = {
    "sleep": ("pressure", "idle", "never"),
    "order": ("deadline", "fifo"),
}
_KINDS: Final[Mapping[str, type]] = {
    **dict.fromkeys(("replicas", "weight", "priority", "queue", "concurrency", "port", "max_connections"), int),
    **dict.fromkeys(("start", "log_requests"), bool),
    **dict.fromkeys(("path", "engine", "device", "host", "keys_file", "admin_key_file"), str),
}


def load(path: Path) -> GatewaySpec:
    """Reads a file of models. ConfigError names the file, the key and what is wrong."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the file: {error.strerror or error}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: the file is not TOML: {error}") from None
    _known(table, ("gateway", "models"), str(path))
    models = table.get("models", {})
    if not isinstance(models, Mapping) or not models:
        raise ConfigError(f"{path}: there is no model; write a table [models.NAME] with a path for each")
    specs = tuple(model_from_mapping(name, entry, f"{path}: [models.{name}]") for name, entry in models.items())
    top = table.get("gateway", {})
    if not isinstance(top, Mapping):
        raise ConfigError(f"{path}: gateway is no table")
    names = [spec.name for spec in fields(GatewaySpec) if spec.name != "models"]
    return GatewaySpec(specs, **_values(top, names, f"{path}: [gateway]"))


def model_from_mapping(name: str, entry: object, where: str) -> ModelSpec:
    """A model from a table of a file or the body of a request. ConfigError says where and what."""
    if not isinstance(entry, Mapping):
        raise ConfigError(f"{where}: no table of keys and values")
    names = [spec.name for spec in fields(ModelSpec) if spec.name != "name"]
    values = _values(entry, names, where)
    try:
        return ModelSpec(name, **values)
    except InvalidArgument as error:
        raise ConfigError(f"{where}: {error.message}") from None


def parse_pair(text: str) -> ModelSpec:
    """`name=path`, as on the command line."""
    name, equals, path = text.partition("=")
    if not equals:
        raise InvalidArgument(f"{text!r} is neither a file of models (*.toml) nor name=path")
    return ModelSpec(name, path)


def _known(table: Mapping[str, Any], names: Sequence[str], where: str) -> None:
    for key in table:
        if key not in names:
            near = difflib.get_close_matches(str(key), names, 1)
            hint = f"did you mean {near[0]}?" if near else f"the keys are {', '.join(names)}"
            raise ConfigError(f"{where}: no such key {key!r}; {hint}")


def _values(table: Mapping[str, Any], names: Sequence[str], where: str) -> dict[str, Any]:
    _known(table, names, where)
    return {key: _value(key, value, f"{where} {key}") for key, value in table.items()}


def _value(key: str, value: object, what: str) -> Any:
    if key in ("args", "command", "address"):
        if not isinstance(value, (list, tuple)) or not all(isinstance(one, (str, int, float)) for one in value):
            raise ConfigError(f"{what} = {value!r}; write a list of texts")
        return tuple(str(one) for one in value)
    if key == "env":
        if not isinstance(value, Mapping) or not all(isinstance(one, (str, int, float)) for one in value.values()):
            raise ConfigError(f"{what} = {value!r}; write a table of texts")
        return tuple((str(name), str(one)) for name, one in value.items())
    if key == "ttft_target":
        return parse_seconds(str(value), what)
    if key in _READ:
        if isinstance(value, bool) or not isinstance(value, (str, int, float)):
            raise ConfigError(f"{what} = {value!r}; write a number or a text")
        try:
            return _READ[key](str(value), what)
        except InvalidArgument as error:
            raise ConfigError(error.message) from None
    if key in _CHOICES:
        if value not in _CHOICES[key]:
            raise ConfigError(f"{what} = {value!r}; it is one of {', '.join(_CHOICES[key])}")
        return value
    kind = _KINDS[key]
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ConfigError(f"{what} = {value!r}; write a {_WORDS[kind]}")
    return value


_WORDS: Final = {int: "whole number", bool: "true or false", str: "text"}
