"""Every error that elastickv raises: one family, one class for each way to fail.

    ElasticKVError              exit code 1
    ├── InvalidArgument         2   an argument is wrong: a size, a name, a block that is not yours
    │   └── ConfigError         2   ... and it came from the command line, an ELASTICKV_* variable or the file
    ├── NotFound                3   no such device, tenant, library or file
    ├── AlreadyExists           4   a living owner has the name or the place
    ├── AccessDenied            5   owner, mode or permission of the directory or a file in it
    ├── LedgerCorrupt           6   a shared file holds what this version does not write
    ├── DeadlineExceeded        7   a wait ended; the text says for what, how long, and how things stood
    ├── Unavailable             8   "none now": an ordinary answer, the same request may succeed later
    ├── OutOfMemory             9   the device has no memory although the ledger granted it
    ├── LimitExceeded          10   the tenant's own limit forbids it
    ├── DriverError            11   any other failure of a driver call
    ├── EngineRefused          12   the plug-in will not start: it cannot manage this engine, and says why
    └── IntegrityError         13   a check of elastickv's own books found them inconsistent

The text says what was tried, the value, and what to do next. Values that a program may want are in `attributes`
(bytes as int, seconds as float). Errors can be pickled, so they may cross a process border. Only the command line
turns one into an exit code and a line on stderr.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

__all__ = [
    "AccessDenied",
    "AlreadyExists",
    "ConfigError",
    "DeadlineExceeded",
    "DriverError",
    "ElasticKVError",
    "EngineRefused",
    "IntegrityError",
    "InvalidArgument",
    "LedgerCorrupt",
    "LimitExceeded",
    "NotFound",
    "OutOfMemory",
    "Unavailable",
    "code_of",
    "from_code",
]


class ElasticKVError(Exception):
    """Base of the family. `attributes` holds the values behind the text; `exit_code` is what a command exits with."""

    exit_code: int = 1

    def __init__(self, message: str, **attributes: object) -> None:
        super().__init__(message)
        self.message: str = message
        self.attributes: Mapping[str, object] = attributes

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.message, dict(self.attributes)))


class InvalidArgument(ElasticKVError):
    """An argument is wrong; nothing was changed."""

    exit_code = 2


class ConfigError(InvalidArgument):
    """A setting is wrong. The text names the variable or option and where its value came from."""


class NotFound(ElasticKVError):
    """No such device, tenant, library or file."""

    exit_code = 3


class AlreadyExists(ElasticKVError):
    """A living owner has the name or the place; nothing was changed."""

    exit_code = 4


class AccessDenied(ElasticKVError):
    """Owner, mode or permission of the directory or of a file in it is not what keeps it private."""

    exit_code = 5


class LedgerCorrupt(ElasticKVError):
    """A shared file holds something that this version does not write. It is left as it was found."""

    exit_code = 6


class DeadlineExceeded(ElasticKVError):
    """A wait ended without what it waited for."""

    exit_code = 7


class Unavailable(ElasticKVError):
    """None now. Trying again later may succeed."""

    exit_code = 8


class OutOfMemory(ElasticKVError):
    """The device has no memory although a lease was held: something outside elastickv uses it."""

    exit_code = 9


class LimitExceeded(ElasticKVError):
    """The tenant's own limit forbids it."""

    exit_code = 10


class DriverError(ElasticKVError):
    """A driver call failed in a way that no other class describes."""

    exit_code = 11


class EngineRefused(ElasticKVError):
    """The plug-in does not start, because the engine would run without a managed cache or with a wrong one."""

    exit_code = 12


class IntegrityError(ElasticKVError):
    """elastickv's own books do not add up. A bug: please report the text."""

    exit_code = 13


_BY_CODE: Final[Mapping[str, type[ElasticKVError]]] = {
    "unavailable": Unavailable,
    "out_of_memory": OutOfMemory,
    "limit": LimitExceeded,
    "invalid": InvalidArgument,
    "not_found": NotFound,
    "exists": AlreadyExists,
    "denied": AccessDenied,
    "corrupt": LedgerCorrupt,
    "timeout": DeadlineExceeded,
    "driver": DriverError,
    "integrity": IntegrityError,
}


def from_code(code: str, message: str, attributes: Mapping[str, object] | None = None) -> ElasticKVError:
    """The error for a status code of the native core (`code_name()` in status.hpp). Called by the bindings.

    A code that this module does not know becomes the base class with the code in front of the text, so that no
    failure is lost between two versions.
    """
    kind = _BY_CODE.get(code, ElasticKVError)
    return _rebuild(kind, message if code in _BY_CODE else f"{code}: {message}", dict(attributes or {}))


def code_of(error: ElasticKVError) -> str:
    """The code that from_code() turns into the error's class, or into the nearest class above it; else "error"."""
    for kind in type(error).__mro__:
        for code, known in _BY_CODE.items():
            if known is kind:
                return code
    return "error"


def _rebuild(kind: type[ElasticKVError], message: str, attributes: dict[str, object]) -> ElasticKVError:
    return kind(message, **attributes)
