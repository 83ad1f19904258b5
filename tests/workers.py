"""Two workers of pytest-xdist: which tests run beside each other. Most engines of these tests are bound to one core."""

from __future__ import annotations

from typing import Any, Final

__all__ = ["order", "scheduler"]

BESIDE: Final = (
    "tests/native/",
    "tests/test_packaging.py",
    "tests/gateway/test_gateway_sglang.py",
    "tests/gateway/test_gateway_vllm.py",
    "tests/engines/",
)
"""They measure nothing that a busy core would change, and take their turns in this order, the longest first."""
ALONE: Final = ("tests/engines/test_two_engines.py", "tests/engines/test_two_kinds.py")
"""Of the engine tests, those that want both cores or measure time."""
FIRST: Final = "tests/bench/test_small_runs.py"
"""Of the tests that run alone: it may still meet the other worker's last engine."""


def beside(nodeid: str) -> bool:
    """Whether a test may run while the other worker runs an engine."""
    return nodeid.startswith(BESIDE) and not nodeid.startswith(ALONE)


def order(nodeid: str) -> tuple[int, bool]:
    """To sort by: what runs beside each other comes first."""
    turn = next((i for i, prefix in enumerate(BESIDE) if nodeid.startswith(prefix)), 0)
    return (turn if beside(nodeid) else len(BESIDE), not nodeid.startswith(FIRST))


def scheduler(config: Any, log: Any) -> Any:
    """Hands out the files that run beside each other, one at a time, and then all other tests to one worker."""
    from xdist.scheduler import LoadScopeScheduling

    class EnginesBesideEachOther(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            return nodeid.partition("::")[0] if beside(nodeid) else "alone"

    return EnginesBesideEachOther(config, log)
