"""The demo's prompts: enough of them, all different, in families that share long beginnings."""

from __future__ import annotations

import itertools
from collections import Counter

from elastickv.demo.prompts import load_prompts, mixed


def test_there_are_enough_and_they_differ() -> None:
    prompts = load_prompts()
    assert len(prompts) >= 128
    assert len({prompt.text for prompt in prompts}) == len(prompts)
    assert load_prompts() == prompts


def test_families_share_a_long_beginning() -> None:
    prompts = load_prompts()
    families = Counter(prompt.family for prompt in prompts)
    assert families.pop("") >= 48
    assert len(families) >= 8
    for name in families:
        texts = [prompt.text for prompt in prompts if prompt.family == name]
        shared = texts[0][: min(map(len, texts))]
        while not all(text.startswith(shared) for text in texts):
            shared = shared[:-1]
        assert 130 <= len(shared.split()) <= 300, name


def test_a_prompt_is_what_the_model_was_trained_on() -> None:
    prompt = load_prompts()[0]
    assert prompt.text.startswith(f"<|im_start|>system\n{prompt.system}<|im_end|>\n<|im_start|>user\n")
    assert prompt.text.endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert [message["role"] for message in prompt.messages] == ["system", "user"]


def test_the_mixed_order_uses_every_prompt_once_before_it_repeats() -> None:
    prompts = load_prompts()
    order = mixed(2 * len(prompts))
    assert set(order[: len(prompts)]) == set(prompts)
    assert order[: len(prompts)] == order[len(prompts) :]
    assert mixed(5, offset=3) == order[3:8]
    assert len(mixed(9, prompts=prompts[:37])) == 9
    assert all(a.family != b.family or not a.family for a, b in itertools.pairwise(order))
