"""Planning: what is read from configurations and checkpoints, and what comes of models that share a device."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import geometry_table
from elastickv.errors import InvalidArgument, NotFound
from elastickv.planning import (
    Kind,
    Model,
    Serving,
    allowance,
    architecture_of,
    cache_shape,
    plan_device,
    read_architecture,
    read_checkpoint,
    static_bytes,
)
from elastickv.planning.checkpoint import stage_layers
from support import GEOMETRY_PAGE, Outcome, table_of

Cli = Callable[..., Outcome]
KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
PAGE = 2 * MIB

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "vocab_size": 1000,
    "max_position_embeddings": 4096,
    "torch_dtype": "bfloat16",
}


def write_checkpoint(path: Path, tensors: dict[str, tuple[str, tuple[int, ...]]], config: dict[str, Any]) -> Path:
    """A folder with a configuration and a safetensors file that is all header and holes."""
    width = {"F32": 4, "BF16": 2, "F16": 2, "U8": 1, "F8_E4M3": 1}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in tensors.items():
        size = width[dtype]
        for length in shape:
            size *= length
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    path.mkdir(parents=True, exist_ok=True)
    with (path / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    (path / "config.json").write_text(json.dumps(config))
    return path


def tensors_of_llama(layers: int = 4, dtype: str = "BF16") -> dict[str, tuple[str, tuple[int, ...]]]:
    found: dict[str, tuple[str, tuple[int, ...]]] = {
        "model.embed_tokens.weight": (dtype, (1000, 1024)),
        "model.norm.weight": (dtype, (1024,)),
        "lm_head.weight": (dtype, (1000, 1024)),
    }
    for i in range(layers):
        found[f"model.layers.{i}.self_attn.q_proj.weight"] = (dtype, (1024, 1024))
        found[f"model.layers.{i}.self_attn.k_proj.weight"] = (dtype, (512, 1024))
        found[f"model.layers.{i}.input_layernorm.weight"] = (dtype, (1024,))
    return found


# --- configurations


def test_a_plain_decoder() -> None:
    model = architecture_of(LLAMA, "tiny")
    assert (model.count(Kind.FULL), model.kv_heads, model.head_size, model.dtype_bytes) == (4, 8, 64, 2)
    assert (model.max_length, model.quantisation, model.experts, model.tied) == (4096, None, 0, False)
    assert model.layers[0] is not None
    assert model.layers[0].width == 2 * 64
    assert model.rotary == 4096 * 64


def test_tables_of_positions() -> None:
    def rotary(**change: Any) -> int:
        return architecture_of({**LLAMA, **change}, "tiny").rotary

    assert rotary(partial_rotary_factor=0.5) == 4096 * 32
    assert rotary(position_embedding_type="nope") == 0
    assert rotary(model_type="gemma3_text", head_dim=256) == 2 * 4096 * 256
    both = {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}
    assert rotary(rope_parameters=both) == 2 * 4096 * 64
    assert rotary(rope_parameters={"rope_theta": 1e4}) == 4096 * 64
    assert rotary(model_type="deepseek_v3", kv_lora_rank=512, qk_rope_head_dim=32) == 4096 * 32


@pytest.mark.parametrize(
    ("change", "counts"),
    [
        ({"sliding_window": 512}, {Kind.WINDOW: 4}),
        ({"sliding_window": 512, "use_sliding_window": False}, {Kind.FULL: 4}),
        ({"sliding_window": None}, {Kind.FULL: 4}),
        ({"model_type": "gemma2", "sliding_window": 512}, {Kind.WINDOW: 2, Kind.FULL: 2}),
        ({"model_type": "gemma3_text", "num_hidden_layers": 12}, {Kind.WINDOW: 10, Kind.FULL: 2}),
        ({"model_type": "llama4_text", "num_hidden_layers": 8}, {Kind.CHUNK: 6, Kind.FULL: 2}),
        ({"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 9}, {Kind.WINDOW: 1, Kind.FULL: 1}),
        ({"model_type": "deepseek_v3", "kv_lora_rank": 512, "qk_rope_head_dim": 64}, {Kind.LATENT: 4}),
        (
            {"model_type": "lfm2", "full_attn_idxs": [1], "conv_L_cache": 3, "conv_dim": 1024},
            {Kind.FULL: 1, Kind.STATE: 3},
        ),
        (
            {
                "model_type": "nemotron_h",
                "hybrid_override_pattern": "M-M*E",
                "mamba_num_heads": 8,
                "mamba_head_dim": 64,
                "n_groups": 2,
                "ssm_state_size": 16,
                "conv_kernel": 4,
            },
            {Kind.STATE: 2, Kind.FULL: 1},
        ),
    ],
)
def test_layers_by_kind(change: dict[str, Any], counts: dict[Kind, int]) -> None:
    model = architecture_of({**LLAMA, **change}, "tiny")
    assert {kind: model.count(kind) for kind in Kind if model.count(kind)} == counts


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"num_hidden_layers": None}, "the field num_hidden_layers is missing"),
        ({"num_hidden_layers": "many"}, "the field num_hidden_layers is 'many', not a whole number"),
        ({"num_hidden_layers": True}, "the field num_hidden_layers is True, not a whole number"),
        ({"torch_dtype": "int3"}, "the type 'int3' is none of bfloat16, float, float16, float32, half"),
        ({"layer_types": ["dreaming"]}, "layers of the kind 'dreaming' are not known"),
        ({"index_topk": 2048}, "the model type 'llama' has index_topk, which is not counted here"),
        ({"kv_lora_rank": 512}, "the model type 'llama' is not known to keep latent rows"),
        ({"mamba_d_state": 16}, "the model type 'llama' keeps states, and does not say in which layers"),
        (
            {"layer_types": ["mamba"]},
            "the states of the model type 'llama' are not known; known are granitemoehybrid, lfm2, lfm2_moe, "
            "nemotron_h, qwen3_5_moe_text, qwen3_5_text, qwen3_next",
        ),
        ({"model_type": "lfm2", "layer_types": ["conv"]}, "the field conv_L_cache is missing"),
    ],
)
def test_configurations_that_are_refused(change: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        architecture_of({**LLAMA, **change}, "tiny")
    assert str(caught.value) == text


def test_files_that_are_no_configuration(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"no config\.json at .*; name a model's folder, or the file itself"):
        read_architecture(tmp_path)
    file = tmp_path / "config.json"
    file.write_text("{")
    with pytest.raises(InvalidArgument, match=r"config\.json cannot be read as JSON: "):
        read_architecture(tmp_path)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(InvalidArgument, match=r"config\.json cannot be read as JSON: "):
        read_architecture(file)
    file.write_text("[]")
    with pytest.raises(InvalidArgument, match="holds no JSON object"):
        read_architecture(file)


# --- weights


def test_weights_of_one_rank(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", tensors_of_llama(), LLAMA)
    model, checkpoint = read_architecture(folder), read_checkpoint(folder)
    layer = 2 * (1024 * 1024 + 512 * 1024 + 1024)
    vocabulary = 2 * 1024 * 1024  # 1,000 rows padded to 1,024
    assert checkpoint.stored == 4 * layer + 2 * (2 * 1000 * 1024 + 1024)
    assert checkpoint.rank_bytes(model) == (4 * layer + 2 * vocabulary + 2048,)
    assert checkpoint.rank_bytes(model, width=4) == (2 * (4 * layer + 2 * vocabulary + 2048),)


def test_weights_are_split_and_what_is_small_is_not(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", tensors_of_llama(), LLAMA)
    model, checkpoint = read_architecture(folder), read_checkpoint(folder)
    whole = 2 * 1024
    assert checkpoint.rank_bytes(model, tp=4) == (
        4 * (2 * 1536 * 1024 // 4 + whole) + 2 * 2 * 1024 * 1024 // 4 + whole,
    )
    # 16 ranks share 8 KV heads: two ranks keep the same one.
    by16 = 4 * (2 * 1024 * 1024 // 16 + 2 * 512 * 1024 // 8 + whole) + 2 * 2 * 1024 * 1024 // 16 + whole
    assert checkpoint.rank_bytes(model, tp=16) == (by16,)
    layer = 2 * 1536 * 1024 + whole
    first, last = checkpoint.rank_bytes(model, pp=2)
    assert (first, last) == (2 * layer + 2 * 1024 * 1024, 2 * layer + 2 * 1024 * 1024 + whole)


def test_a_tied_head_is_loaded_once(tmp_path: Path) -> None:
    tied = {**LLAMA, "tie_word_embeddings": True}
    with_head = write_checkpoint(tmp_path / "a", tensors_of_llama(), tied)
    without = {name: row for name, row in tensors_of_llama().items() if name != "lm_head.weight"}
    bare = write_checkpoint(tmp_path / "b", without, tied)
    model = read_architecture(bare)
    assert read_checkpoint(bare).rank_bytes(model) == read_checkpoint(with_head).rank_bytes(model)
    first, last = read_checkpoint(bare).rank_bytes(model, pp=2)
    assert last - first == 2 * 1024, "both stages have the embedding, the last one the norm"


def test_layers_of_a_drafter_are_not_counted(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", tensors_of_llama(layers=5), LLAMA)
    plain = write_checkpoint(tmp_path / "n", tensors_of_llama(), LLAMA)
    model = read_architecture(folder)
    assert read_checkpoint(folder).rank_bytes(model) == read_checkpoint(plain).rank_bytes(model)


def test_types_are_cast_unless_the_model_is_quantised(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", tensors_of_llama(dtype="F32"), {**LLAMA, "torch_dtype": "float32"})
    half = write_checkpoint(tmp_path / "h", tensors_of_llama(), LLAMA)
    assert read_checkpoint(folder).rank_bytes(read_architecture(folder)) == read_checkpoint(half).rank_bytes(
        read_architecture(half)
    )
    small = {"model.layers.0.mlp.up_proj.weight": ("F8_E4M3", (64, 64)), "model.layers.0.mlp.scale": ("F32", (64, 1))}
    config = {**LLAMA, "quantization_config": {"quant_method": "fp8"}}
    folder = write_checkpoint(tmp_path / "q", small, config)
    assert read_checkpoint(folder).rank_bytes(read_architecture(folder)) == (64 * 64 + 64 * 4,)


def test_only_an_index(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    index = {"metadata": {"total_size": 1000}, "weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    found = read_checkpoint(tmp_path)
    assert (found.source, found.stored) == ("the checkpoint's index", 1000)
    assert found.rank_bytes(read_architecture(tmp_path), tp=2, pp=2) == (250, 250)


def test_other_formats(tmp_path: Path) -> None:
    model = architecture_of({**LLAMA, "torch_dtype": "float32"}, "tiny")
    (tmp_path / "pytorch_model.bin").write_bytes(b"x" * 1000)
    assert read_checkpoint(tmp_path).rank_bytes(model) == (500,), "float32 is loaded in 16 bits"
    (tmp_path / "pytorch_model.bin").unlink()
    (tmp_path / "m.Q4_K_M.gguf").write_bytes(b"x" * 1000)
    assert read_checkpoint(tmp_path).rank_bytes(model) == (1000,)
    (tmp_path / "m.Q8_0.gguf").write_bytes(b"x")
    with pytest.raises(InvalidArgument, match=r"holds 2 models: m\.Q4_K_M, m\.Q8_0; keep one of them"):
        read_checkpoint(tmp_path)


def test_checkpoints_that_are_damaged(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="download the checkpoint, or its index, which is small"):
        read_checkpoint(tmp_path)
    folder = write_checkpoint(tmp_path / "m", tensors_of_llama(), LLAMA)
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for damaged, text in (
        (whole[:-1], "ends early, at"),
        (whole[:100], "is not a safetensors file"),
        (b"", "is not a safetensors file: a header of 0 bytes"),
        (struct.pack("<Q", 1 << 60), "is not a safetensors file: a header of 1152921504606846976 bytes"),
        (struct.pack("<Q", 4) + b'{"a"', "is not a safetensors file"),
        (struct.pack("<Q", 9) + b'{"a": []}', "is not a safetensors file"),
    ):
        file.write_bytes(damaged)
        with pytest.raises(InvalidArgument, match=text):
            read_checkpoint(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": []}')
    with pytest.raises(InvalidArgument, match="is not an index of a checkpoint"):
        read_checkpoint(folder)


@pytest.mark.parametrize(
    ("layers", "pp", "expected"), [(4, 2, [2, 2]), (5, 2, [3, 2]), (7, 3, [2, 3, 2]), (8, 3, [3, 3, 2]), (3, 1, [3])]
)
def test_layers_of_stages(layers: int, pp: int, expected: list[int]) -> None:
    assert [len(stage) for stage in stage_layers(layers, pp)] == expected


# --- blocks


def shape_of(change: dict[str, Any] | None = None, **serving: Any) -> Any:
    return cache_shape(architecture_of({**LLAMA, **(change or {})}, "tiny"), Serving(**serving))


def test_blocks_of_a_plain_decoder() -> None:
    shape = shape_of()
    assert (shape.block_tokens, shape.part_bytes, shape.block_bytes) == (16, 32 * KIB, 128 * KIB)
    assert (shape.stages[0].spans, shape.token_bytes, shape.blocks_of(100)) == (1, 8 * KIB, 7)
    stripes = shape_of(block_outermost=False)
    assert (stripes.stages[0].spans, stripes.stages[0].block_bytes) == (4, 32 * KIB)


def test_short_parts_get_longer_blocks_where_blocks_are_outermost() -> None:
    assert shape_of(tp=8).block_tokens == 64
    assert shape_of(tp=8).part_bytes == 16 * KIB
    assert shape_of(tp=8, block_outermost=False).block_tokens == 16
    assert shape_of(tp=8, block_tokens=16).block_tokens == 16
    assert shape_of(tp=4, kv_width=1).block_tokens == 64


def test_more_ranks_than_heads_keep_copies() -> None:
    assert shape_of(tp=16).block_bytes == shape_of(tp=8).block_bytes
    with pytest.raises(InvalidArgument, match="8 KV heads of tiny cannot be split over --tp 3 ranks"):
        shape_of(tp=3)


def test_windows_do_not_grow_with_a_request_unless_they_are_held() -> None:
    window = {"layer_types": ["full_attention", *["sliding_attention"] * 3], "sliding_window": 64}
    shape = shape_of(window, in_flight=64)
    assert (len(shape.groups), shape.block_bytes, shape.growing) == (4, 32 * KIB, 1)
    assert shape.blocks_of(16_000) == 1000 + 3 * (8 + 1)
    assert shape.fixed_blocks == 27
    held = shape_of(window, in_flight=64, hold_windows=True)
    assert (held.growing, held.blocks_of(16_000), held.fixed_blocks) == (4, 4000, 0)


def test_the_most_blocks_of_a_prompt() -> None:
    window = {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 64}
    shape = shape_of(window, in_flight=128)
    # 896 tokens: 56 blocks, and those from token 768 - 63 on; 944: 59, and those from token 896 - 63 on.
    assert shape.peak_of(944) == max(56 + 56 - 44, 59 + 59 - 52)
    assert shape.peak_of(100) == 7 + 7
    assert shape_of(window, in_flight=128, hold_windows=True).peak_of(944) == 59 + 59
    chunk = {"layer_types": ["full_attention", "chunked_attention"], "attention_chunk_size": 256}
    assert shape_of(chunk, in_flight=128).peak_of(896) == 56 + 56 - 48


def test_states_decide_the_block() -> None:
    state = {"model_type": "lfm2", "conv_L_cache": 3, "conv_dim": 65536}
    shape = shape_of({**state, "full_attn_idxs": [1, 3]})
    assert shape.state_bytes == 256 * KIB
    assert shape.block_tokens == 128, "a block of one layer holds the state"
    assert shape.blocks_of(1280) == 10 + 2
    assert shape_of({**state, "full_attn_idxs": [1, 3]}, caching=False).blocks_of(1280) == 10 + 1


def test_stages_of_unequal_length() -> None:
    shape = shape_of({"num_hidden_layers": 5}, pp=2)
    assert [stage.block_bytes for stage in shape.stages] == [3 * 32 * KIB, 2 * 32 * KIB]
    with pytest.raises(InvalidArgument, match="with --pp 5 a stage of tiny has no cache; use fewer stages"):
        shape_of(pp=5)


def test_the_table_in_the_docs_is_what_is_planned() -> None:
    assert table_of(GEOMETRY_PAGE) == geometry_table.table(), "run scripts/docs"


# --- sharing


def model(name: str, weights: int, *, floor: int = 0, length: int = 1024, **serving: Any) -> Model:
    architecture = architecture_of(LLAMA, name)
    small = cache_shape(architecture, Serving(**{**serving, "kv_width": 1}))
    return Model(name, weights, 0, cache_shape(architecture, Serving(**serving)), PAGE, length, floor, small)


def test_models_that_fit() -> None:
    planned = plan_device(10 * GIB, [model("a", 4 * GIB, floor=5 * GIB), model("b", 2 * GIB)])
    assert planned.fits
    assert planned.sets == (("a", "b"),)
    assert planned.advice == ()
    a, b = planned.models
    assert (a.request, a.page_cost) == (10 * MIB, PAGE)  # 64 blocks of 128 KiB and block 0
    assert planned.needed == 5 * GIB + 2 * GIB + PAGE + (10 * MIB - PAGE)
    assert planned.most(a) == 8 * GIB - PAGE
    assert a.tokens_within(5 * GIB) == (GIB // (128 * KIB) - 1) * 16
    assert b.tokens_within(b.floor) == 0


def test_floors_that_are_too_high() -> None:
    planned = plan_device(10 * GIB, [model("a", 4 * GIB, floor=8 * GIB), model("b", 2 * GIB, floor=3 * GIB)])
    assert not planned.fits
    assert planned.sets == (("a",), ("b",))
    texts = [advice.text for advice in planned.advice]
    assert texts[0] == "floors of at most 7 GiB (for a)"
    lowered = planned.advice[0].size
    assert lowered is not None
    assert plan_device(10 * GIB, [model("a", 4 * GIB, floor=lowered), model("b", 2 * GIB, floor=3 * GIB)]).fits
    assert texts[1] == "put b to sleep: that frees 3 GiB"
    assert planned.advice[-1].size == planned.needed
    assert plan_device(planned.needed, planned.models).fits
    assert not plan_device(planned.needed - 1, planned.models).fits


def test_weights_that_are_too_large() -> None:
    planned = plan_device(10 * GIB, [model("a", 6 * GIB), model("b", 5 * GIB), model("c", 4 * GIB)])
    assert planned.sets == (("b", "c"), ("a",))
    assert [advice.what for advice in planned.advice] == ["sleep", "device"]
    assert planned.advice[0].models == ("a",)
    none = plan_device(3 * GIB, planned.models)
    assert none.sets == ()
    assert [advice.what for advice in none.advice] == ["device"]


def test_requests_that_are_too_long() -> None:
    long = model("a", GIB, length=1 << 20)  # 8 KiB a token: 8 GiB
    planned = plan_device(6 * GIB, [long])
    assert not planned.fits
    by_what = {advice.what: advice for advice in planned.advice}
    assert by_what["fp8"].text == (
        "--kv-dtype fp8 for a: a request of 1048576 tokens then takes 4 GiB instead of 8 GiB"
    )
    tokens = by_what["length"].size
    assert tokens is not None
    assert plan_device(6 * GIB, [model("a", GIB, length=tokens)]).fits
    assert not plan_device(6 * GIB, [model("a", GIB, length=tokens + 16)]).fits


def test_many_models_are_left_out_from_the_largest() -> None:
    planned = plan_device(20 * GIB, [model(f"m{i:02}", (i + 1) * GIB) for i in range(15)])
    assert planned.sets == (("m00", "m01", "m02", "m03", "m04"),)


def test_what_comes_besides_the_cache() -> None:
    assert allowance(20 * GIB, on_gpu=False) == 0
    assert static_bytes(20 * GIB, on_gpu=True) == 20 * GIB + 1536 * MIB + GIB


# --- the command


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "tiny", tensors_of_llama(), LLAMA)


def test_plan_on_a_device_of_a_size(cli: Cli, folder: Path) -> None:
    outcome = cli("plan", folder, folder / "config.json", "--device", "8GiB", "--floor", "2GiB", "--floor", "0")
    assert outcome.code == 0
    lines = outcome.out.splitlines()
    assert lines[0] == "GPU: 8 GiB"
    assert lines[1].split() == ["MODEL", "WEIGHTS", "GRAPHS", "FLOOR", "A", "TOKEN", "LONGEST", "REQUEST"]
    assert lines[2].split() == ["tiny", "16.5", "MiB", "1.5", "GiB", "2", "GiB", "8", "KiB", "34", "MiB"]
    assert lines[3].split()[0] == "tiny#2"
    assert lines[-1].startswith("They fit: 3.5")
    assert all(len(line) <= 80 for line in lines)


def test_plan_for_programs(cli: Cli, folder: Path) -> None:
    outcome = cli("plan", folder, "--device", "host:1GiB", "--json", "--max-model-len", "1024", "--block-size", "32")
    assert outcome.code == 0
    plan = json.loads(outcome.out)
    assert (plan["device"], plan["capacity"], plan["fits"], plan["sets"]) == ("host", GIB, True, [["tiny"]])
    (row,) = plan["models"]
    assert (row["spans"], row["block_tokens"], row["block_bytes"], row["allowance"]) == (4, 32, 256 * KIB, 0)
    assert (row["request_blocks"], row["token_bytes"]) == (32, 8 * KIB)


def test_models_that_do_not_fit_leave_with_1(cli: Cli, folder: Path) -> None:
    outcome = cli("plan", folder, folder, "--device", "3GiB")
    assert outcome.code == 1
    assert "They do not fit: 3.07 GiB are needed, 3 GiB are there." in outcome.out
    assert "  put tiny#2 to sleep: that frees 1.52 GiB" in outcome.out


def test_plan_on_a_ledger(cli: Cli, folder: Path, directory: Path, tenant: Any) -> None:
    with tenant("chat"):
        outcome = cli("plan", folder, "--dir", directory)
        named = cli("plan", folder, "--dir", directory, "--device", "host")
    assert outcome.out == named.out
    assert outcome.out.startswith("host: 64 MiB\n")


def test_what_plan_says_to_wrong_input(cli: Cli, folder: Path, directory: Path) -> None:
    def error(*arguments: object) -> tuple[int, str]:
        outcome = cli("plan", *arguments, "--dir", directory)
        assert outcome.out == ""
        return outcome.code, outcome.err

    assert error(folder) == (
        2,
        "error: plan: which device? there is no ledger here; name one, or a size: --device 80GiB\n",
    )
    code, text = error(folder, "--device", "host")
    assert code == 2
    assert text == f"error: --device: 'host' has no ledger in {directory}; name a size: host:8GiB\n"
    assert error(folder, "--device", "lots")[1].startswith("error: --device: 'lots' is not a size; write bytes")
    assert error(folder, "--device", "0b")[1].startswith("error: --device: a device of 0 bytes holds nothing")
    assert error(folder.parent, "--device", "8GiB")[0] == 3
    assert error(folder, "--device", "8GiB", "--kv-dtype", "int2") == (
        2,
        "error: --kv-dtype: 'int2' is none of auto, fp8, fp8_e4m3, fp8_e5m2, bfloat16, float16\n",
    )
    assert error(folder, "--device", "8GiB", "--floor", "1g", "--floor", "2g") == (
        2,
        "error: --floor: 2 values for 1 models; give one for all of them, or one for each\n",
    )
    assert error(folder, "--device", "8GiB", "--tp", "3") == (
        2,
        "error: plan: 8 KV heads of tiny cannot be split over --tp 3 ranks\n",
    )
