"""What a model's config.json says of its layers: which kind of memory each one keeps, and how much of it a token.

Reads the format of Hugging Face's configurations. What a field means is taken from the engines that serve such models;
a model whose layers keep something this module does not know is refused by name rather than counted wrong.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Final

from elastickv.errors import InvalidArgument, NotFound
from elastickv.planning.states import State, state_of

__all__ = ["Architecture", "Kind", "Layer", "architecture_of", "read_architecture"]


class Kind(Enum):
    """What a layer keeps."""

    FULL = "full attention"
    WINDOW = "sliding window"
    CHUNK = "chunked attention"
    LATENT = "latent attention (MLA)"
    STATE = "state"


@dataclass(frozen=True)
class Layer:
    """One layer's cache, of the whole model before it is split over ranks."""

    kind: Kind
    heads: int = 0
    """KV heads; 1 for latent attention, which every rank keeps whole."""
    width: int = 0
    """Elements of one token in one head, keys and values together."""
    window: int = 0
    """Tokens that are kept: the window, or the chunk."""
    state: State | None = None


@dataclass(frozen=True)
class Architecture:
    """One model. `dtype_bytes` is of the weights as the configuration names their type."""

    name: str
    model_type: str
    layers: tuple[Layer | None, ...]
    """None: a layer without memory of its own (an MLP block of a model that lists such blocks as layers)."""
    dtype_bytes: int
    kv_heads: int
    head_size: int
    vocabulary: int
    max_length: int | None
    """Tokens that the configuration allows, None where it does not say."""
    quantisation: str | None
    experts: int
    tied: bool
    rotary: int = 0
    """Elements of the tables of rotary positions, which every rank keeps whole and no checkpoint has."""

    @property
    def is_latent(self) -> bool:
        """Whether attention is of the latent kind (MLA)."""
        return any(layer is not None and layer.kind is Kind.LATENT for layer in self.layers)

    @property
    def has_state(self) -> bool:
        """Whether layers keep a state per sequence beside tokens."""
        return any(layer is not None and layer.kind is Kind.STATE for layer in self.layers)

    def count(self, kind: Kind) -> int:
        """Layers of that kind."""
        return sum(layer is not None and layer.kind is kind for layer in self.layers)


_DTYPES: Final = {"float32": 4, "float": 4, "float16": 2, "half": 2, "bfloat16": 2}

_INNER: Final = ("text_config", "llm_config", "language_config")

_LATENT: Final = frozenset(
    {"deepseek_v2", "deepseek_v3", "deepseek_vl_v2", "kimi_k2", "glm4_moe_lite", "pangu_ultra_moe"}
)
"""Models whose kv_lora_rank means that the latent row is what is kept."""

_DEFAULTS: Final[Mapping[str, Mapping[str, Any]]] = {
    "gemma2": {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "sliding_window": 4096},
    "gemma3_text": {
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
        "max_position_embeddings": 131072,
    },
    "gpt_oss": {"sliding_window": 128},
    "llama4_text": {"attention_chunk_size": 8192},
}
"""What published configurations leave out because their class has it as a default (transformers 5)."""

_UNKNOWN_FIELDS: Final = ("index_topk", "compress_ratios", "rswa_window", "per_layer_config", "block_configs")
"""Fields of models that keep more than this module counts."""

_FULL_WORDS: Final = frozenset({"full_attention", "attention", "global_attention"})
_WINDOW_WORDS: Final = frozenset({"sliding_attention", "sliding_window"})
_CHUNK_WORDS: Final = frozenset({"chunked_attention"})
_STATE_WORDS: Final = frozenset({"linear_attention", "mamba", "conv", "recurrent"})
_EMPTY_WORDS: Final = frozenset({"moe", "mlp"})


def read_architecture(path: Path) -> Architecture:
    """Reads `path`, a model's folder or its config.json. NotFound or InvalidArgument, with the path, otherwise."""
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise NotFound(f"plan: no config.json at {path}; name a model's folder, or the file itself", path=str(path))
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InvalidArgument(f"plan: {file} cannot be read as JSON: {error}", path=str(file)) from None
    if not isinstance(config, dict):
        raise InvalidArgument(f"plan: {file} holds no JSON object; it must be a model's config.json", path=str(file))
    name = file.parent.resolve().name
    try:
        return architecture_of(config, name)
    except InvalidArgument as error:
        raise InvalidArgument(f"plan: {file}: {error.message}", **error.attributes) from None


def architecture_of(config: Mapping[str, Any], name: str) -> Architecture:
    """The architecture of a configuration. InvalidArgument names a field that is missing or not understood."""
    text = _text_config(config)
    model = str(text.get("model_type") or config.get("model_type") or "unknown")
    text = {**_DEFAULTS.get(model, {}), **{key: value for key, value in text.items() if value is not None}}
    for field in _UNKNOWN_FIELDS:
        if text.get(field):
            raise InvalidArgument(f"the model type {model!r} has {field}, which is not counted here", model_type=model)
    heads, size = _heads(text), _head_size(text)
    quantisation = config.get("quantization_config") or text.get("quantization_config") or {}
    return Architecture(
        name=name,
        model_type=model,
        layers=_layers(text, model, heads, size),
        dtype_bytes=_dtype_bytes(config, text),
        kv_heads=heads,
        head_size=size,
        vocabulary=_integer(text, "vocab_size", 0),
        max_length=_integer(text, "max_position_embeddings", 0) or None,
        quantisation=str(quantisation.get("quant_method")) if quantisation else None,
        experts=_experts(text),
        tied=bool(text.get("tie_word_embeddings", config.get("tie_word_embeddings", False))),
        rotary=_rotary(text, model, size),
    )


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    for name in _INNER:
        inner = config.get(name)
        if isinstance(inner, dict):
            return inner
    return config


