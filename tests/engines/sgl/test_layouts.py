"""Pools of other forms than the tiny Llama's, against a plain engine, while limits move and pages come and go."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from engines.conftest import TINY_PROMPTS
from engines.harness import run, start
from engines.oracle import differences
from engines.subjects import BLOCK, SGLANG, look
from engines.tiny_models import dense_mla

pytestmark = [pytest.mark.sglang, pytest.mark.slow]

ROUNDS = [TINY_PROMPTS] * 2
TOO_LONG = [7] * 800
"""Within what the model can do, and more than the limit holds that the engine starts with."""
TOLD = re.compile(
    r"Input length \(800 tokens\) exceeds the maximum allowed length \([45]\d\d tokens\)\..* "
    r"elastickv: requests of one may have [45]\d\d tokens, as many as fit in the budget of .* that its limit, or the "
    r"capacity, leaves the cache"
)


@pytest.fixture(scope="module")
def latent(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[int]]]:
    """A model with latent attention, and what plain SGLang answers with it."""
    model = dense_mla(tmp_path_factory.mktemp("latent"))
    return model, run(SGLANG.job(model, ROUNDS)).tokens


@dataclass(frozen=True)
class Form:
    """`blocks`: those that the limit moves between a quarter of and all of, of subjects.BLOCK bytes."""

    engine: dict[str, Any]
    blocks: int
    layout: str
    latent: bool = False
    caching: bool = True


FORMS = {
    "latent": Form({"page_size": 16}, 32, "token, one span", latent=True),
    "latent-token-uncached": Form({"page_size": 1, **SGLANG.uncached}, 32, "token, one span", True, False),
    # SGLang takes a backend for decoding that it knows to do without Triton, and any other beside it.
    "layers-mixed-chunks": Form(
        {"prefill_attention_backend": "torch_rows", "enable_mixed_chunk": True}, 64, "layer, 8 spans"
    ),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_answers_are_those_of_a_plain_engine(
    form: Form, request: pytest.FixtureRequest, tiny_llama: Path, directory: Path
) -> None:
    """48 requests in 4 MiB and in 1 MiB (latent rows: half of that), by turns of three steps."""
    if form.latent:
        model, plain = request.getfixturevalue("latent")
    else:
        model, plain = tiny_llama, request.getfixturevalue("plain_sglang").tokens
    moves = {"directory": str(directory), "device": "host", "name": "one", "every": 3}
    limits = {"limits": [form.blocks // 4 * BLOCK, form.blocks * BLOCK]}
    environment = SGLANG.managed(directory, blocks=form.blocks, ELASTICKV_LIMIT=str(form.blocks // 4 * BLOCK))
    job = SGLANG.job(model, ROUNDS, environment, engine=form.engine, moves={**moves, **limits})
    with start(job) as running:
        running.go()
        running.wait_round()
        _, too_long = running.call("generate", None, {"max_new_tokens": 4}, [TOO_LONG])
        running.go()
        done = running.wait_round()
        seen = look(directory).tenant("one")
        result = running.finish()
    assert differences(plain, result.tokens) == []
    assert too_long is not None
    assert TOLD.search(too_long), too_long
    assert done.moved > 40
    assert seen.layout == form.layout
    assert sum(seen.histograms.unmap.counts) >= 5
    assert (seen.counters.evicted_limit > 0) is form.caching
    assert (result.prefix_hits > 0) is form.caching
