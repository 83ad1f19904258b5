"""Bytes of a model's weights on each rank, from the checkpoint's files. Reads headers and sizes, never the weights."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from elastickv.errors import InvalidArgument, NotFound
from elastickv.planning.architecture import Architecture

__all__ = ["Checkpoint", "Tensor", "read_checkpoint", "stage_layers"]

_FLOATS: Final = frozenset({"F64", "F32", "F16", "BF16"})
_HEADER_LIMIT: Final = 100 * 1024 * 1024
"""The format's own limit of a header, in bytes (safetensors)."""
_VOCABULARY_STEP: Final = 64
"""Engines pad the vocabulary to a multiple of this, so that ranks can split it (vLLM's VocabParallelEmbedding)."""

_LAYER: Final = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")
_TOWER: Final = re.compile(r"(?:^|\.)(vision|visual|audio|multi_modal|mm_)")
_WHOLE: Final = re.compile(r"(?:^|\.)(gate|router|q_a_proj|kv_a_proj_with_mqa|shared_expert_gate)\.weight")
"""Matrices that every rank of tensor parallelism keeps whole: routers and the down-projections of latent attention."""
_KEYS_VALUES: Final = re.compile(r"\.[kv]_proj\.")
_EMBEDDING: Final = re.compile(r"(?:^|\.)(embed_tokens|wte|word_embeddings|lm_head|embed_out)\.")
_LAST: Final = re.compile(r"(?:^|\.)(lm_head|embed_out|final_layernorm|norm|ln_f)\.")


@dataclass(frozen=True)
class Tensor:
    """One tensor of a safetensors file. `stored` in bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    stored: int


@dataclass(frozen=True)
class Checkpoint:
    """What lies in a model's folder. Without `tensors` only the sum is known."""

    source: str
    """For people: "2 safetensors files"."""
    stored: int
    """Bytes of all weights as they are stored."""
    tensors: tuple[Tensor, ...] = ()
    as_stored: bool = False
    """Whether an engine keeps the weights in memory as they are in the file, whatever type it computes in."""

    def rank_bytes(self, model: Architecture, *, tp: int = 1, pp: int = 1, width: int | None = None) -> tuple[int, ...]:
        """Bytes of the weights on a rank, for each pipeline stage; the ranks of one stage are alike.

        `width`: bytes of the type the engine computes in; None: the configuration's, or 2 where that has 4 (engines
        load float32 models in 16 bits unless told otherwise). Quantised models stay as they are stored.
        """
        width = width or min(2, model.dtype_bytes)
        if not self.tensors:
            total = self.stored if model.quantisation or self.as_stored else self.stored * width // model.dtype_bytes
            return tuple(math.ceil(total / tp / pp) for _ in range(pp))
        stages = stage_layers(len(model.layers), pp)
        found = [0.0] * pp
        seen_head = any(_EMBEDDING.search(t.name) and "embed_tokens" not in t.name for t in self.tensors)
        for tensor in self.tensors:
            cost = _rank_cost(tensor, model, tp, width)
            for stage in _stages_of(tensor, model, stages, seen_head):
                found[stage] += cost
        return tuple(math.ceil(size) for size in found)


