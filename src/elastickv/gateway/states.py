"""The states of a model, the moves between them, and how long each may take.

    stopped -> starting -> ready -> draining -> asleep -> waking -> ready
                  |          |         |          |          |
                  +----------+----> failed        +-> stopped +-> asleep (no memory to be had)

A state in which something happens has a deadline; what happens then is decided by whoever drives the machine, which
only makes sure that no move is taken that the table does not name, and that each is noted with its reason.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Final

from elastickv.errors import IntegrityError

__all__ = ["MOVES", "Machine", "Move", "State"]


class State(str, Enum):
    """Where a model is."""

    STOPPED = "stopped"
    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    ASLEEP = "asleep"
    WAKING = "waking"
    FAILED = "failed"


MOVES: Final[Mapping[State, frozenset[State]]] = {
    State.STOPPED: frozenset({State.STARTING}),
    # To asleep: an engine that was found running, and sleeps.
    State.STARTING: frozenset({State.READY, State.ASLEEP, State.FAILED, State.STOPPED}),
    State.READY: frozenset({State.DRAINING, State.FAILED}),
    # Back to ready: somebody wanted it again, or it could not be put to sleep.
    State.DRAINING: frozenset({State.ASLEEP, State.STOPPED, State.READY, State.FAILED}),
    State.ASLEEP: frozenset({State.WAKING, State.STOPPED, State.FAILED}),
    State.WAKING: frozenset({State.READY, State.ASLEEP, State.STOPPED, State.FAILED}),
    State.FAILED: frozenset({State.STARTING, State.STOPPED}),
}

_KEPT: Final = 64
"""Moves that are remembered."""


@dataclass(frozen=True)
class Move:
    """One step. `at` is Unix time; `lasted` are the seconds that were spent in `origin`."""

    origin: State
    to: State
    reason: str
    at: float
    lasted: float


class Machine:
    """A model's state. Belongs to the event loop's thread. `on_move` is told of every move, after it."""

    def __init__(
        self,
        deadlines: Mapping[State, float],
        on_move: Callable[[Move], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`deadlines`: seconds that a state may last; a state that is not named may last for ever."""
        self.state = State.STOPPED
        self.reason = "not started yet"
        self.since = time.time()
        self.history: deque[Move] = deque(maxlen=_KEPT)
        self._deadlines = deadlines
        self._on_move = on_move
        self._clock = clock
        self._entered = clock()

    def move(self, to: State, reason: str) -> Move:
        """Takes a move of MOVES. IntegrityError for any other."""
        if to not in MOVES[self.state]:
            raise IntegrityError(f"a model cannot go from {self.state.value} to {to.value} ({reason})")
        now = self._clock()
        move = Move(self.state, to, reason, time.time(), now - self._entered)
        self.state, self.reason, self.since, self._entered = to, reason, move.at, now
        self.history.append(move)
        self._on_move(move)
        return move

    @property
    def lasted(self) -> float:
        """Seconds in the present state."""
        return self._clock() - self._entered

    @property
    def remaining(self) -> float | None:
        """Seconds until the present state's deadline, not below 0; None where it has none."""
        allowed = self._deadlines.get(self.state)
        return None if allowed is None else max(0.0, allowed - self.lasted)
