"""Layers that keep a state per sequence, nothing per token: convolutions, state spaces, linear attention."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from elastickv.errors import InvalidArgument

__all__ = ["Part", "State", "state_of"]

_WIDTHS: Final = {"auto": None, "float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Part:
    """One tensor of a state. `elements` are split over the ranks of tensor parallelism."""

    elements: int
    width: int | None = None
    """Bytes of an element; None: as the model's own type."""
    group_elements: int = 0
    """Elements of one group, and..."""
    groups: int = 0
    """...how many groups there are; where the ranks do not divide them, each rank keeps one of its own."""

    def rank_bytes(self, tp: int, width: int) -> int:
        """Bytes on one of `tp` ranks, for a model whose type has `width` bytes."""
        groups = self.groups if self.groups % tp == 0 else tp
        return (self.elements + groups * self.group_elements) // tp * (self.width or width)


@dataclass(frozen=True)
class State:
    """What one layer keeps of one sequence."""

    parts: tuple[Part, ...]

    def rank_bytes(self, tp: int, width: int) -> int:
        """Bytes on one of `tp` ranks, for a model whose type has `width` bytes."""
        return sum(part.rank_bytes(tp, width) for part in self.parts)


def state_of(text: Mapping[str, Any], model: str) -> State:
    """The state of a layer of this model. InvalidArgument for a model that is not known here."""
    reader = _READERS.get(model)
    if reader is None:
        known = ", ".join(sorted(_READERS))
        raise InvalidArgument(f"the states of the model type {model!r} are not known; known are {known}")
    try:
        return reader(text)
    except KeyError as error:
        raise InvalidArgument(f"the field {error.args[0]} is missing", field=str(error.args[0])) from None


def _width(text: Mapping[str, Any], field: str, default: str) -> int | None:
    word = str(text.get(field) or default)
    if word not in _WIDTHS:
        raise InvalidArgument(f"{field} is {word!r}, none of {', '.join(_WIDTHS)}", field=field)
    return _WIDTHS[word]


def _short_convolution(text: Mapping[str, Any]) -> State:
    dimension = text.get("conv_dim") or text["hidden_size"]
    return State((Part(dimension * (text["conv_L_cache"] - 1)),))


def _delta_net(text: Mapping[str, Any]) -> State:
    keys, values = text["linear_num_key_heads"], text["linear_num_value_heads"]
    key, value = text["linear_key_head_dim"], text["linear_value_head_dim"]
    width = _width(text, "mamba_ssm_dtype", "auto")
    convolution = Part((2 * key * keys + value * values) * (text["linear_conv_kernel_dim"] - 1))
    return State((convolution, Part(values * value * key, width)))


def _mamba2(
    *, inner: int, groups: int, heads: int, head: int, state: int, kernel: int, width: int | None = None
) -> State:
    convolution = Part(inner * (kernel - 1), group_elements=2 * state * (kernel - 1), groups=groups)
    return State((convolution, Part(heads * head * state, width)))


def _granite(text: Mapping[str, Any]) -> State:
    return _mamba2(
        inner=text["mamba_expand"] * text["hidden_size"],
        groups=text["mamba_n_groups"],
        heads=text["mamba_n_heads"],
        head=text["mamba_d_head"],
        state=text["mamba_d_state"],
        kernel=text["mamba_d_conv"],
    )


def _nemotron(text: Mapping[str, Any]) -> State:
    return _mamba2(
        inner=text["mamba_num_heads"] * text["mamba_head_dim"],
        groups=text["n_groups"],
        heads=text["mamba_num_heads"],
        head=text["mamba_head_dim"],
        state=text["ssm_state_size"],
        kernel=text["conv_kernel"],
        width=_width(text, "mamba_ssm_cache_dtype", "float32"),
    )


_READERS: Final[Mapping[str, Callable[[Mapping[str, Any]], State]]] = {
    "lfm2": _short_convolution,
    "lfm2_moe": _short_convolution,
    "qwen3_next": _delta_net,
    "qwen3_5_text": _delta_net,
    "qwen3_5_moe_text": _delta_net,
    "granitemoehybrid": _granite,
    "nemotron_h": _nemotron,
}
