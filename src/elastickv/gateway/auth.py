"""Who may do what: client keys for models, the admin key for models' lives, and neither for /health and /ready.

Keys come from files or from the environment, never from the command line, where other users of the machine could read
them. They are compared by digests, in constant time. Without an admin key the admin API is there for the gateway's own
user and root on this machine only (it starts programs), and only for requests that no foreign web page can make a
browser send.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import os
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Receive, Scope, Send

from elastickv.errors import AccessDenied, ConfigError
from elastickv.gateway.body import Headers, header
from elastickv.gateway.errors import Refused, response_of
from elastickv.gateway.peer import owner_of

__all__ = ["Guard", "Keys", "is_loopback", "keys_of_file", "load_keys"]

OPEN_PATHS: Final = frozenset({"/", "/health", "/ready", "/openapi.json", "/favicon.ico"})
OPEN_FOLDER: Final = "/page/"
"""The page's own files; what they show comes from /admin."""
SHORTEST_KEY: Final = 8
_LOCAL_NAMES: Final = frozenset({"localhost", "127.0.0.1", "[::1]", "::1"})


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server that listens there."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


@dataclass(frozen=True, repr=False)
class Keys:
    """Digests of the keys. No clients: everybody is one. `admin` None: see the module."""

    clients: tuple[bytes, ...] = ()
    admin: bytes | None = None

    @classmethod
    def of(cls, clients: Iterable[str] = (), admin: str | None = None) -> Keys:
        """From the keys themselves. ConfigError for one that is too short to be secret."""
        given = list(clients)
        for key in (*given, *([admin] if admin is not None else [])):
            if len(key) < SHORTEST_KEY or not key.isascii() or not key.isprintable() or " " in key:
                raise ConfigError(
                    f"a key of {len(key)} characters; give at least {SHORTEST_KEY}, of ASCII and without spaces"
                )
        digests = tuple(_digest(key.encode()) for key in given)
        return cls(digests, None if admin is None else _digest(admin.encode()))

    def admits_client(self, key: bytes | None) -> bool:
        """The admin's key opens everything."""
        if not self.clients:
            return True
        known = [*self.clients, *([self.admin] if self.admin is not None else [])]
        return key is not None and _among(_digest(key), known)

    def admits_admin(self, key: bytes | None) -> bool:
        """False for everybody where there is no admin key."""
        return self.admin is not None and key is not None and _among(_digest(key), [self.admin])


def _among(digest: bytes, known: Sequence[bytes]) -> bool:
    """Compares with all of them, however soon one fits."""
    found = 0
    for one in known:
        found |= hmac.compare_digest(digest, one)
    return bool(found)


def load_keys(clients_file: str | None, admin_file: str | None, clients: str = "", admin: str = "") -> Keys:
    """Keys of files (one a line; # begins a comment) and, beside them, of settings (clients: separated by commas).

    ConfigError where a file cannot be read or has no key, AccessDenied where others than its owner may read it.
    """
    listed = [key.strip() for key in clients.split(",") if key.strip()]
    if clients_file is not None:
        listed += keys_of_file(Path(clients_file))
    admins = [admin.strip()] if admin.strip() else []
    if admin_file is not None:
        admins += keys_of_file(Path(admin_file))
    if len(set(admins)) > 1:
        raise ConfigError("there is more than one admin key; give one, in a file or in the environment")
    return Keys.of(listed, admins[0] if admins else None)


def keys_of_file(path: Path) -> list[str]:
    """The keys in a file, one a line; errors as of load_keys."""
    try:
        with path.open(encoding="utf-8") as file:
            mode = os.fstat(file.fileno()).st_mode
            if stat.S_ISREG(mode) and mode & (stat.S_IRWXG | stat.S_IRWXO):
                raise AccessDenied(f"{path}: others may read the keys (mode {mode & 0o777:o}); chmod 600 {path}")
            lines = [line.partition("#")[0].strip() for line in file]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot read the keys: {error}") from None
    keys = [line for line in lines if line]
    if not keys:
        raise ConfigError(f"{path}: there is no key in the file; write one a line")
    return keys