def stage_layers(layers: int, pp: int) -> list[range]:
    """Which layers each of `pp` stages has: vLLM's split, the rest going to stages before the last, from behind."""
    counts = [layers // pp] * pp
    for i in range(2, layers % pp + 2):
        counts[-i] += 1
    starts = [sum(counts[:i]) for i in range(pp)]
    return [range(start, start + count) for start, count in zip(starts, counts, strict=True)]


def _rank_cost(tensor: Tensor, model: Architecture, tp: int, width: int) -> float:
    cast = not model.quantisation and tensor.dtype in _FLOATS
    size = math.prod(tensor.shape) * width if cast else tensor.stored
    if len(tensor.shape) < 2 or _WHOLE.search(tensor.name):
        return size
    if _EMBEDDING.search(tensor.name):
        rows = tensor.shape[0]
        return size * (math.ceil(rows / _VOCABULARY_STEP) * _VOCABULARY_STEP) / rows / tp
    if _KEYS_VALUES.search(tensor.name) and not _TOWER.search(tensor.name):
        return size / min(tp, max(1, model.kv_heads))
    return size / tp


def _stages_of(tensor: Tensor, model: Architecture, stages: list[range], seen_head: bool) -> list[int]:
    """The stages that load the tensor; none for a drafter's layers behind the model's own, and for a tied head."""
    last = len(stages) - 1
    if not _TOWER.search(tensor.name):
        layer = _LAYER.search(tensor.name)
        if layer:
            return [i for i, stage in enumerate(stages) if int(layer[1]) in stage]
        if _LAST.search(tensor.name):
            return [] if model.tied and "lm_head" in tensor.name else [last]
        if "embed_tokens" in tensor.name and last > 0 and (model.tied or not seen_head):
            return [0, last]
    return [0]


def read_checkpoint(folder: Path) -> Checkpoint:
    """Looks for safetensors files, PyTorch's, then GGUF. NotFound where there is neither a file nor an index."""
    for look in (_safetensors, _pickled, _gguf):
        found = look(folder)
        if found is not None:
            return found
    raise NotFound(
        f"plan: no checkpoint in {folder}: neither *.safetensors, *.bin, *.gguf nor model.safetensors.index.json; "
        "download the checkpoint, or its index, which is small",
        path=str(folder),
    )


def _index(file: Path) -> tuple[set[str], int | None] | None:
    """The files that an index names, and the sum it says; None without an index."""
    if not file.is_file():
        return None
    try:
        table: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        names = {str(name) for name in table["weight_map"].values()}
        total = (table.get("metadata") or {}).get("total_size")
        return names, None if total is None else int(total)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidArgument(f"plan: {file} is not an index of a checkpoint: {error}", path=str(file)) from None


def _safetensors(folder: Path) -> Checkpoint | None:
    listed = _index(folder / "model.safetensors.index.json")
    there = {file.name for file in folder.glob("*.safetensors") if not file.name.startswith("consolidated")}
    if listed is not None:
        names, total = listed
        if not names <= there:
            if total is None:
                missing = ", ".join(sorted(names - there)[:3])
                raise NotFound(f"plan: {folder} lacks {missing}, and its index says no total_size; complete it")
            return Checkpoint("the checkpoint's index", total)
        there = names
    if not there:
        return None
    tensors = tuple(tensor for name in sorted(there) for tensor in _header(folder / name))
    source = f"{len(there)} safetensors file{'s' if len(there) > 1 else ''}"
    return Checkpoint(source, sum(tensor.stored for tensor in tensors), tensors)


def _header(file: Path) -> list[Tensor]:
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 2 <= length <= _HEADER_LIMIT:
                raise ValueError(f"a header of {length} bytes")
            table = json.loads(stream.read(length))
        rows = [(name, row) for name, row in table.items() if name != "__metadata__"]
        tensors = [
            Tensor(name, row["dtype"], tuple(row["shape"]), row["data_offsets"][1] - row["data_offsets"][0])
            for name, row in rows
        ]
        end = 8 + length + max((row["data_offsets"][1] for _, row in rows), default=0)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise InvalidArgument(f"plan: {file} is not a safetensors file: {error}", path=str(file)) from None
    if file.stat().st_size < end:
        raise InvalidArgument(f"plan: {file} ends early, at {file.stat().st_size} of {end} bytes; download it again")
    return tensors


def _pickled(folder: Path) -> Checkpoint | None:
    listed = _index(folder / "pytorch_model.bin.index.json")
    if listed is not None and listed[1] is not None:
        return Checkpoint("the checkpoint's index", listed[1])
    files = sorted(folder.glob("pytorch_model*.bin"))
    return Checkpoint(f"{len(files)} .bin files", sum(file.stat().st_size for file in files)) if files else None


def _gguf(folder: Path) -> Checkpoint | None:
    files = sorted(folder.glob("*.gguf"))
    stems = {re.sub(r"-\d{5}-of-\d{5}$", "", file.stem) for file in files}
    if len(stems) > 1:
        raise InvalidArgument(f"plan: {folder} holds {len(stems)} models: {', '.join(sorted(stems))}; keep one of them")
    if not files:
        return None
    return Checkpoint(f"{len(files)} .gguf files", sum(file.stat().st_size for file in files), as_stored=True)
