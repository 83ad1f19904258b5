"""The front of the gateway with a fleet that does as a test says, served from a thread of its own."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import uvloop

from elastickv.errors import AlreadyExists, ElasticKVError, NotFound, Unavailable
from elastickv.gateway.app import create_app
from elastickv.gateway.auth import Keys
from elastickv.gateway.base import Fleet, ModelView, ReplicaView
from elastickv.gateway.proxy import Limits
from elastickv.gateway.server import Server, WireLimits, listen
from elastickv.gateway.spec import ModelSpec
from elastickv.gateway.states import State
from gateway.raw_engine import wait_until


@dataclass
class FakeReplica:
    url: str
    tenant: str = ""
    outstanding: int = 0
    outstanding_tokens: int = 0
    alive: bool = True


class FakeTicket:
    def __init__(self, replica: FakeReplica, tokens: int) -> None:
        self._replica, self._tokens, self.left = replica, tokens, 0
        replica.outstanding += 1
        replica.outstanding_tokens += tokens

    def leave(self) -> None:
        self.left += 1
        if self.left == 1:
            self._replica.outstanding -= 1
            self._replica.outstanding_tokens -= self._tokens


class FakeModel:
    """Ready unless a test says otherwise. `error`: what ready_replicas raises; `shut`: enter() refuses so often."""

    def __init__(self, spec: ModelSpec, urls: Sequence[str]) -> None:
        self.spec = spec
        self.replicas = [FakeReplica(url) for url in urls]
        self.queued = 0
        self.state = State.READY
        self.error: ElasticKVError | None = None
        self.shut = 0
        self.asked = 0
        self.entered: list[tuple[str, int]] = []
        self.failed: list[tuple[str, str]] = []
        self.active = 0
        self.open = asyncio.Event()
        self.open.set()

    def view(self) -> ModelView:
        shown = tuple(
            ReplicaView(one.url, one.url, one.tenant, one.alive, one.alive, one.outstanding, one.outstanding_tokens)
            for one in self.replicas
        )
        outstanding = sum(one.outstanding for one in self.replicas)
        return ModelView(self.spec.name, self.state, "as told", 1.8e9, "pressure", shown, (), self.queued, outstanding)

    def on_activity(self) -> None:
        self.active += 1

    async def ready_replicas(self, deadline: float) -> Sequence[FakeReplica]:
        self.asked += 1
        if self.error is not None:
            raise self.error
        await asyncio.wait_for(self.open.wait(), deadline - time.monotonic())
        return [one for one in self.replicas if one.alive]

    def enter(self, replica: FakeReplica, tokens: int) -> FakeTicket:
        if self.shut:
            self.shut -= 1
            raise Unavailable("it drains")
        self.entered.append((replica.url, tokens))
        return FakeTicket(replica, tokens)

    def unreachable(self, replica: FakeReplica, reason: str) -> None:
        self.failed.append((replica.url, reason))
        replica.alive = len([one for one in self.replicas if one.alive]) < 2


class FakeFleet:
    def __init__(self) -> None:
        self.known: dict[str, FakeModel] = {}
        self.calls: list[tuple[str, str]] = []
        self.running = False

    def models(self) -> list[ModelView]:
        return [model.view() for model in self.known.values()]

    def model(self, name: str) -> FakeModel:
        if name not in self.known:
            raise NotFound(f"there is no model {name!r}; there are {', '.join(self.known)}")
        return self.known[name]

    async def add(self, spec: ModelSpec) -> None:
        if spec.name in self.known:
            raise AlreadyExists(f"there is a model {spec.name} already")
        self.known[spec.name] = FakeModel(spec, spec.address)

    async def remove(self, name: str) -> None:
        self.model(name)
        self.calls.append(("remove", name))
        del self.known[name]

    async def sleep(self, name: str) -> None:
        self.model(name).state = State.ASLEEP
        self.calls.append(("sleep", name))

    async def wake(self, name: str) -> None:
        if self.model(name).error is not None:
            raise Unavailable("no memory for it", retry_after_s=7)
        self.model(name).state = State.READY
        self.calls.append(("wake", name))

    async def start(self) -> None:
        self.running = True

    async def stop(self, drain_s: float) -> None:
        self.running = False


@dataclass
class Recorded:
    """A Recorder that keeps it all."""

    arrivals: list[tuple[str, int]] = field(default_factory=list)
    firsts: list[tuple[str, float]] = field(default_factory=list)
    ends: list[tuple[str, float, int, int, float]] = field(default_factory=list)
    pieces: list[tuple[str, int]] = field(default_factory=list)

    def arrived(self, model: str, prompt_tokens: int) -> None:
        self.arrivals.append((model, prompt_tokens))

    def first_byte(self, model: str, seconds: float) -> None:
        self.firsts.append((model, seconds))

    def produced(self, model: str, tokens: int) -> None:
        self.pieces.append((model, tokens))

    def finished(self, model: str, seconds: float, output_tokens: int, status: int, decode_s: float = 0.0) -> None:
        self.ends.append((model, seconds, output_tokens, status, decode_s))

    def statuses(self) -> list[int]:
        return [status for _, _, _, status, _ in self.ends]


class Front:
    """A gateway at `url`. A context manager. `real`: its fleet, in place of one that does as a test says; `more`: of
    create_app."""

    def __init__(
        self, *, wire: WireLimits | None = None, limits: Limits | None = None, real: Fleet | None = None, **more: Any
    ) -> None:
        self.fleet = FakeFleet()
        self.recorded = Recorded()
        self.app = create_app(real or self.fleet, self.recorded, limits=limits, drain_s=2, **more)
        self.server = Server(self.app, listen("127.0.0.1", 0), wire)
        self.port = self.server.port
        self._thread = threading.Thread(target=lambda: uvloop.run(self.server.serve()), daemon=True)

    def __enter__(self) -> Front:
        self._thread.start()
        wait_until(lambda: self.server.started or not self._thread.is_alive(), "the gateway serves")
        return self

    def __exit__(self, *_: object) -> None:
        self.server.stop(2)
        self._thread.join(20)
        assert not self._thread.is_alive()
        assert not self.fleet.running

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def add(self, name: str, *urls: str, **changes: Any) -> FakeModel:
        spec = replace(ModelSpec(name, address=tuple(urls)), **changes)
        model = self.fleet.known[name] = FakeModel(spec, urls)
        return model

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=20)

    def quiet(self) -> None:
        """Until no request runs."""
        wait_until(lambda: len(self.recorded.ends) == len(self.recorded.arrivals), "every request was finished")
        wait_until(lambda: not self.server.server_state.tasks, "no request runs")


__all__ = ["FakeFleet", "FakeModel", "FakeReplica", "Front", "Keys", "Limits", "Recorded", "WireLimits"]
