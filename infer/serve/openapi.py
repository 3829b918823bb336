"""The description of the API in OpenAPI's format, made from the types of the fields."""

from typing import Any

import msgspec

from infer.serve.errors import TYPES
from infer.serve.fields import ChatBody, DetokenizeBody, TextBody, TokenizeBody
from llava_jax import __version__

POST = {
    "/v1/chat/completions": (ChatBody, "Answer a conversation."),
    "/v1/completions": (TextBody, "Continue a text."),
    "/tokenize": (TokenizeBody, "The tokens of a text or a conversation."),
    "/detokenize": (DetokenizeBody, "The text of tokens."),
}
GET = {
    "/v1/models": "The models.",
    "/v1/models/{name}": "A model.",
    "/health": "200 if the server can answer, 503 if not.",
    "/ping": "As /health.",
    "/metrics": "Metrics for Prometheus.",
    "/version": "The version of the server.",
}
NAME = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}


def describe() -> dict[str, Any]:
    """The description, as JSON."""
    bodies = [body for body, _ in POST.values()]
    schemas, components = msgspec.json.schema_components(bodies, ref_template="#/components/schemas/{name}")
    components["Error"] = _error()
    paths: dict[str, Any] = {}
    for path, about in GET.items():
        paths[path] = {"get": {"summary": about, "responses": _responses()}}
        if "{" in path:
            paths[path]["get"]["parameters"] = [NAME]
    for (path, (_, about)), schema in zip(POST.items(), schemas, strict=True):
        content = {"application/json": {"schema": schema}}
        body = {"required": True, "content": content}
        paths[path] = {"post": {"summary": about, "requestBody": body, "responses": _responses()}}
    key = {"type": "http", "scheme": "bearer"}
    return {
        "openapi": "3.1.0",
        "info": {"title": "llava-jax", "version": __version__},
        "paths": paths,
        "components": {"schemas": components, "securitySchemes": {"key": key}},
        "security": [{}, {"key": []}],
    }


def _responses() -> dict[str, Any]:
    content = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    return {"200": {"description": "OK"}, "default": {"description": "An error.", "content": content}}


def _error() -> dict[str, Any]:
    error = {
        "message": {"type": "string"},
        "type": {"enum": list(TYPES.values())},
        "param": {"type": ["string", "null"]},
        "code": {"enum": list(TYPES)},
    }
    inner = {"type": "object", "properties": error, "required": list(error)}
    return {"type": "object", "properties": {"error": inner}, "required": ["error"]}
