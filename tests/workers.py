"""Two workers of pytest-xdist: which tests run beside each other. Most engines of these tests are bound to one core."""

from __future__ import annotations

from typing import Any, Final

__all__ = ["order", "scheduler"]

ALONE: Final = ("tests/engines/test_two_engines.py", "tests/engines/test_two_kinds.py")
"""Of the engine tests, those that want both cores or measure time."""
FIRST: Final = ("tests/native/", "tests/test_packaging.py")
"""Of the tests that run alone: these measure nothing, so they may still meet the other worker's last engine."""


def beside(nodeid: str) -> bool:
    """Whether a test may run while the other worker runs an engine."""
    return nodeid.startswith("tests/engines/") and not nodeid.startswith(ALONE)


def order(nodeid: str) -> tuple[bool, bool]:
    """To sort by: what runs beside each other comes first."""
    return not beside(nodeid), not nodeid.startswith(FIRST)


def scheduler(config: Any, log: Any) -> Any:
    """Hands out the files that run beside each other, one at a time, and then all other tests to one worker."""
    from xdist.scheduler import LoadScopeScheduling

    class EnginesBesideEachOther(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            return nodeid.partition("::")[0] if beside(nodeid) else "alone"

    return EnginesBesideEachOther(config, log)
