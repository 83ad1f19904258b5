"""What each operation of the control socket does. Knows no sockets: requests in, results out.

Belongs to one event loop. Every failure is an error of elastickv's family.
"""

from __future__ import annotations

import asyncio
import dataclasses
import importlib.metadata
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

from elastickv.config import Settings
from elastickv.control.desk import Desk
from elastickv.control.protocol import (
    PROTOCOL,
    FitRequest,
    Forget,
    Get,
    Hello,
    List,
    Request,
    SetLimit,
    Trim,
    Watch,
    bytes_of,
    size_of,
)
from elastickv.errors import ElasticKVError, InvalidArgument, NotFound, Unavailable
from elastickv.fit import would_fit
from elastickv.ledger import DeviceView
from elastickv.ledgers import device_names, no_ledger_text
from elastickv.limits import LimitOrder, late, limit_order, place_order

__all__ = ["Service"]

LOOK_S: Final = 0.004
"""Between the first two looks whether a tenant has acknowledged. One reading serves all who wait."""
SLOWER: Final = 1.25
"""Each look comes so much later than the one before, so that who waits long costs little, up to..."""
LAST_LOOK_S: Final = 0.1
SHARED_S: Final = 0.02
"""A reading that is no older than this serves a watch."""


class Service:
    """Answers requests about the ledgers of one directory."""

    def __init__(self, settings: Settings, waits: int) -> None:
        self._settings = settings
        self._waits = waits
        self._waiting = 0
        self._desks: dict[str, Desk] = {}

    async def answer(self, request: Request) -> Any:
        """The result of any request but a watch."""
        match request:
            case Hello():
                version = importlib.metadata.version("elastickv")
                return {"protocol": PROTOCOL, "version": version, "pid": os.getpid(), "directory": self._directory}
            case List():
                return await self.devices(request.device)
            case Get():
                view = await self._find(request.tenant, request.device)
                return {"device": view.device, "tenant": view.tenant(request.tenant)}
            case SetLimit():
                with self._turn(request.wait):
                    return await self._set(request)
            case FitRequest():
                return await self._fit(request)
            case Trim():
                with self._turn(request.wait):
                    return await self._trim(request)
            case Forget():
                return await self._forget(request)
        raise InvalidArgument(f"no such operation: {type(request).__name__}")

    async def devices(self, device: str | None = None, max_age: float = 0.0) -> dict[str, Any]:
        """Every device that can be read; `errors` has those that cannot."""
        views: list[DeviceView] = []
        errors: list[dict[str, str]] = []
        names = self._names(device)
        for name, view in zip(names, await self._views(names, max_age), strict=True):
            if isinstance(view, DeviceView):
                views.append(view)
            else:
                errors.append({"device": name, "message": view.message})
        return {"directory": self._directory, "devices": views, "errors": errors}

    async def watched(self, request: Watch) -> dict[str, Any]:
        """What a watch sees now."""
        seen = await self.devices(request.device, SHARED_S)
        if request.tenant is not None:
            seen["devices"] = [
                dataclasses.replace(view, tenants=tuple(t for t in view.tenants if t.name == request.tenant))
                for view in seen["devices"]
            ]
        return seen

    @staticmethod
    def steady(seen: dict[str, Any]) -> list[object]:
        """What has to differ for a watch to be told: everything but ages."""
        views = [
            dataclasses.replace(view, tenants=tuple(dataclasses.replace(t, demand_age_ns=0) for t in view.tenants))
            for view in seen["devices"]
        ]
        return [views, seen["errors"]]

    def close(self) -> None:
        """No answer is to be had afterwards."""
        for desk in self._desks.values():
            desk.close()
        self._desks.clear()

    @contextmanager
    def _turn(self, seconds: float) -> Iterator[None]:
        """One of those who may wait at once. Unavailable, with nothing ordered, when there are too many."""
        waits = int(seconds > 0)
        if waits and self._waiting >= self._waits:
            raise Unavailable(
                f"{self._waiting} requests wait for tenants already; ask with `wait` 0, or try again later"
            )
        self._waiting += waits
        try:
            yield
        finally:
            self._waiting -= waits

    @property
    def _directory(self) -> str:
        return str(self._settings.directory)

    def _names(self, device: str | None = None) -> list[str]:
        names = device_names(self._settings.directory)
        for gone in self._desks.keys() - set(names):
            self._desks.pop(gone).close()
        if device is None:
            return names
        if device not in names:
            there = f"there are: {', '.join(names)}" if names else "there is none"
            raise NotFound(f"no ledger of device '{device}' in {self._directory}; {there}", device=device)
        return [device]

    def _desk(self, name: str) -> Desk:
        if name not in self._desks:
            self._desks[name] = Desk(self._settings, name)
        return self._desks[name]

    async def _views(self, names: Sequence[str], max_age: float = 0.0) -> list[DeviceView | ElasticKVError]:
        found = await asyncio.gather(*(self._desk(name).view(max_age) for name in names), return_exceptions=True)
        for one in found:
            if isinstance(one, BaseException) and not isinstance(one, ElasticKVError):
                raise one
        return [one for one in found if isinstance(one, (DeviceView, ElasticKVError))]

    async def _find(self, tenant: str, device: str | None) -> DeviceView:
        """The one device with a tenant of that name."""
        names = self._names(device)
        if not names:
            raise NotFound(no_ledger_text(self._settings.directory), directory=self._directory)
        views = await self._views(names)
        here = [view for view in views if isinstance(view, DeviceView)]
        having = [view for view in here if any(one.name == tenant for one in view.tenants)]
        if len(having) > 1:
            raise InvalidArgument(
                f"'{tenant}' is on {len(having)} devices; name one in `device`: "
                f"{', '.join(view.device for view in having)}",
                tenant=tenant,
            )
        if having:
            return having[0]
        for view in views:
            if isinstance(view, ElasticKVError):
                raise view
        if len(here) == 1:
            here[0].tenant(tenant)
        raise NotFound(f"no tenant named '{tenant}' on any of: {', '.join(names)}", tenant=tenant)

    async def _set(self, request: SetLimit) -> LimitOrder:
        limit = size_of(request.limit, "limit")
        desk = self._desk((await self._find(request.tenant, request.device)).device)
        revision = await desk.order(lambda ledger: place_order(ledger, request.tenant, limit, request.now))
        until, rest = time.monotonic() + request.wait, LOOK_S
        while True:
            order = limit_order(await desk.view(), request.tenant, revision)
            if order.state != "pending" or request.wait == 0:
                return order
            if time.monotonic() >= until:
                raise late(order, request.wait)
            rest = await _rest(rest, until)

    async def _fit(self, request: FitRequest) -> dict[str, Any]:
        names = self._names(request.device)
        if len(names) != 1:
            raise InvalidArgument(f"name one device in `device`; there are: {', '.join(names) or 'none'}")
        fit = would_fit(
            await self._desk(names[0]).view(),
            bytes_of(request.static, "static"),
            bytes_of(request.floor, "floor"),
            request.weight,
        )
        return {"device": names[0], "fits": fit.fits, **dataclasses.asdict(fit)}

    async def _trim(self, request: Trim) -> dict[str, Any]:
        size = bytes_of(request.bytes, "bytes")
        name = request.tenant
        desk = self._desk((await self._find(name, request.device)).device)
        revision = await desk.order(lambda ledger: ledger.order_trim(name, size))
        answer: dict[str, Any] = {"device": desk.device, "tenant": name, "asked": size, "given": None}
        until, rest = time.monotonic() + request.wait, LOOK_S
        while request.wait > 0:
            row = next((one for one in (await desk.view()).tenants if one.name == name), None)
            if row is None or not row.alive or row.trim_wanted == 0 or time.monotonic() >= until:
                # Answered, or never to be, or late: the ledger says which.
                answer["given"] = await desk.order(lambda ledger: ledger.wait_trim(name, revision, 0))
                break
            rest = await _rest(rest, until)
        return answer

    async def _forget(self, request: Forget) -> dict[str, Any]:
        desk = self._desk((await self._find(request.tenant, request.device)).device)
        await desk.order(lambda ledger: ledger.forget(request.tenant))
        return {"device": desk.device, "tenant": request.tenant, "forgotten": True}


async def _rest(seconds: float, until: float) -> float:
    """Sleeps, not beyond `until`; returns how long to sleep the next time."""
    await asyncio.sleep(min(seconds, max(0.0, until - time.monotonic())))
    return min(SLOWER * seconds, LAST_LOOK_S)
