"""Errors as OpenAI writes them: `{"error": {"message", "type", "param", "code"}}`, with the status that fits.

An engine's own errors pass through untouched. These are the gateway's: a request that it does not take, a model that
cannot be had, an engine that died. Statuses: 400, 401, 403, 404, 405, 408, 409, 413, 431, 502, 503. A 500 would be a
bug.
"""

from __future__ import annotations

import math
from typing import Final

import msgspec
from starlette.responses import Response

from elastickv.errors import (
    AccessDenied,
    AlreadyExists,
    ConfigError,
    DeadlineExceeded,
    ElasticKVError,
    InvalidArgument,
    LimitExceeded,
    NotFound,
    OutOfMemory,
    Unavailable,
)

__all__ = ["Refused", "error_body", "error_event", "refusal_of", "response_of"]

RETRY_AFTER_S: Final = 5.0
"""Told to a client where nothing better is known."""

_TYPES: Final = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    500: "server_error",
    502: "server_error",
    503: "service_unavailable_error",
}
_OTHER_TYPE: Final = "invalid_request_error"

_STATUS: Final[tuple[tuple[type[ElasticKVError], int, str], ...]] = (
    (ConfigError, 400, "invalid_value"),
    (InvalidArgument, 400, "invalid_value"),
    (NotFound, 404, "not_found"),
    (AlreadyExists, 409, "already_exists"),
    (LimitExceeded, 409, "limit_exceeded"),
    (AccessDenied, 403, "access_denied"),
    (DeadlineExceeded, 503, "deadline_exceeded"),
    (Unavailable, 503, "unavailable"),
    (OutOfMemory, 503, "out_of_memory"),
)


class Refused(ElasticKVError):
    """The gateway answers a request itself, with this status. `retry_after_s`: seconds, for a 503."""

    def __init__(
        self,
        message: str,
        *,
        status: int,
        code: str,
        param: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message, status=status, code=code, param=param, retry_after_s=retry_after_s)
        self.status, self.code, self.param = status, code, param
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[object, ...]:
        return (_again, (self.message, self.status, self.code, self.param, self.retry_after_s))


def _again(message: str, status: int, code: str, param: str | None, retry_after_s: float | None) -> Refused:
    return Refused(message, status=status, code=code, param=param, retry_after_s=retry_after_s)


def refusal_of(error: ElasticKVError) -> Refused:
    """What a client is told of an error of the family."""
    if isinstance(error, Refused):
        return error
    for kind, status, code in _STATUS:
        if isinstance(error, kind):
            known = error.attributes.get("retry_after_s")
            after = float(known) if isinstance(known, (int, float)) else RETRY_AFTER_S
            return Refused(error.message, status=status, code=code, retry_after_s=after if status == 503 else None)
    return Refused(error.message, status=500, code="internal_error")


def error_body(refused: Refused) -> bytes:
    """The JSON."""
    kind = _TYPES.get(refused.status, _OTHER_TYPE)
    shown = {"message": refused.message, "type": kind, "param": refused.param, "code": refused.code}
    return msgspec.json.encode({"error": shown})


def error_event(refused: Refused) -> bytes:
    """The same as the last events of a stream that has begun with status 200."""
    return b"data: " + error_body(refused) + b"\n\ndata: [DONE]\n\n"


def response_of(refused: Refused) -> Response:
    """The whole answer."""
    headers = {}
    if refused.retry_after_s is not None:
        headers["retry-after"] = str(max(1, math.ceil(refused.retry_after_s)))
    if refused.status == 401:
        headers["www-authenticate"] = "Bearer"
    return Response(error_body(refused), refused.status, headers, "application/json")
