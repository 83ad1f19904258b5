"""What the gateway answers, as an OpenAPI 3.1 document. Engines' bodies are there as far as they are read."""

from __future__ import annotations

from typing import Any, Final

import elastickv

__all__ = ["document"]

Document = dict[str, Any]

_ERROR: Final = {"$ref": "#/components/schemas/Error"}
_MEANINGS: Final = {
    "400": "The request cannot be understood, or names no model.",
    "401": "No key, or one that is not known.",
    "403": "This may not be done from there.",
    "404": "There is no such model, or nothing at this path.",
    "405": "Not with this method.",
    "408": "The body did not come in time.",
    "409": "The name is taken, or a limit forbids it.",
    "413": "The body is too large.",
    "431": "The headers are too large.",
    "502": "The model's engine failed over this request, twice.",
    "503": "The model cannot be had now, or its queue is full: see Retry-After.",
}
_PROXIED: Final[tuple[tuple[str, Document], ...]] = (
    ("/v1/chat/completions", {"messages": {"type": "array", "items": {"type": "object"}}}),
    ("/v1/completions", {"prompt": {}}),
    ("/v1/embeddings", {"input": {}}),
    ("/v1/responses", {"input": {}}),
    ("/tokenize", {"prompt": {"type": "string"}}),
    ("/score", {}),
    ("/rerank", {}),
)
_TTFT: Final = {
    "name": "X-TTFT-Target-Ms",
    "in": "header",
    "description": "Milliseconds within which the first token is wanted; decides the order among waiting requests.",
    "schema": {"type": "number", "minimum": 0, "maximum": 1e9},
}
_NAME: Final = {"name": "name", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
_MODEL: Final = {
    "type": "object",
    "required": ["name", "state", "reason", "since", "policy", "replicas", "queued", "outstanding"],
    "properties": {
        "name": {"type": "string"},
        "state": {"enum": ["stopped", "starting", "ready", "draining", "asleep", "waking", "failed"]},
        "reason": {"type": "string"},
        "since": {"type": "number"},
        "policy": {"type": "string"},
        "replicas": {"type": "array", "items": {"type": "object"}},
        "tenants": {"type": "array", "items": {"type": "string"}},
        "queued": {"type": "integer"},
        "outstanding": {"type": "integer"},
        "moves": {"type": "array", "items": {"type": "object"}},
    },
}
_ERROR_SCHEMA: Final = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def document() -> Document:
    """The whole document."""
    paths: Document = {path: {"post": _proxied(path, fields)} for path, fields in _PROXIED}
    paths["/v1/audio/transcriptions"] = {"post": _audio()}
    paths["/v1/models"] = {"get": _operation("The models and their states.", {"type": "object"})}
    paths["/v1/models/{name}"] = {"parameters": [_NAME], "get": _operation("One model.", {"type": "object"})}
    paths["/health"] = {"get": _operation("Whether the gateway answers.", {"type": "object"}, open_=True)}
    ready = _operation("Whether no model is starting.", {"type": "object"}, open_=True)
    ready["responses"]["503"] = _answer("One or more are starting.", {"type": "object"})
    paths["/ready"] = {"get": ready}
    return {
        "openapi": "3.1.0",
        "info": {"title": "elastickv gateway", "version": elastickv.__version__},
        "paths": paths | _admin_paths(),
        "components": {
            "schemas": {"Error": _ERROR_SCHEMA, "Model": _MODEL},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _answer(text: str, schema: Document, kind: str = "application/json") -> Document:
    return {"description": text, "content": {kind: {"schema": schema}}}


def _errors() -> Document:
    return {status: _answer(text, _ERROR) for status, text in _MEANINGS.items()}


def _operation(summary: str, schema: Document, status: str = "200", *, open_: bool = False) -> Document:
    """`open_`: no key is asked for."""
    found: Document = {"summary": summary, "responses": {status: _answer("Done.", schema), **_errors()}}
    return found if open_ else found | {"security": [{}, {"key": []}]}


def _proxied(path: str, fields: Document) -> Document:
    known = {"model": {"type": "string"}, "stream": {"type": "boolean"}, "max_tokens": {"type": "integer"}, **fields}
    schema = {"type": "object", "required": ["model"], "properties": known}
    operation = _operation(f"{path} of the engine of `model`, passed through.", {})
    operation["parameters"] = [_TTFT]
    operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    operation["responses"]["default"] = {"description": "Whatever the engine answers."}
    return operation


def _audio() -> Document:
    schema = {
        "type": "object",
        "required": ["model", "file"],
        "properties": {"model": {"type": "string"}, "file": {"type": "string", "format": "binary"}},
    }
    operation = _operation("/v1/audio/transcriptions of the engine of `model`, passed through.", {})
    operation["requestBody"] = {"required": True, "content": {"multipart/form-data": {"schema": schema}}}
    operation["responses"]["default"] = {"description": "Whatever the engine answers."}
    return operation


def _admin_paths() -> Document:
    model: Document = {"$ref": "#/components/schemas/Model"}
    models = {"type": "object", "properties": {"models": {"type": "array", "items": model}}}
    add = _operation("Add a model; the keys are those of a model in the gateway's file.", model, "201")
    body = {"type": "object", "required": ["name"], "properties": {"name": {"type": "string"}}}
    add["requestBody"] = {"required": True, "content": {"application/json": {"schema": body}}}
    one = "/admin/models/{name}"
    paths: Document = {
        "/admin/models": {"get": _operation("The models.", models), "post": add},
        one: {"get": _operation("One model.", model), "delete": _operation("Drain it and end its engines.", model)},
        f"{one}/sleep": {"post": _operation("Put it to sleep and wait until it is.", model)},
        f"{one}/wake": {"post": _operation("Wake or start it and wait until it is ready.", model)},
    }
    for path, item in paths.items():
        if "{name}" in path:
            item["parameters"] = [_NAME]
        if path.endswith(("sleep", "wake")):
            content = {"application/json": {"schema": {"type": "object"}}}
            item["post"]["requestBody"] = {"required": True, "content": content}
    return paths