class Guard:
    """Middleware: lets a request through, or answers 401 or 403. `host`: where the gateway listens."""

    def __init__(self, app: ASGIApp, keys: Keys, host: str) -> None:
        self._app, self._keys = app, keys
        self._local = is_loopback(host)
        self._names = _LOCAL_NAMES | {host}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refused = self._refusal(scope) if scope["type"] == "http" else None
        if refused is None and scope["type"] == "http" and self._keys.admin is None and _is_admin(scope["path"]):
            refused = await asyncio.to_thread(self._stranger, scope)
        if refused is None:
            await self._app(scope, receive, send)
        else:
            await response_of(refused)(scope, receive, send)

    def _refusal(self, scope: Scope) -> Refused | None:
        path: str = scope["path"]
        if path in OPEN_PATHS or path.startswith(OPEN_FOLDER):
            return None
        key = _key(scope["headers"])
        if _is_admin(path):
            return self._admin_refusal(scope, key)
        if self._keys.admits_client(key):
            return None
        return _unknown_key("client", key)

    def _admin_refusal(self, scope: Scope, key: bytes | None) -> Refused | None:
        if self._keys.admin is not None:
            return None if self._keys.admits_admin(key) else _unknown_key("admin", key)
        if not self._local:
            text = "there is no admin key, and the gateway can be reached from other machines: set an admin key"
            return Refused(text, status=403, code="no_admin_key")
        return self._foreign(scope)

    def _foreign(self, scope: Scope) -> Refused | None:
        """A page of another site can send requests here through its visitor's browser. They carry that site's name in
        Origin, or in Host where it lets its own name point here; and only forms need no leave to POST."""
        host = (header(scope["headers"], b"host") or b"").decode("latin-1")
        origin = header(scope["headers"], b"origin")
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
        if name not in self._names:
            return _foreign(f"Host is {host[:100]!r}, which is no name of this machine's own")
        if origin is not None and _site(origin.decode("latin-1")) != host:
            return _foreign("Origin is another site")
        kind = (header(scope["headers"], b"content-type") or b"").partition(b";")[0].strip().lower()
        if scope["method"] in ("POST", "PUT", "PATCH") and kind != b"application/json":
            return _foreign("content-type is not application/json")
        return None

    def _stranger(self, scope: Scope) -> Refused | None:
        """Another user of this machine could have any program started as this one."""
        peer, own = scope.get("client"), scope.get("server")
        owner = owner_of(tuple(peer), tuple(own)) if peer and own else None
        if owner in (0, os.geteuid()):
            return None
        whose = "nobody known" if owner is None else f"user {owner}"
        return _foreign(f"this connection is of {whose}, and the gateway of user {os.geteuid()}; set an admin key")


def _is_admin(path: str) -> bool:
    return path == "/admin" or path.startswith("/admin/")


def _site(origin: str) -> str | None:
    try:
        return urlsplit(origin).netloc
    except ValueError:  # such as http://[
        return None


def _key(headers: Headers) -> bytes | None:
    """Of `Authorization: Bearer KEY`."""
    value = header(headers, b"authorization") or b""
    scheme, _, key = value.partition(b" ")
    return key.strip() if scheme.lower() == b"bearer" and key.strip() else None


def _unknown_key(whose: str, key: bytes | None) -> Refused:
    if key is None:
        return Refused(f"send the {whose} key: Authorization: Bearer KEY", status=401, code="missing_api_key")
    return Refused(f"the key is no {whose} key", status=401, code="invalid_api_key")


def _foreign(why: str) -> Refused:
    return Refused(
        f"without an admin key only requests of this machine and user are taken: {why}", status=403, code="foreign"
    )
