"""A GGUF file of the llama architecture written as a Hugging Face folder: weights, configuration, tokenizer.

GGUF is the file format of llama.cpp. Only what SmolLM2 uses is covered; anything else is refused by name.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from elastickv.errors import InvalidArgument

__all__ = ["FORMAT", "write_folder"]

FORMAT: Final = 1
"""Goes up when a folder written by an earlier version must be written again."""

_OUTER: Final = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
_INNER: Final = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CONTROL_TOKEN: Final = 3
"""The value of tokenizer.ggml.token_type for a token that stands for no text."""


def write_folder(source: Path, folder: Path, name: str) -> None:
    """Reads the GGUF file `source` and writes config.json, model.safetensors and the tokenizer's files.

    InvalidArgument if the file is of another architecture, or holds a tensor that the architecture does not have.
    """
    import gguf

    reader = gguf.GGUFReader(source)
    data: dict[str, Any] = {key: field.contents() for key, field in reader.fields.items()}
    if data.get("general.architecture") != "llama" or data.get("tokenizer.ggml.pre") != "smollm":
        kind = f"{data.get('general.architecture')!r} with tokenizer {data.get('tokenizer.ggml.pre')!r}"
        raise InvalidArgument(f"{source}: {kind} cannot be converted; only 'llama' with 'smollm' can")
    _write_weights(reader, data, folder)
    _write_json(folder / "config.json", _configuration(data, name))
    _write_json(
        folder / "generation_config.json",
        {"bos_token_id": _id(data, "bos"), "eos_token_id": _id(data, "eos"), "pad_token_id": _id(data, "padding")},
    )
    _write_tokenizer(data, folder)


def _configuration(data: dict[str, Any], name: str) -> dict[str, Any]:
    heads = data["llama.attention.head_count"]
    width = data["llama.embedding_length"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "_name_or_path": name,
        "vocab_size": data["llama.vocab_size"],
        "hidden_size": width,
        "intermediate_size": data["llama.feed_forward_length"],
        "num_hidden_layers": data["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": data["llama.attention.head_count_kv"],
        "head_dim": width // heads,
        "hidden_act": "silu",
        "max_position_embeddings": data["llama.context_length"],
        "rms_norm_eps": round(data["llama.attention.layer_norm_rms_epsilon"], 9),
        "rope_theta": data["llama.rope.freq_base"],
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": _id(data, "bos"),
        "eos_token_id": _id(data, "eos"),
        "pad_token_id": _id(data, "padding"),
        "torch_dtype": "float32",
    }


def _write_weights(reader: Any, data: dict[str, Any], folder: Path) -> None:
    import gguf
    from safetensors.numpy import save_file

    heads = {"attn_q": data["llama.attention.head_count"], "attn_k": data["llama.attention.head_count_kv"]}
    weights = {}
    for tensor in reader.tensors:
        name = _hugging_face_name(tensor.name)
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype("float32")
        part = tensor.name.split(".")[-2]
        if part in heads and tensor.name.startswith("blk."):
            values = _split_halves(values, heads[part])
        weights[name] = values
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _split_halves(values: Any, heads: int) -> Any:
    """Undoes llama.cpp's order of a query or key matrix.

    Within a head llama.cpp keeps the two numbers that one rotation turns next to each other; Hugging Face keeps the
    first of each pair in the head's first half and the second in its other half.
    """
    rows, columns = values.shape
    pairs = values.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns).copy()


def _hugging_face_name(name: str) -> str:
    if name in _OUTER:
        return _OUTER[name]
    parts = name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[1].isdecimal() and parts[3] == "weight" and parts[2] in _INNER:
        return f"model.layers.{parts[1]}.{_INNER[parts[2]]}.weight"
    raise InvalidArgument(f"the tensor {name!r} is not part of a Llama without biases; this file cannot be converted")


def _write_tokenizer(data: dict[str, Any], folder: Path) -> None:
    """Byte-level BPE in which each digit stands alone, as SmolLM's is."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens: list[str] = data["tokenizer.ggml.tokens"]
    kinds: list[int] = data["tokenizer.ggml.token_type"]
    merges = [tuple(line.split(" ")) for line in data["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [
        AddedToken(token, special=True) for token, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL_TOKEN
    ]
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {f"{role}_token": tokens[_id(data, key)] for role, key in _ROLES}
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": data["llama.context_length"],
            "chat_template": data["tokenizer.chat_template"],
            "clean_up_tokenization_spaces": False,
            **named,
        },
    )


_ROLES: Final = (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))


def _id(data: dict[str, Any], role: str) -> int:
    return int(data[f"tokenizer.ggml.{role}_token_id"])


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")
