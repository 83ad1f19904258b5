"""Ends a child process with its parent, so that no orphan holds memory after the engine was killed.

The kernel tells: a pidfd becomes readable when the process ends, however it ends. (PR_SET_PDEATHSIG would fire when
the parent's *thread* ends that made the child, which in an engine made by a short-lived thread is too early.)
"""

from __future__ import annotations

import multiprocessing
import os
import select
import sys
import threading
from typing import Final

from elastickv.errors import EngineRefused

__all__ = ["EXIT_ORPHANED", "end_with_parent"]

EXIT_ORPHANED: Final = 14
"""Exit code of a process whose parent has gone."""

_LOOK_EVERY_MS: Final = 60_000

_watching: list[int] = []
"""Ids of processes that watch; a fork inherits its parent's."""


def end_with_parent() -> None:
    """Starts the watch in a process that multiprocessing made; does nothing in any other, or a second time.

    EngineRefused if the kernel cannot tell (before Linux 5.3).
    """
    parent = multiprocessing.parent_process()
    if parent is None or parent.pid is None or os.getpid() in _watching:
        return
    _watching.append(os.getpid())
    try:
        descriptor = os.pidfd_open(parent.pid)
    except ProcessLookupError:
        _leave(parent.pid)
    except OSError as error:
        raise EngineRefused(
            f"elastickv cannot watch the parent process {parent.pid}: {error.strerror}; it needs Linux 5.3 or newer"
        ) from error
    if os.getppid() != parent.pid:  # it went before the descriptor was opened
        _leave(parent.pid)
    threading.Thread(target=_watch, args=(descriptor, parent.pid), name="elastickv-watch", daemon=True).start()


def _watch(descriptor: int, pid: int) -> None:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    while not poll.poll(_LOOK_EVERY_MS):
        continue
    _leave(pid)


def _leave(pid: int) -> None:
    """At once: the memory goes with the process, and there is nobody left to answer to."""
    sys.stderr.write(f"elastickv: process {pid}, the parent of {os.getpid()}, has ended; ending too\n")
    sys.stderr.flush()
    os._exit(EXIT_ORPHANED)
