"""Reads a request's body within limits, and finds in it what routing needs: the model, and about how many tokens.

The body itself is passed on as it came.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

import anyio
import msgspec
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.types import Receive

from elastickv.gateway.errors import Refused
from elastickv.units import format_size

__all__ = ["Asked", "BodyMemory", "ClientGone", "Headers", "asked_for", "header", "read_body"]

Headers = Iterable[tuple[bytes, bytes]]
"""As ASGI has them: names in lower case."""

BYTES_A_TOKEN: Final = 4
"""Of JSON: English text has about four characters a token (https://platform.openai.com/tokenizer)."""
USUAL_ANSWER: Final = 256
"""Tokens expected of an answer whose request sets no limit; balancing only."""
MOST_TOKENS: Final = 1_000_000
"""What a request says beyond that is not believed."""
LONGEST_NAME: Final = 512


class ClientGone(Exception):
    """The client closed its connection before the request was complete; nobody is left to be answered."""


@dataclass(frozen=True)
class Asked:
    """What a request wants. `prompt`: its tokens as estimated from its bytes; `answer`: the most tokens, or a guess."""

    model: str
    prompt: int
    answer: int


class BodyMemory:
    """Bytes of bodies that are held until their requests are answered, of all clients together."""

    def __init__(self, most: int) -> None:
        self.most, self.held = most, 0

    def take(self, size: int) -> None:
        """Refused (503) where all of it is taken."""
        if self.held + size > self.most:
            raise Refused(
                f"requests that are being read or answered hold {format_size(self.held)}, of {format_size(self.most)}; "
                "try again later",
                status=503,
                code="overloaded",
                retry_after_s=1.0,
            )
        self.held += size

    def give(self, size: int) -> None:
        self.held -= size


def header(headers: Headers, name: bytes) -> bytes | None:
    """The first one of that name."""
    return next((value for key, value in headers if key == name), None)


async def read_body(receive: Receive, headers: Headers, most: int, deadline_s: float, memory: BodyMemory) -> bytes:
    """All of it; its bytes are taken from `memory`, and are the caller's to give back. ClientGone; Refused with 413
    where it has more than `most` bytes, with 408 where it is not complete after `deadline_s` seconds."""
    declared = header(headers, b"content-length")
    if declared is not None and declared.isdigit() and int(declared) > most:
        raise _too_large(f"{format_size(int(declared))}", most)
    parts: list[bytes] = []
    size = 0
    try:
        with anyio.fail_after(deadline_s):
            more = True
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone
                part = message.get("body", b"")
                more = message.get("more_body", False)
                if size + len(part) > most:
                    raise _too_large(f"more than {format_size(most)}", most)
                memory.take(len(part))
                size += len(part)
                parts.append(part)
    except BaseException as error:  # whatever ends it, the bytes go back
        memory.give(size)
        if isinstance(error, TimeoutError):
            raise Refused(
                f"the request's body was not complete after {deadline_s:.0f} s; {format_size(size)} had come",
                status=408,
                code="request_timeout",
            ) from None
        raise
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _too_large(size: str, most: int) -> Refused:
    return Refused(
        f"the body has {size}; at most {format_size(most)} are taken (max_body in the gateway's settings)",
        status=413,
        code="request_too_large",
    )


class _Body(msgspec.Struct):
    """Of a JSON body what is looked at. Any type is let through: the engine says what it thinks of it."""

    model: Any = None
    max_tokens: Any = None
    max_completion_tokens: Any = None
    max_output_tokens: Any = None


_decoder: Final = msgspec.json.Decoder(_Body)


def asked_for(body: bytes, headers: Headers, in_query: str | None) -> Asked:
    """Finds the model in the body, or else in the query. Refused (400) where neither names one."""
    kind = header(headers, b"content-type") or b""
    if kind.lower().startswith(b"multipart/form-data"):
        found = _Body(model=_model_in_form(body, kind))
    elif body:
        found = _json(body)
    else:
        found = _Body()
    model = in_query if found.model is None else found.model
    if model is None:
        raise _bad("no model is named; give the field `model`", "missing_model")
    if not isinstance(model, str) or not model or len(model) > LONGEST_NAME:
        raise _bad("the field `model` must be the name of a model, see /v1/models", "invalid_model")
    limits = (found.max_completion_tokens, found.max_tokens, found.max_output_tokens)
    answer = next((one for one in limits if isinstance(one, int) and not isinstance(one, bool)), USUAL_ANSWER)
    return Asked(model, min(MOST_TOKENS, 1 + len(body) // BYTES_A_TOKEN), max(0, min(MOST_TOKENS, answer)))


def _bad(message: str, code: str) -> Refused:
    return Refused(message, status=400, code=code, param="model")


def _json(body: bytes) -> _Body:
    try:
        return _decoder.decode(body)
    except (msgspec.DecodeError, ValueError, RecursionError):
        pass
    # Python's own parser takes what many clients and engines take beyond the standard, such as NaN.
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as error:
        text = f"the body is no JSON: {error}"
        raise Refused(text, status=400, code="invalid_json") from None
    if not isinstance(value, dict):
        raise Refused("the body must be a JSON object", status=400, code="invalid_json")
    return _Body(**{name: value.get(name) for name in _Body.__struct_fields__})


def _model_in_form(body: bytes, kind: bytes) -> str | None:
    """The form's field `model`."""
    _, options = parse_options_header(kind)
    boundary = options.get(b"boundary")
    if not boundary:
        raise Refused("the form has no boundary in its content-type", status=400, code="invalid_form")
    form = _Form()
    try:
        parser = MultipartParser(boundary, form.callbacks())
        parser.write(body)
        parser.finalize()
    except ValueError as error:
        raise Refused(f"the form cannot be read: {error}", status=400, code="invalid_form") from None
    return None if form.model is None else bytes(form.model).decode("utf-8", "replace")


class _Form:
    """Looks at the parts of a form and keeps the one that is named `model`."""

    def __init__(self) -> None:
        self.model: bytearray | None = None
        self._name, self._value = bytearray(), bytearray()
        self._wanted = False

    def callbacks(self) -> Any:
        return {
            "on_part_begin": self._begin,
            "on_header_field": lambda data, start, end: self._name.extend(data[start:end]),
            "on_header_value": lambda data, start, end: self._value.extend(data[start:end]),
            "on_header_end": self._header,
            "on_part_data": self._data,
        }

    def _begin(self) -> None:
        self._wanted = False

    def _header(self) -> None:
        if self._name.lower() == b"content-disposition":
            _, options = parse_options_header(bytes(self._value))
            self._wanted = self.model is None and options.get(b"name") == b"model"
            if self._wanted:
                self.model = bytearray()
        self._name.clear()
        self._value.clear()

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._wanted and self.model is not None and len(self.model) <= LONGEST_NAME:
            self.model.extend(data[start:end])
