"""How many bytes the weights of an engine take on each rank, before they are loaded."""

from __future__ import annotations

from typing import Any

from vllm.logger import init_logger

from elastickv.engines.weights import Model, by_stage

__all__ = ["of_ranks"]

_logger = init_logger("vllm.elastickv")


def of_ranks(config: Any) -> list[int]:
    """Bytes by rank for the engine with this VllmConfig, a drafter's on the last stage; see engines/weights.py."""
    parallel = config.parallel_config
    tp, pp = parallel.tensor_parallel_size, parallel.pipeline_parallel_size
    stages = by_stage(_model(config.model_config, config.load_config), tp, pp, _logger)
    drafter = getattr(config.speculative_config, "draft_model_config", None)
    if drafter is not None and drafter.model != config.model_config.model:
        stages[-1] += by_stage(_model(drafter, config.load_config), tp, 1, _logger)[0]
    return [stages[rank // tp] for rank in range(tp * pp)]


def _model(model: Any, load: Any) -> Model:
    from_files = load.load_format != "dummy"
    return Model(
        str(model.model), model.revision, model.dtype.itemsize, model.hf_config, model.hf_text_config, from_files
    )
