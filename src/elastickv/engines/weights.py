"""How many bytes the weights of a model take on each rank, before it is loaded. Reads headers, never weights."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elastickv.errors import InvalidArgument, NotFound
from elastickv.planning.architecture import Architecture, architecture_of
from elastickv.planning.checkpoint import Checkpoint, Tensor, read_checkpoint

__all__ = ["Model", "by_stage"]


@dataclass(frozen=True)
class Model:
    """A model as an engine is about to load it. `path`: a folder, a file, or a name on a hub; `width`: bytes of the
    type that it computes in; `config`, `text_config`: transformers' own; `from_files`: not with dummy weights.
    """

    path: str
    revision: str | None
    width: int
    config: Any
    text_config: Any
    from_files: bool


def by_stage(model: Model, tp: int, pp: int, logger: logging.Logger) -> list[int]:
    """Bytes of a rank for each pipeline stage, from the files that will be loaded; the ranks of a stage are alike.

    Where there are none yet, or dummy weights are asked for, parameters are counted on PyTorch's meta device, which
    knows nothing of quantisation: then it is too much. Where that fails too it is 0, corrected once all is loaded.
    """
    folder = _folder(model) if model.from_files else None
    if folder is not None and folder.is_file():  # a GGUF file
        found: Checkpoint | None = Checkpoint("one file", folder.stat().st_size, as_stored=True)
    else:
        found = _checkpoint(folder, logger) or _on_meta(model, logger)
    if found is None:
        return [0] * pp
    try:
        shape: Architecture = architecture_of(model.config.to_dict(), model.path)
        return list(found.rank_bytes(shape, tp=tp, pp=pp, width=model.width))
    except InvalidArgument as error:  # a model of a kind that is not known: all ranks alike
        logger.info("elastickv splits the weights evenly: %s", error.message)
        return [-(-found.stored // (tp * pp))] * pp


def _folder(model: Model) -> Path | None:
    """Where the model's files are, or None: they are not on this machine yet."""
    path = Path(model.path)
    if path.exists():
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model.path, revision=model.revision, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError):
        return None


def _checkpoint(folder: Path | None, logger: logging.Logger) -> Checkpoint | None:
    if folder is None:
        return None
    try:
        return read_checkpoint(folder)
    except (NotFound, InvalidArgument) as error:
        logger.info("elastickv cannot size the checkpoint: %s", error.message)
        return None


def _on_meta(model: Model, logger: logging.Logger) -> Checkpoint | None:
    """The parameters that the configuration alone leads to, in the names that a checkpoint would have."""
    import torch
    import transformers

    try:
        with torch.device("meta"):
            made = transformers.AutoModelForCausalLM.from_config(model.text_config)
    except Exception as error:  # noqa: BLE001 - whatever transformers cannot do here, loading will show the size
        logger.warning("elastickv cannot tell the size of the weights before they are loaded: %s", error)
        return None
    parameters = made.named_parameters()
    tensors = tuple(Tensor(name, "BF16", tuple(one.shape), one.numel() * model.width) for name, one in parameters)
    return Checkpoint("the configuration", sum(tensor.stored for tensor in tensors), tensors)
