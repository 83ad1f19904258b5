"""The command line that all benchmarks share: full size for a GPU by default, --small for any machine."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from elastickv.errors import NotFound
from elastickv.memory import gpu
from elastickv.units import parse_size

Value = int | float | str


def parse(
    description: str | None, full: Mapping[str, Value], small: Mapping[str, Value], about: Mapping[str, str]
) -> argparse.Namespace:
    """Options named as in `full`, of the type that stands there; --small puts the values of `small` in their place.

    `about`: what each option is. A name that ends in `_size` is a size such as 18GiB, and comes back in bytes.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a size that any machine can run: is everything there?")
    parser.add_argument("--device", default="auto", help="host, or a GPU's number; auto: GPU 0 where there is one")
    parser.add_argument("--output", type=Path, help="folder of the result (benchmarks/results/GPU, or cpu)")
    for name, value in full.items():
        defaults = f"{value}; with --small {small[name]}" if name in small else f"{value}"
        text = f"{about.get(name, '')} ({defaults})".strip()
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=None, help=text, dest=name)
    chosen = parser.parse_args()
    for name, value in (full | dict(small) if chosen.small else full).items():
        if getattr(chosen, name, None) is None:
            setattr(chosen, name, value)
    for name in full:
        if name.endswith("_size"):
            setattr(chosen, name, parse_size(getattr(chosen, name), f"--{name.replace('_', '-')}"))
    chosen.device = device_of(chosen.device)
    return chosen


def device_of(device: str) -> str:
    """What auto stands for here: GPU 0, or the host where no GPU can be seen."""
    if device != "auto":
        return device
    try:
        return "0" if gpu.visible_devices() else "host"
    except NotFound:
        return "host"


def settings(chosen: argparse.Namespace) -> dict[str, Any]:
    """For the result file: everything but where it goes."""
    return {name: value for name, value in vars(chosen).items() if name not in ("output", "small")}


def variables(text: str) -> dict[str, str]:
    """NAME=VALUE,NAME=VALUE. SystemExit, with what is wrong, where a pair has no name or no value."""
    pairs = [pair.partition("=") for pair in text.split(",") if pair]
    for name, _, value in pairs:
        if not (name and value):
            raise SystemExit(f"error: {text!r} holds {name!r} without a value; write NAME=VALUE,NAME=VALUE")
    return {name: value for name, _, value in pairs}


ENGINE: Mapping[str, Value] = {"engine": "vllm", "model": "llama-8b", "seqs": 256, "start_deadline": 400.0}
"""Options of every benchmark that serves a model, at full size; SMALL at small size; ABOUT what they are."""
SMALL: Mapping[str, Value] = {"model": "tiny", "seqs": 16, "start_deadline": 240.0}
ABOUT: Mapping[str, str] = {
    "engine": "vllm, sglang, or stand-in: no model, only its memory and its timing",
    "model": "llama-8b, llama-1b, tiny, smollm2, or a folder",
    "seqs": "requests that an engine runs at once",
    "start_deadline": "seconds that a server has to start",
    "repeats": "measured rounds of each side",
    "seed": "of arrivals and prompts",
}
