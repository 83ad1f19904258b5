"""The frames of the control socket: one JSON object a line, typed and checked. Nothing in them is executed.

A request names its operation in `op`. An answer repeats the request's `id` and holds either a `result` or an `error`;
a stream's answers also hold an `event`. Sizes are bytes, or a text such as "8GiB" in requests; times are seconds.
"""

from __future__ import annotations

import functools
import operator
from typing import Annotated, Any, Final

import msgspec

from elastickv.errors import ElasticKVError, InvalidArgument, code_of, from_code
from elastickv.units import MAX_SIZE, parse_size, parse_size_or_none

__all__ = [
    "MAX_FRAME",
    "MAX_ID",
    "MAX_WAIT",
    "PROTOCOL",
    "Answer",
    "Fault",
    "FitRequest",
    "Forget",
    "Get",
    "Hello",
    "List",
    "MalformedFrame",
    "Request",
    "SetLimit",
    "Trim",
    "Watch",
    "bytes_of",
    "encode",
    "failure",
    "read_answer",
    "read_request",
    "size_of",
]

PROTOCOL: Final = 1
MAX_FRAME: Final = 64 * 1024
"""Bytes of a request, its newline included."""
MAX_ID: Final = 64
MAX_WAIT: Final = 60.0
"""Seconds that a request may wait for a tenant, and that a watch may rest between two looks."""

Id = Annotated[str, msgspec.Meta(max_length=MAX_ID)] | Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)] | None
Name = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9._-]{1,63}\Z")]
Size = Annotated[int, msgspec.Meta(ge=0, le=MAX_SIZE)] | Annotated[str, msgspec.Meta(max_length=64)]
Wait = Annotated[float, msgspec.Meta(ge=0, le=MAX_WAIT)]


class Request(msgspec.Struct, tag_field="op", forbid_unknown_fields=True, kw_only=True, frozen=True):
    """What every request may have."""

    v: int = PROTOCOL
    id: Id = None


class Hello(Request, tag="hello", frozen=True):
    """Who serves, and which protocol."""


class List(Request, tag="list", frozen=True):
    """Every device and tenant, or one device's."""

    device: Name | None = None


class Get(Request, tag="get", frozen=True):
    """One tenant."""

    tenant: Name
    device: Name | None = None


class SetLimit(Request, tag="set", frozen=True):
    """Orders a limit; null or "none" takes it away. `wait`: seconds for the acknowledgement, 0: do not wait."""

    tenant: Name
    limit: Size | None
    now: bool = False
    wait: Wait = 5.0
    device: Name | None = None


class Watch(Request, tag="watch", frozen=True):
    """A stream of what list would answer, whenever it has changed, `count` times (null: until the client leaves)."""

    device: Name | None = None
    tenant: Name | None = None
    interval: Annotated[float, msgspec.Meta(ge=0.05, le=MAX_WAIT)] = 0.5
    count: Annotated[int, msgspec.Meta(ge=1, le=2**31)] | None = None


class FitRequest(Request, tag="fit", frozen=True):
    """Would one tenant more fit?"""

    device: Name | None = None
    static: Size = 0
    floor: Size = 0
    weight: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 1


class Trim(Request, tag="trim", frozen=True):
    """Orders a tenant to give back bytes that no request uses, once."""

    tenant: Name
    bytes: Size
    wait: Wait = 5.0
    device: Name | None = None


class Forget(Request, tag="forget", frozen=True):
    """Drops the kept limit and the row of a name that does not run."""

    tenant: Name
    device: Name | None = None


class Fault(msgspec.Struct, frozen=True):
    """An error of elastickv's family as it travels."""

    code: str
    message: str
    exit_code: int = 1
    attributes: dict[str, Any] = {}

    @classmethod
    def of(cls, error: ElasticKVError) -> Fault:
        """Attributes that JSON has no form for become texts."""
        plain = {
            name: value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
            for name, value in error.attributes.items()
        }
        return cls(code_of(error), error.message, error.exit_code, plain)

    def error(self) -> ElasticKVError:
        """The error that it was, for the client to raise."""
        return from_code(self.code, self.message, self.attributes)


class Answer(msgspec.Struct, omit_defaults=True, frozen=True):
    """One line of the server's."""

    ok: bool
    v: int = 0
    id: Id = None
    event: str | None = None
    result: Any = None
    error: Fault | None = None


class MalformedFrame(InvalidArgument):
    """The line is no JSON object: whoever sent it speaks something else."""


class _Envelope(msgspec.Struct):
    v: int = PROTOCOL
    id: Id = None


_KINDS: Final = (Hello, List, Get, SetLimit, Watch, FitRequest, Trim, Forget)
_OPS: Final = ", ".join(str(kind.__struct_config__.tag) for kind in _KINDS)
_requests: Final[msgspec.json.Decoder[Request]] = msgspec.json.Decoder(functools.reduce(operator.or_, _KINDS))
_envelopes: Final = msgspec.json.Decoder(_Envelope)
_answers: Final = msgspec.json.Decoder(Answer)
_encoder: Final = msgspec.json.Encoder()


def encode(
    answer_to: Request | None, result: object, *, event: str | None = None, error: ElasticKVError | None = None
) -> bytes:
    """A line of the server's: an answer with its result (dataclasses become objects), or with its error."""
    name = answer_to.id if answer_to is not None else None
    fault = Fault.of(error) if error is not None else None
    return _encoder.encode(Answer(error is None, PROTOCOL, name, event, result, fault)) + b"\n"


def failure(frame: bytes, error: ElasticKVError) -> bytes:
    """The answer to a frame that was no request, with its id where it can be made out."""
    return encode(Request(id=_envelope(frame).id), None, error=error)


def read_request(frame: bytes) -> Request:
    """The request in a line. MalformedFrame where it is no JSON object, InvalidArgument where it is no request."""
    try:
        request = _requests.decode(frame)
    except msgspec.ValidationError as error:
        version = _envelope(frame).v
        if version != PROTOCOL:
            raise _other_version(version) from None
        raise InvalidArgument(f"request: {error}; the operations are {_OPS}, see docs/control.md") from None
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise MalformedFrame(f"the line is no request in JSON: {error}") from None
    if request.v != PROTOCOL:
        raise _other_version(request.v)
    return request


def read_answer(line: bytes) -> Answer:
    """The server's line, in the client. InvalidArgument where it is none."""
    try:
        return _answers.decode(line)
    except (msgspec.DecodeError, RecursionError) as error:
        raise InvalidArgument(f"the control server's line is no answer: {error}") from None


def size_of(value: int | str | None, what: str) -> int | None:
    """Bytes of a size in a request; None for null, "none" and "unlimited"."""
    return parse_size_or_none(value, what) if isinstance(value, str) else value


def bytes_of(value: int | str, what: str) -> int:
    """The same where no size at all is no answer."""
    return parse_size(value, what) if isinstance(value, str) else value


def _other_version(version: int) -> InvalidArgument:
    return InvalidArgument(
        f"protocol {version} is asked for, this server speaks {PROTOCOL}; leave `v` out or say {PROTOCOL}",
        asked=version,
        spoken=PROTOCOL,
    )


def _envelope(frame: bytes) -> _Envelope:
    try:
        return _envelopes.decode(frame)
    except (msgspec.DecodeError, RecursionError):
        return _Envelope()
