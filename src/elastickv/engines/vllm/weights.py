"""How many bytes the weights of a model take on each rank, before it is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vllm.logger import init_logger

__all__ = ["of_ranks"]

_logger = init_logger("vllm.elastickv")


def of_ranks(config: Any) -> list[int]:
    """Bytes by rank for the engine with this VllmConfig, from the files that it will load."""
    parallel = config.parallel_config
    world = parallel.world_size
    folder = _folder(config)
    total = _files(folder) if folder is not None else 0
    return [-(-total // world)] * world


def _folder(config: Any) -> Path | None:
    """Where the model's files are, or None: they are not here yet, or none are read."""
    model = config.model_config
    path = Path(model.model)
    if config.load_config.load_format == "dummy":
        return None
    if path.exists():
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model.model, revision=model.revision, local_files_only=True))
    except LocalEntryNotFoundError:
        return None


def _files(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    for pattern in ("*.safetensors", "*.bin", "*.pt"):
        files = list(path.glob(pattern))
        if files:
            return sum(file.stat().st_size for file in files)
    return 0
