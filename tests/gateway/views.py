"""Views of models, as a fleet would give them, for tests without one."""

from __future__ import annotations

from elastickv.gateway.base import ModelView, ReplicaView
from elastickv.gateway.states import Move, State


def model_view(
    name: str,
    state: State = State.READY,
    *,
    reason: str = "serves",
    since: float = 1.8e9,
    queued: int = 0,
    outstanding: int = 0,
    moves: tuple[Move, ...] = (),
) -> ModelView:
    """A model with one replica, whose tenant has the model's name."""
    ready = state is State.READY
    replica = ReplicaView(name, "http://127.0.0.1:1", name, True, ready, outstanding, 100 * outstanding, pid=7)
    return ModelView(name, state, reason, since, "pressure", (replica,), (name,), queued, outstanding, moves)
