"""The admin API of a running gateway, asked from another process."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import httpx
import msgspec

from elastickv.errors import (
    AccessDenied,
    AlreadyExists,
    DeadlineExceeded,
    ElasticKVError,
    EngineRefused,
    InvalidArgument,
    NotFound,
    Unavailable,
)
from elastickv.gateway.base import ModelView
from elastickv.gateway.process import tail
from elastickv.gateway.records import read_view
from elastickv.gateway.states import State

__all__ = ["AdminClient", "gateway_url"]

_BY_CODE: Final[Mapping[str, type[ElasticKVError]]] = {"deadline_exceeded": DeadlineExceeded}
_BY_STATUS: Final[Mapping[int, type[ElasticKVError]]] = {
    400: InvalidArgument,
    401: AccessDenied,
    403: AccessDenied,
    404: NotFound,
    409: AlreadyExists,
    503: Unavailable,
}
_LOOK_S: Final = 0.3


class _Models(msgspec.Struct):
    models: list[ModelView]


def gateway_url(state: Path) -> str:
    """Where the gateway of this state directory listens. NotFound where none lives."""
    view = read_view(state)
    if view is None or not view.url:
        raise NotFound(
            f"no gateway uses {state}; start one with `elastickv serve`, or name yours with --url or --state"
        )
    return view.url


class AdminClient:
    """A context manager. `timeout`: seconds for an order to be carried out."""

    def __init__(self, url: str, key: str | None, timeout: float) -> None:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        self._url = url.rstrip("/")
        self._timeout = timeout
        try:
            self._client = httpx.Client(base_url=self._url, headers=headers, timeout=timeout, trust_env=False)
        except (httpx.InvalidURL, UnicodeEncodeError):
            raise InvalidArgument(f"{url!r} is no address; write http://HOST:PORT") from None

    def __enter__(self) -> AdminClient:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def models(self) -> list[ModelView]:
        """All of them."""
        return msgspec.json.decode(self._ask("GET", "/admin/models"), type=_Models).models

    def model(self, name: str) -> ModelView:
        """NotFound lists the names there are."""
        return self._view("GET", f"/admin/models/{name}")

    def add(self, name: str, keys: Mapping[str, Any]) -> ModelView:
        """Begins to serve it. `keys`: those of a file's table."""
        return self._view("POST", "/admin/models", {"name": name, **keys})

    def remove(self, name: str) -> ModelView:
        """As it was last; its requests have ended, and its engines."""
        return self._view("DELETE", f"/admin/models/{name}")

    def sleep(self, name: str) -> ModelView:
        """Asleep."""
        return self._view("POST", f"/admin/models/{name}/sleep", {})

    def wake(self, name: str) -> ModelView:
        """Ready."""
        return self._view("POST", f"/admin/models/{name}/wake", {})

    def starting(self, name: str) -> Iterator[ModelView]:
        """Each new state of a model that was added, until it is ready. EngineRefused with the engine's last lines."""
        until, last = time.monotonic() + self._timeout, None
        while True:
            view = self.model(name)
            if view.state is not last:
                last = view.state
                yield view
            if view.state is State.READY or view.state is State.STOPPED:
                return
            if view.state is State.FAILED:
                logs = [line for replica in view.replicas if replica.log for line in tail(Path(replica.log))]
                raise EngineRefused("\n  ".join([f"model {name} failed: {view.reason}", *logs]))
            if time.monotonic() >= until:
                raise DeadlineExceeded(f"waited {self._timeout:.0f} s for model {name}, which is {view.state.value}")
            time.sleep(_LOOK_S)

    def _view(self, method: str, path: str, body: object = None) -> ModelView:
        return msgspec.json.decode(self._ask(method, path, body), type=ModelView)

    def _ask(self, method: str, path: str, body: object = None) -> bytes:
        try:
            answer = (
                self._client.request(method, path, json=body)
                if body is not None
                else self._client.request(method, path)
            )
        except httpx.TimeoutException:
            raise DeadlineExceeded(
                f"waited {self._timeout:.0f} s for the gateway at {self._url}; it goes on with what it was asked to do"
            ) from None
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise NotFound(f"no gateway answers at {self._url}: {error}; start one with `elastickv serve`") from None
        if answer.is_success:
            return bytes(answer.content)
        raise _error(answer, self._url)


def _error(answer: httpx.Response, url: str) -> ElasticKVError:
    try:
        said = answer.json()["error"]
        text, code = str(said["message"]), str(said.get("code"))
    except (ValueError, KeyError, TypeError, AttributeError):
        text, code = f"{url} answered with status {answer.status_code}; is it a gateway?", ""
    kind = _BY_CODE.get(code) or _BY_STATUS.get(answer.status_code, ElasticKVError)
    return kind(text)
