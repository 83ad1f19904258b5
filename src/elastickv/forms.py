"""How a setting's text is read: one function a kind.

Each takes the text and what it was given as ("--floor", "ELASTICKV_FLOOR", a key of a file); InvalidArgument names it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from elastickv.errors import InvalidArgument
from elastickv.units import format_size, parse_seconds, parse_size

__all__ = [
    "LOG_LEVELS",
    "device",
    "directory",
    "hold_windows",
    "integer",
    "log",
    "milliseconds",
    "name",
    "page",
    "positive_size",
    "static",
    "switch",
    "text",
    "write_or",
    "write_switch",
]

HOLDS: Final = ("auto", "always")
LOG_LEVELS: Final = ("debug", "info", "warning", "error")
MIN_PAGE: Final = 4096
STATIC_WORDS: Final = ("auto", "none", "checkpoint")

_NAME: Final = re.compile(r"[A-Za-z0-9._-]{1,63}", re.ASCII)
_DEVICE: Final = re.compile(r"host|auto|(cuda:)?[0-9]{1,3}|(GPU|MIG)-[0-9A-Fa-f-]{1,40}", re.ASCII)
_SWITCH: Final = {
    "1": True,
    "on": True,
    "true": True,
    "yes": True,
    "0": False,
    "off": False,
    "false": False,
    "no": False,
}


def switch(text: str, what: str) -> bool:
    value = _SWITCH.get(text.strip().lower())
    if value is None:
        raise InvalidArgument(f"{what}: {text!r} is neither on nor off; write 1, on, 0 or off", what=what, value=text)
    return value


def directory(text: str, what: str) -> Path:
    if not text.strip():
        raise InvalidArgument(f"{what}: the directory is empty; write an absolute path", what=what, value=text)
    return Path(text).expanduser().absolute()


def device(text: str, what: str) -> str:
    if not _DEVICE.fullmatch(text):
        forms = "host, auto, a GPU's number (0, cuda:0) or its UUID (GPU-..., MIG-...)"
        raise InvalidArgument(f"{what}: {text!r} is not a device; write {forms}", what=what, value=text)
    return text


def name(text: str, what: str) -> str:
    if not _NAME.fullmatch(text):
        forms = "1 to 63 letters, digits, '.', '_' or '-'"
        raise InvalidArgument(f"{what}: {text!r} is not a name; write {forms}", what=what, value=text)
    return text


def positive_size(text: str, what: str) -> int:
    size = parse_size(text, what)
    if size == 0:
        raise InvalidArgument(f"{what}: {text!r} must be more than 0 bytes", what=what, value=text)
    return size


def static(text: str, what: str) -> str | int:
    word = text.strip().lower()
    return word if word in STATIC_WORDS else parse_size(text, what)


def page(text: str, what: str) -> int:
    size = parse_size(text, what)
    if size < MIN_PAGE or size & (size - 1):
        least = format_size(MIN_PAGE)
        raise InvalidArgument(f"{what}: {text!r} must be a power of two of at least {least}", what=what, value=text)
    return size


def integer(low: int, high: int) -> Callable[[str, str], int]:
    def parse(text: str, what: str) -> int:
        if not re.fullmatch(r"[+-]?[0-9]{1,9}", text.strip(), re.ASCII) or not low <= int(text) <= high:
            raise InvalidArgument(
                f"{what}: {text!r} must be a whole number from {low} to {high}", what=what, value=text
            )
        return int(text)

    return parse


def milliseconds(text: str, what: str) -> int:
    return round(parse_seconds(text, what, default_unit="ms") * 1000)


def hold_windows(text: str, what: str) -> str:
    if text.lower() not in HOLDS:
        raise InvalidArgument(f"{what}: {text!r} is neither {' nor '.join(HOLDS)}", what=what, value=text)
    return text.lower()


def log(text: str, what: str) -> str:
    if text.lower() not in LOG_LEVELS:
        raise InvalidArgument(
            f"{what}: {text!r} is not a level; write one of {', '.join(LOG_LEVELS)}", what=what, value=text
        )
    return text.lower()


def text(text: str, what: str) -> str:
    """As it is; for what must not be shown in an error's text either."""
    return text.strip()


def write_switch(value: bool) -> str:
    return "1" if value else "0"


def write_or(word: str) -> Callable[[Any], str]:
    def write(value: object) -> str:
        return word if value is None else str(value)

    return write
