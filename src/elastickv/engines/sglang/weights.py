"""How many bytes the weights of an engine take on each rank, before they are loaded."""

from __future__ import annotations

import logging
from typing import Any

from elastickv.engines.weights import Model, by_stage

__all__ = ["of_ranks"]


def of_ranks(model: Any, load_format: str, tp: int, pp: int, logger: logging.Logger) -> list[int]:
    """Bytes by rank for the engine with SGLang's ModelConfig `model`; see engines/weights.py."""
    stages = by_stage(
        Model(
            str(model.model_path),
            model.revision,
            model.dtype.itemsize,
            model.hf_config,
            model.hf_text_config,
            load_format != "dummy",
        ),
        tp,
        pp,
        logger,
    )
    return [stages[rank // tp] for rank in range(tp * pp)]
