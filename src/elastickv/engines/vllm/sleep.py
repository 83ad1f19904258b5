"""Sleep: the cache's memory is not vLLM's to save or restore. vLLM empties it first; the idle clock does the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm.logger import init_logger

__all__ = ["worker_sleep"]

_logger = init_logger("vllm.elastickv")

_GREW = "Memory usage increased after sleeping."


def worker_sleep(original: Callable[..., Any]) -> Callable[..., Any]:
    """vLLM compares the device's free memory before and after; a neighbour that grew meanwhile is no failure."""

    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return original(self, *args, **kwargs)
        except AssertionError as error:
            if str(error) != _GREW:
                raise
            _logger.info("elastickv: other processes on the device took more memory than this sleep has freed")
            return None

    return wrapped