def _integer(text: Mapping[str, Any], field: str, default: int | None = None) -> int:
    value = text.get(field, default)
    if value is None:
        raise InvalidArgument(f"the field {field} is missing", field=field)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise InvalidArgument(f"the field {field} is {value!r}, not a whole number", field=field)
    return value


def _heads(text: Mapping[str, Any]) -> int:
    for field in ("num_key_value_heads", "num_kv_heads", "n_head_kv", "multi_query_group_num", "num_attention_groups"):
        if isinstance(text.get(field), int):
            return _integer(text, field)
    return _integer(text, "num_attention_heads")


def _head_size(text: Mapping[str, Any]) -> int:
    if text.get("head_dim"):
        return _integer(text, "head_dim")
    heads = _integer(text, "num_attention_heads")
    if not heads:
        raise InvalidArgument("the field num_attention_heads is 0", field="num_attention_heads")
    return _integer(text, "hidden_size") // heads


def _dtype_bytes(config: Mapping[str, Any], text: Mapping[str, Any]) -> int:
    found = next((part[f] for part in (config, text) for f in ("dtype", "torch_dtype") if part.get(f)), "float32")
    width = _DTYPES.get(str(found).removeprefix("torch."))
    if width is None:
        raise InvalidArgument(f"the type {found!r} is none of {', '.join(sorted(_DTYPES))}", dtype=str(found))
    return width


def _rotary(text: Mapping[str, Any], model: str, head: int) -> int:
    """Cosines and sines for every position and half of the turned part of a head, in each kind of rotation."""
    if text.get("position_embedding_type", "rope") != "rope":
        return 0
    parameters = text.get("rope_parameters") or {}
    kinds = sum(isinstance(value, dict) for value in parameters.values()) or (2 if model == "gemma3_text" else 1)
    turned = text.get("qk_rope_head_dim") or int(head * text.get("partial_rotary_factor", 1))
    return _integer(text, "max_position_embeddings", 0) * int(turned) * kinds


def _experts(text: Mapping[str, Any]) -> int:
    for field in ("num_experts", "moe_num_experts", "n_routed_experts", "num_local_experts"):
        if isinstance(text.get(field), int):
            return int(text[field])
    return 0


def _layers(text: Mapping[str, Any], model: str, heads: int, size: int) -> tuple[Layer | None, ...]:
    if text.get("kv_lora_rank"):
        if model not in _LATENT:
            raise InvalidArgument(f"the model type {model!r} is not known to keep latent rows", model_type=model)
        row = _integer(text, "kv_lora_rank") + _integer(text, "qk_rope_head_dim")
        attention = Layer(Kind.LATENT, 1, row)
    else:
        attention = Layer(Kind.FULL, heads, 2 * size)
    return tuple(_layer(word, text, model, attention) for word in _words(text, model))


def _layer(word: str, text: Mapping[str, Any], model: str, attention: Layer) -> Layer | None:
    if word in _FULL_WORDS:
        return attention
    if word in _EMPTY_WORDS:
        return None
    if word in _WINDOW_WORDS:
        return Layer(Kind.WINDOW, attention.heads, attention.width, _integer(text, "sliding_window"))
    if word in _CHUNK_WORDS:
        return Layer(Kind.CHUNK, attention.heads, attention.width, _integer(text, "attention_chunk_size"))
    if word in _STATE_WORDS:
        return Layer(Kind.STATE, state=state_of(text, model))
    raise InvalidArgument(f"layers of the kind {word!r} are not known", kind=word)


def _words(text: Mapping[str, Any], model: str) -> list[str]:
    """One word a layer, in order."""
    if isinstance(text.get("hybrid_override_pattern"), str):
        marks = {"M": "mamba", "*": "full_attention", "-": "mlp", "E": "moe"}
        return [marks.get(mark, mark) for mark in text["hybrid_override_pattern"]]
    listed = text.get("layer_types") or text.get("layers_block_type")
    if isinstance(listed, list):
        return [str(word) for word in listed]
    count = _integer(text, "num_hidden_layers")
    if isinstance(text.get("full_attn_idxs"), list):
        return ["full_attention" if i in text["full_attn_idxs"] else "conv" for i in range(count)]
    if model == "llama4_text":
        every = _integer(text, "no_rope_layer_interval", 4)
        return ["full_attention" if (i + 1) % every == 0 else "chunked_attention" for i in range(count)]
    if model in ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"):
        every = _integer(text, "full_attention_interval", 4)
        return ["full_attention" if (i + 1) % every == 0 else "linear_attention" for i in range(count)]
    if model in ("gemma2", "gpt_oss"):
        return ["full_attention" if i % 2 else "sliding_attention" for i in range(count)]
    if text.get("sliding_window_pattern"):
        every = _integer(text, "sliding_window_pattern")
        return ["full_attention" if (i + 1) % every == 0 else "sliding_attention" for i in range(count)]
    if any(text.get(field) for field in ("mamba_d_state", "ssm_state_size", "state_size", "linear_attn_config")):
        raise InvalidArgument(f"the model type {model!r} keeps states, and does not say in which layers")
    if text.get("sliding_window") and text.get("use_sliding_window", True):
        return ["sliding_attention"] * count
    return ["full_attention"] * count
