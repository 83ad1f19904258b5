"""What the parts of the gateway know of each other.

The front (proxy, queue, routes) and the page see models through Fleet, Model and Replica, and tell a Recorder what they
measure. Everything here belongs to the thread of the event loop. Times are seconds; a `deadline` is a moment of
time.monotonic(), `since` and `at` are Unix time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from elastickv.gateway.spec import ModelSpec
from elastickv.gateway.states import Move, State

__all__ = ["Fleet", "Model", "ModelView", "Recorder", "Replica", "ReplicaView", "Ticket"]


@dataclass(frozen=True)
class ReplicaView:
    """One engine of a model. `pid` is its first process, None where it runs elsewhere or not at all."""

    name: str
    url: str
    tenant: str
    alive: bool
    ready: bool
    outstanding: int
    outstanding_tokens: int
    pid: int | None = None
    log: str = ""


@dataclass(frozen=True)
class ModelView:
    """What everybody may see of a model. JSON by msgspec.json.encode."""

    name: str
    state: State
    reason: str
    since: float
    policy: str
    replicas: tuple[ReplicaView, ...] = ()
    tenants: tuple[str, ...] = ()
    queued: int = 0
    outstanding: int = 0
    moves: tuple[Move, ...] = ()
    """The latest ones, oldest first."""


class Replica(Protocol):
    """One address that answers for a model. `tenant` is its name on the ledger, "" where it runs elsewhere."""

    url: str
    tenant: str
    outstanding: int
    outstanding_tokens: int

    @property
    def alive(self) -> bool:
        """Whether its process runs; of one elsewhere, whether it answers."""
        ...


class Ticket(Protocol):
    """One request on its way to a replica."""

    def leave(self) -> None:
        """It has ended, however. A second call does nothing."""
        ...


class Model(Protocol):
    """One model, as the front uses it.

    A request waits in the front's queue, asks ready_replicas(), chooses one, enters it, is forwarded, and leaves.
    """

    spec: ModelSpec
    queued: int
    """Requests that wait in the front; the front keeps it up to date."""

    def view(self) -> ModelView:
        """As it is now."""
        ...

    def on_activity(self) -> None:
        """A request came, or ended: the idle clock starts anew."""
        ...

    async def ready_replicas(self, deadline: float) -> Sequence[Replica]:
        """Those that can take a request now; starts or wakes the model if that is needed.

        Unavailable (attribute `retry_after_s`) where it cannot be had: failed, no memory to wake it, being removed;
        DeadlineExceeded when it takes longer.
        """
        ...

    def enter(self, replica: Replica, tokens: int) -> Ticket:
        """Counts a request of about `tokens` tokens. Unavailable where the model admits none any more (it drains, or
        the replica has gone): then ask ready_replicas() again."""
        ...

    def unreachable(self, replica: Replica, reason: str) -> None:
        """The front could not connect, or the connection broke: look at this replica now, not at the next round."""
        ...


class Fleet(Protocol):
    """All models of a gateway."""

    def models(self) -> list[ModelView]:
        """In the order in which they were added."""
        ...

    def model(self, name: str) -> Model:
        """NotFound lists the names there are."""
        ...

    async def add(self, spec: ModelSpec) -> None:
        """AlreadyExists for a name that is taken. Returns once its start has begun, unless it starts by its first
        request."""
        ...

    async def remove(self, name: str) -> None:
        """Drains it, ends its engines, forgets it."""
        ...

    async def sleep(self, name: str) -> None:
        """Drains it and puts it to sleep; returns once the ledger shows that its memory went back. Unavailable where
        its requests did not end in time: then it is ready again."""
        ...

    async def wake(self, name: str) -> None:
        """Starts or wakes it and waits until it is ready. Unavailable (`retry_after_s`) where there is no memory."""
        ...

    async def start(self) -> None:
        """Adopts engines that still run, starts the others, watches over all."""
        ...

    async def stop(self, drain_s: float) -> None:
        """Admits no more, waits up to `drain_s` for what runs, ends all engines; 0: kills them."""
        ...


class Recorder(Protocol):
    """Told by the front what happens to requests. `status` is the HTTP status, 499 where the client went away.

    Thread-safe, never raises, costs microseconds.
    """

    def arrived(self, model: str, prompt_tokens: int) -> None:
        """A request for `model`; its prompt's tokens as estimated from the body."""
        ...

    def first_byte(self, model: str, seconds: float) -> None:
        """The first byte of a streamed answer (status 200) went to the client, so long after the request came."""
        ...

    def produced(self, model: str, tokens: int) -> None:
        """About so many tokens of an answer went to the client: called piece by piece where it is streamed."""
        ...

    def finished(self, model: str, seconds: float, output_tokens: int, status: int, decode_s: float = 0.0) -> None:
        """The answer ended, so long after the request came; once for each that arrived.

        `decode_s`: from the first byte of a streamed answer to its last.
        """
        ...
