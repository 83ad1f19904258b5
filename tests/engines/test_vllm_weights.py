"""The size of weights before they are loaded: from files, in the order of vLLM's ranks, or from the configuration."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from engines.oracle import make_tiny_llama

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

MATRICES = 2_626_048
"""Four bytes each: 2 x 256 x 128 of the vocabulary, 4 layers of 147,712, and a norm of 128."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("tiny"))


def config(path: Path | str, source: Path, *, tp: int = 1, pp: int = 1, load: str = "auto", drafter: Any = None) -> Any:
    import torch
    from transformers import AutoConfig

    read = AutoConfig.from_pretrained(source)
    model = SimpleNamespace(
        model=str(path), revision=None, dtype=torch.float32, hf_config=read, hf_text_config=read.get_text_config()
    )
    return SimpleNamespace(
        model_config=model,
        load_config=SimpleNamespace(load_format=load),
        parallel_config=SimpleNamespace(tensor_parallel_size=tp, pipeline_parallel_size=pp, world_size=tp * pp),
        speculative_config=None if drafter is None else SimpleNamespace(draft_model_config=drafter),
    )


def sizes(*arguments: Any, **options: Any) -> list[int]:
    from elastickv.engines.vllm.weights import of_ranks

    return of_ranks(config(*arguments, **options))


def test_from_files(tiny: Path) -> None:
    assert sizes(tiny, tiny) == [MATRICES]


def test_ranks_of_a_stage_stand_side_by_side(tiny: Path) -> None:
    first, second, third, fourth = sizes(tiny, tiny, tp=2, pp=2)
    assert (first, third) == (second, fourth)
    assert sum((first, second, third, fourth)) == pytest.approx(MATRICES, rel=0.01)


@pytest.mark.parametrize("load", ["dummy", "auto"])
def test_from_the_configuration_alone(tiny: Path, load: str) -> None:
    """Asked for, or because nothing of the model is on this machine."""
    path = tiny if load == "dummy" else "nobody/has-this-model"
    assert sizes(path, tiny, load=load) == [MATRICES]


def test_a_drafter_is_on_the_last_stage(tiny: Path, tmp_path: Path) -> None:
    small = make_tiny_llama(tmp_path / "small", layers=1)
    drafter = config(small, small).model_config
    plain, both = sizes(tiny, tiny, pp=2), sizes(tiny, tiny, pp=2, drafter=drafter)
    assert both[0] == plain[0]
    assert both[1] == plain[1] + sizes(small, small)[0]


def test_one_file_is_as_large_as_it_is(tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"x" * 5000)
    assert sizes(file, tiny) == [5000]


def test_what_cannot_be_told_is_nothing(tiny: Path) -> None:
    """Then the lease starts with the allowance alone, and is corrected once the model is loaded."""
    from elastickv.engines.vllm.weights import of_ranks

    made = config("nobody/has-this-model", tiny)
    made.model_config.hf_text_config = SimpleNamespace(model_type="of no kind")
    assert of_ranks(made) == [0]
