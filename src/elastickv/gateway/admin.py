"""The admin API: which models there are, adding, removing, sleep and wake. Limits are set under /admin/limit."""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from elastickv.errors import InvalidArgument
from elastickv.gateway.base import Fleet
from elastickv.gateway.body import BodyMemory, read_body
from elastickv.gateway.errors import Refused
from elastickv.gateway.spec import model_from_mapping

__all__ = ["BODY_S", "MAX_BODY", "Admin", "json_response"]

MAX_BODY = 64 * 1024
BODY_S = 10.0


def json_response(value: object, status: int = 200) -> Response:
    """By msgspec, which knows the frozen values that a fleet shows."""
    return Response(msgspec.json.encode(value), status, media_type="application/json")


class Admin:
    """Each route answers with the model as it is afterwards (or was last), in the form of ModelView."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._memory = BodyMemory(64 * MAX_BODY)

    def routes(self) -> list[Route]:
        """For the application."""
        return [
            Route("/admin/models", self._list, methods=["GET"]),
            Route("/admin/models", self._add, methods=["POST"]),
            Route("/admin/models/{name}", self._show, methods=["GET"]),
            Route("/admin/models/{name}", self._remove, methods=["DELETE"]),
            Route("/admin/models/{name}/sleep", self._sleep, methods=["POST"]),
            Route("/admin/models/{name}/wake", self._wake, methods=["POST"]),
        ]

    async def _list(self, request: Request) -> Response:
        return json_response({"models": self._fleet.models()})

    async def _show(self, request: Request) -> Response:
        return json_response(self._fleet.model(request.path_params["name"]).view())

    async def _add(self, request: Request) -> Response:
        """Body: `{"name": ..., "path": ..., ...}`, the keys of a [models.NAME] table."""
        entry = await self._object(request)
        name = entry.pop("name", None)
        if not isinstance(name, str):
            raise InvalidArgument("no name; give the field `name`, and the keys of a model beside it")
        await self._fleet.add(model_from_mapping(name, entry, f"model {name[:64]}"))
        return json_response(self._fleet.model(name).view(), 201)

    async def _remove(self, request: Request) -> Response:
        name = request.path_params["name"]
        model = self._fleet.model(name)
        await self._fleet.remove(name)
        return json_response(model.view())

    async def _sleep(self, request: Request) -> Response:
        await self._fleet.sleep(request.path_params["name"])
        return await self._show(request)

    async def _wake(self, request: Request) -> Response:
        await self._fleet.wake(request.path_params["name"])
        return await self._show(request)

    async def _object(self, request: Request) -> dict[str, Any]:
        body = await read_body(request.receive, request.scope["headers"], MAX_BODY, BODY_S, self._memory)
        self._memory.give(len(body))
        try:
            value = msgspec.json.decode(body)
        except (msgspec.DecodeError, ValueError, RecursionError) as error:  # ValueError: not UTF-8
            raise Refused(f"the body is no JSON: {error}", status=400, code="invalid_json") from None
        if not isinstance(value, dict):
            raise Refused("the body must be a JSON object", status=400, code="invalid_json")
        return value
