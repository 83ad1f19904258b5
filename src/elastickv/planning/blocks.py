"""Blocks of a model's cache on each rank: tokens a block, bytes a block, spans, groups of layers.

The counting follows vLLM 0.32 and 0.33: layers that keep the same kind of memory form groups of equal length, every
group draws its blocks from one pool, and a block is as large as the longest group. A state is padded to the size of an
attention layer's part of a block, and the block is made long enough for the state to fit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from elastickv.errors import InvalidArgument
from elastickv.memory import RankGeometry
from elastickv.planning.architecture import Architecture, Kind, Layer
from elastickv.planning.checkpoint import stage_layers

__all__ = ["LEAST_PART", "CacheShape", "Group", "Serving", "cache_shape", "tokens_for"]

LEAST_PART: Final = 16 * 1024
"""Bytes of one layer's part of a block. In a block-outermost layout the parts of one layer lie a block apart; reading
such parts costs nothing on an H100 while they have 16 KiB, and a fifth of the bandwidth at 8 KiB (docs/design.md)."""

_MOST_TOKENS: Final = 64
"""Prefixes are shared by whole blocks, so a block must not grow without bound."""

_GPU_TOKENS: Final = 16
_LATENT_FP8_TOKENS: Final = 64
"""On Hopper vLLM serves latent attention with an 8-bit cache through FlashMLA, which has blocks of 64 tokens."""
_HOST_TOKENS: Final = 128
_HOST_LATENT_TOKENS: Final = 16
_GPU_KERNEL: Final = 16
_HOST_KERNEL: Final = 32
"""vLLM's defaults, and the multiple that its attention kernels need."""


@dataclass(frozen=True)
class Serving:
    """How an engine serves the model."""

    on_gpu: bool = True
    tp: int = 1
    pp: int = 1
    width: int = 2
    """Bytes of an element of the type that the engine computes in, and of states that name no type of their own."""
    kv_width: int = 2
    """Bytes of an element of the cache."""
    block_tokens: int | None = None
    """None: the engine's choice."""
    block_outermost: bool = True
    caching: bool = True
    """Whether prefixes are cached; a sequence then has a second state, to start others from."""
    in_flight: int = 16384
    """Tokens of all steps that may be under way at once; blocks behind a window go only when they are through."""
    hold_windows: bool = False
    """Whether blocks behind a window stay until the request ends."""


@dataclass(frozen=True)
class Group:
    """Layers that have their blocks in common: `layers` are indices in the model."""

    kind: Kind
    layers: tuple[int, ...]
    window: int = 0


@dataclass(frozen=True)
class CacheShape:
    """One model's cache as it is served. Sizes in bytes."""

    serving: Serving
    block_tokens: int
    part_bytes: int
    """Of one layer in a block."""
    state_bytes: int
    """Of one layer's state on one rank, before it is padded to part_bytes; 0 without states."""
    groups: tuple[Group, ...]
    stages: tuple[RankGeometry, ...]
    """One for each pipeline stage; the ranks of a stage are alike."""

    @property
    def block_bytes(self) -> int:
        """Of a block on the rank that keeps most of it, all spans together."""
        return max(stage.spans * stage.block_bytes for stage in self.stages)

    @property
    def growing(self) -> int:
        """Groups that take a block for every block_tokens tokens, however long the sequence."""
        return sum(self._grows(group) for group in self.groups)

    @property
    def token_bytes(self) -> float:
        """What one more token of a long sequence takes on the rank that keeps most of it."""
        return self.growing * self.block_bytes / self.block_tokens

    def blocks_of(self, tokens: int) -> int:
        """Blocks that an engine wants to have for one sequence of that many tokens before it admits it."""
        return sum(self._blocks(group, tokens) for group in self.groups)

    def peak_of(self, tokens: int) -> int:
        """The most blocks that a prompt of that many tokens has at a time when it is computed alone.

        It differs from blocks_of where windows are given back: a step's tokens come on top of a window, and the last
        step may be a short one.
        """
        step = self.serving.in_flight
        whole = tokens // step * step
        moments = [(tokens, whole)] if tokens > whole else []
        moments += [(whole, whole - step)] if whole else []
        return max(sum(self._at(group, *moment) for group in self.groups) for moment in moments)

    def _at(self, group: Group, tokens: int, before: int) -> int:
        """Blocks of a group in the step that computes the tokens from `before` to `tokens`."""
        if group.kind is Kind.STATE or self._grows(group):
            return self._blocks(group, tokens)
        behind = before - group.window + 1 if group.kind is Kind.WINDOW else before // group.window * group.window
        return math.ceil(tokens / self.block_tokens) - max(0, behind) // self.block_tokens

    @property
    def fixed_blocks(self) -> int:
        """The most blocks of a sequence in groups that do not grow with it: windows and states."""
        return sum(self._blocks(group, 1 << 40) for group in self.groups if not self._grows(group))

    def _grows(self, group: Group) -> bool:
        windowed = group.kind in (Kind.WINDOW, Kind.CHUNK)
        return group.kind is not Kind.STATE and (not windowed or self.serving.hold_windows)

    def _blocks(self, group: Group, tokens: int) -> int:
        if group.kind is Kind.STATE:
            return 2 if self.serving.caching else 1
        if self._grows(group):
            return math.ceil(tokens / self.block_tokens)
        if group.kind is Kind.CHUNK:
            return math.ceil(min(group.window + self.serving.in_flight, tokens) / self.block_tokens)
        # One more: a window may begin in the middle of a block.
        return math.ceil(min(group.window - 1 + self.serving.in_flight, tokens) / self.block_tokens) + 1


