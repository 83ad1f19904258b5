"""elastickv's metrics on the engine's own /metrics page, see engines/metrics.py.

vLLM's API server asks get_prometheus_registry() for what it shows, which is the process's own registry. With several
API servers the page makes a registry of their common files at each scrape.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Any, Final

from elastickv.config import Settings
from elastickv.engines import seams
from elastickv.engines.metrics import of_common_files, register

__all__ = ["hook"]

_PAGE: Final = "vllm.entrypoints.serve.instrumentator.metrics"
_logger = logging.getLogger("vllm.elastickv.metrics")


def hook(settings: Settings) -> None:
    """Has every registry that vLLM makes for its page show elastickv's metrics as well. Raises nothing."""
    name = "get_prometheus_registry"
    try:
        from vllm.v1.metrics import prometheus

        seams.wrap(prometheus, name, lambda original: _registry(original, settings))
        of_common_files(settings, _logger)
    except (ImportError, AttributeError) as error:
        _logger.warning("this vLLM's /metrics goes without elastickv's (%s); use `elastickv exporter`", error)
        return
    if _PAGE in sys.modules:  # it has the function under a name of its own already
        setattr(sys.modules[_PAGE], name, getattr(prometheus, name))


def _registry(original: Callable[..., Any], settings: Settings) -> Callable[..., Any]:
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        registry = original(*args, **kwargs)
        register(registry, settings, _logger)
        return registry

    return wrapped
