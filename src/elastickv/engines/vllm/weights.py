"""How many bytes the weights of a model take on each rank, before it is loaded. Reads headers, never weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vllm.logger import init_logger

from elastickv.errors import InvalidArgument, NotFound
from elastickv.planning.architecture import Architecture, architecture_of
from elastickv.planning.checkpoint import Checkpoint, Tensor, read_checkpoint

__all__ = ["of_ranks"]

_logger = init_logger("vllm.elastickv")


def of_ranks(config: Any) -> list[int]:
    """Bytes by rank for the engine with this VllmConfig, from the files that it will load.

    Where there are none yet, or dummy weights are asked for, parameters are counted on PyTorch's meta device, which
    knows nothing of quantisation: then it is too much. Where that fails too it is 0, corrected once all is loaded.
    """
    parallel = config.parallel_config
    tp, pp = parallel.tensor_parallel_size, parallel.pipeline_parallel_size
    stages = _of_model(config.model_config, config.load_config, tp, pp)
    drafter = getattr(config.speculative_config, "draft_model_config", None)
    if drafter is not None and drafter.model != config.model_config.model:
        stages[-1] += _of_model(drafter, config.load_config, tp, 1)[0]
    return [stages[rank // tp] for rank in range(tp * pp)]


def _of_model(model: Any, load: Any, tp: int, pp: int) -> list[int]:
    """By pipeline stage."""
    width = model.dtype.itemsize
    folder = _folder(model) if load.load_format != "dummy" else None
    if folder is not None and folder.is_file():  # a GGUF file
        found: Checkpoint | None = Checkpoint("one file", folder.stat().st_size, as_stored=True)
    else:
        found = _checkpoint(folder) or _on_meta(model)
    if found is None:
        return [0] * pp
    try:
        shape: Architecture = architecture_of(model.hf_config.to_dict(), str(model.model))
        return list(found.rank_bytes(shape, tp=tp, pp=pp, width=width))
    except InvalidArgument as error:  # a model of a kind that is not known: all ranks alike
        _logger.info("elastickv splits the weights evenly: %s", error.message)
        return [-(-found.stored // (tp * pp))] * pp


def _folder(model: Any) -> Path | None:
    """Where the model's files are, or None: they are not on this machine yet."""
    path = Path(model.model)
    if path.exists():
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(model.model), revision=model.revision, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError):
        return None


def _checkpoint(folder: Path | None) -> Checkpoint | None:
    if folder is None:
        return None
    try:
        return read_checkpoint(folder)
    except (NotFound, InvalidArgument) as error:
        _logger.info("elastickv cannot size the checkpoint: %s", error.message)
        return None


def _on_meta(model: Any) -> Checkpoint | None:
    """The parameters that the configuration alone leads to, in the names that a checkpoint would have."""
    import torch
    import transformers

    width = model.dtype.itemsize
    try:
        with torch.device("meta"):
            made = transformers.AutoModelForCausalLM.from_config(model.hf_text_config)
    except Exception as error:  # noqa: BLE001 - whatever transformers cannot do here, loading will show the size
        _logger.warning("elastickv cannot tell the size of the weights before they are loaded: %s", error)
        return None
    parameters = made.named_parameters()
    tensors = tuple(Tensor(name, "BF16", tuple(one.shape), one.numel() * width) for name, one in parameters)
    return Checkpoint("the configuration", sum(tensor.stored for tensor in tensors), tensors)