def tokens_for(token_bytes: int, tokens: int) -> int:
    """The block size, at least `tokens`, for a model with `token_bytes` bytes a token in one layer of one rank."""
    while token_bytes * tokens < LEAST_PART and tokens < _MOST_TOKENS:
        tokens *= 2
    return tokens


def cache_shape(model: Architecture, serving: Serving) -> CacheShape:
    """The shape of the model's cache. InvalidArgument where it cannot be served like that."""
    if serving.tp < 1 or serving.pp < 1:
        raise InvalidArgument(f"plan: {serving.tp} x {serving.pp} ranks; --tp and --pp must be at least 1")
    attention = next((layer for layer in model.layers if layer and layer.kind is not Kind.STATE), None)
    if attention is None:
        raise InvalidArgument(f"plan: {model.name} has no attention layers, so there is no cache of blocks to plan")
    _check_split(model, serving.tp)
    per_token = max(1, attention.heads // serving.tp) * attention.width * serving.kv_width
    states = [layer.state for layer in model.layers if layer and layer.state]
    state = max((one.rank_bytes(serving.tp, serving.width) for one in states), default=0)
    tokens = _tokens(model, serving, per_token, state)
    part = tokens * per_token
    groups = _groups(model)
    stages = []
    for layers in stage_layers(len(model.layers), serving.pp):
        most = max(sum(index in layers for index in group.layers) for group in groups)
        if not most:
            raise InvalidArgument(
                f"plan: with --pp {serving.pp} a stage of {model.name} has no cache; use fewer stages"
            )
        stages.append(RankGeometry("", 1, most * part) if serving.block_outermost else RankGeometry("", most, part))
    return CacheShape(serving, tokens, part, state, groups, tuple(stages))


def _check_split(model: Architecture, tp: int) -> None:
    heads = model.kv_heads
    if not model.is_latent and max(heads, tp) % min(heads, tp):
        raise InvalidArgument(f"plan: {heads} KV heads of {model.name} cannot be split over --tp {tp} ranks")


def _tokens(model: Architecture, serving: Serving, per_token: int, state: int) -> int:
    default = _default_tokens(model, serving, per_token)
    tokens = serving.block_tokens or default
    if not state:
        return tokens
    kernel = _GPU_KERNEL if serving.on_gpu else _HOST_KERNEL
    step = max(kernel, tokens)
    needed = step * math.ceil(state / (step * per_token))
    return max(tokens, kernel * math.ceil(needed / kernel))


def _default_tokens(model: Architecture, serving: Serving, per_token: int) -> int:
    if model.is_latent:
        if not serving.on_gpu:
            return _HOST_LATENT_TOKENS
        return _LATENT_FP8_TOKENS if serving.kv_width == 1 else _GPU_TOKENS
    if not serving.on_gpu:
        return _HOST_TOKENS
    raised = serving.block_outermost and not model.has_state
    return tokens_for(per_token, _GPU_TOKENS) if raised else _GPU_TOKENS


def _groups(model: Architecture) -> tuple[Group, ...]:
    """Groups of equal length: as long as the rarest kind, or as the most frequent one where that is hardly longer."""
    buckets: dict[Kind, list[int]] = {}
    layers: list[Layer | None] = list(model.layers)
    for index, layer in enumerate(layers):
        if layer is not None:
            buckets.setdefault(layer.kind, []).append(index)
    least, most = min(map(len, buckets.values())), max(map(len, buckets.values()))
    length = most if most < least * 1.5 else least
    groups = []
    for kind, indices in buckets.items():
        count = math.ceil(len(indices) / length)
        first = layers[indices[0]]
        window = first.window if first is not None else 0
        # Every count-th layer, so that each pipeline stage has its part of every group.
        groups += [Group(kind, tuple(indices[i::count]), window) for i in range(count)]
    return tuple(groups)
