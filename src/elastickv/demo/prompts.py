"""The prompts of the demo and of the engine tests, all of our own writing.

Eight families of twelve questions, each about a text that all twelve share (so that a prefix cache has something to
find), and 54 prompts that stand alone. With SmolLM2's tokenizer they are 30 to 400 tokens long.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Final

__all__ = ["Prompt", "load_prompts", "mixed"]

_DEFAULT_SYSTEM: Final = "You are a helpful assistant who answers briefly and correctly."


@dataclass(frozen=True)
class Prompt:
    """One request: `system` and `user` are the two messages, `family` is empty for a prompt that stands alone."""

    family: str
    system: str
    user: str

    @property
    def messages(self) -> list[dict[str, str]]:
        """The messages as an OpenAI chat request takes them."""
        return [{"role": "system", "content": self.system}, {"role": "user", "content": self.user}]

    @property
    def text(self) -> str:
        """The whole prompt as SmolLM2 was trained to see it, up to where the answer begins."""
        turns = "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in self.messages)
        return f"{turns}<|im_start|>assistant\n"


def load_prompts() -> list[Prompt]:
    """All prompts, family by family, then those that stand alone. The same list in the same order each time."""
    file = resources.files("elastickv.demo").joinpath("prompts.json")
    data = json.loads(file.read_text(encoding="utf-8"))
    prompts = [
        Prompt(family["name"], family["system"], f"{family['passage']}\n\n{question}")
        for family in data["families"]
        for question in family["questions"]
    ]
    return prompts + [Prompt("", _DEFAULT_SYSTEM, line) for line in data["single"]]


def mixed(count: int, offset: int = 0, prompts: Sequence[Prompt] | None = None) -> list[Prompt]:
    """`count` prompts in a fixed mixed order, beginning with the one at `offset` and going round at the end.

    Neighbours in this order come from different families, so a cached prefix has to outlive other requests to be
    found again.
    """
    every = list(load_prompts() if prompts is None else prompts)
    stride = 37
    while math.gcd(stride, len(every)) != 1:
        stride += 1
    return [every[(offset + i) * stride % len(every)] for i in range(count)]
