"""A gateway whose models are only said to be there, with its page, on a real socket and over a real ledger."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import uvloop

from elastickv.errors import NotFound, Unavailable
from elastickv.gateway.app import create_app
from elastickv.gateway.auth import Keys
from elastickv.gateway.base import ModelView
from elastickv.gateway.server import Server, listen
from elastickv.gateway.spec import ModelSpec
from elastickv.gateway.states import Move, State
from elastickv.gateway.stats import Stats
from elastickv.gateway.watching import Watching
from gateway.front import FakeFleet, FakeModel
from gateway.raw_engine import wait_until


class ShownModel(FakeModel):
    """A model that is what a view says."""

    def __init__(self, fleet: ShownFleet, name: str) -> None:
        super().__init__(ModelSpec(name, path="nowhere"), ())
        self._fleet = fleet

    def view(self) -> ModelView:
        return self._fleet.views[self.spec.name]


class ShownFleet(FakeFleet):
    """A table of views, whose models sleep and wake when they are told to; `refuse`: or why they do not."""

    def __init__(self, *views: ModelView) -> None:
        super().__init__()
        self.views = {view.name: view for view in views}
        self.refuse = ""

    def models(self) -> list[ModelView]:
        return list(self.views.values())

    def model(self, name: str) -> FakeModel:
        if name not in self.views:
            raise NotFound(f"there is no model {name!r}")
        return ShownModel(self, name)

    def move(self, name: str, to: State, reason: str) -> None:
        view = self.views[name]
        now = time.time()
        move = Move(view.state, to, reason, now, now - view.since)
        self.views[name] = replace(view, state=to, reason=reason, since=now, moves=(*view.moves, move))

    async def sleep(self, name: str) -> None:
        self._told("sleep", name, State.ASLEEP)

    async def wake(self, name: str) -> None:
        self._told("wake", name, State.READY)

    def _told(self, order: str, name: str, to: State) -> None:
        self.calls.append((order, name))
        if self.refuse:
            raise Unavailable(self.refuse)
        self.move(name, to, f"told to {order}")


@contextmanager
def page_server(
    directory: Path, fleet: ShownFleet, stats: Stats | None = None, *, port: int = 0, keys: Keys | None = None
) -> Iterator[tuple[str, Watching]]:
    """Serves in a thread of its own; gives the URL."""
    stats = stats or Stats()
    watching = Watching(directory, fleet.models, stats)
    app = create_app(fleet, stats, keys=keys, drain_s=1, routes=watching.routes(), around=watching.running())
    server = Server(app, listen("127.0.0.1", port))
    thread = threading.Thread(target=lambda: uvloop.run(server.serve()), daemon=True)
    thread.start()
    wait_until(lambda: server.started or not thread.is_alive(), "the gateway serves")
    try:
        yield f"http://127.0.0.1:{server.port}", watching
    finally:
        with contextlib.suppress(RuntimeError):
            server.stop(2)
        thread.join(30)
