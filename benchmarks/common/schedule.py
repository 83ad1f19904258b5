"""When requests arrive, in seconds from the start, and what they ask. The same seed gives the same load."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple


class Shape(NamedTuple):
    """Tokens of a prompt and of its answer."""

    prompt: int
    answer: int

    @classmethod
    def parse(cls, text: str) -> Shape:
        """From "512+128"."""
        prompt, plus, answer = text.partition("+")
        if not plus or not prompt.isdecimal() or not answer.isdecimal() or not int(prompt) or not int(answer):
            raise ValueError(f"{text!r} is no shape of a request; write PROMPT+ANSWER in tokens, as 512+128")
        return cls(int(prompt), int(answer))

    def __str__(self) -> str:
        return f"{self.prompt}+{self.answer}"


def at_once(count: int) -> list[float]:
    """All at the start: rate = infinite."""
    return [0.0] * count


def poisson(rate: float, count: int, seed: int) -> list[float]:
    """`count` arrivals with exponential gaps, `rate` a second on average."""
    if rate <= 0:
        raise ValueError(f"a rate of {rate} requests a second; give more than 0")
    rng = random.Random(seed)
    arrivals, now = [], 0.0
    for _ in range(count):
        now += rng.expovariate(rate)
        arrivals.append(now)
    return arrivals


def ramp_rates(peak: int) -> list[int]:
    """Requests in each step: 1, 2, ... peak, ... 2, 1."""
    if peak < 1:
        raise ValueError(f"a ramp up to {peak} requests a second; give 1 or more")
    return [*range(1, peak), *range(peak, 0, -1)]


def ramp(peak: int, step: float = 1.0, start: float = 0.0) -> list[float]:
    """Up to `peak` requests a step and down again, by one each step; within a step they are evenly spread.

    `step`: seconds of a step, 1 as a rule: then the rate is in requests a second. `start`: seconds before the first.
    """
    return [start + (number + i / rate) * step for number, rate in enumerate(ramp_rates(peak)) for i in range(rate)]


def prompts(count: int, tokens: int, vocabulary: int, seed: int) -> list[list[int]]:
    """Random token ids: no two prompts share a prefix that a cache could find."""
    rng = random.Random(seed)
    return [[rng.randrange(2, vocabulary) for _ in range(tokens)] for _ in range(count)]


def alternate(rounds: int, sides: Sequence[str]) -> list[str]:
    """A B, B A, A B, ...: the order in which the sides of a pair take turns."""
    order: list[str] = []
    for number in range(rounds):
        order += sides if number % 2 == 0 else reversed(sides)
    return order
