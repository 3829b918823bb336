"""The routes of the server."""

import base64
import hashlib
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from infer.prompt import Prompt
from infer.serve.completions import Completions, check_model
from infer.serve.content import Conversation, read_messages
from infer.serve.errors import ApiError, as_api_error, json_response
from infer.serve.fields import DetokenizeBody, TokenizeBody, read_body
from infer.serve.gate import Gate
from infer.serve.metrics import CONTENT_TYPE
from infer.serve.openapi import describe
from infer.serve.service import RAW, Service
from llava_jax import __version__
from llava_jax.data.splice import IMAGE, TEXT
from llava_jax.data.templates import IMAGE_TOKEN

PAGE = Path(__file__).parent / "page.html"


def make_app(service: Service) -> Starlette:
    """The ASGI application of a service."""
    endpoints = Endpoints(service)
    get, post = ["GET"], ["POST"]
    routes = [
        Route("/v1/chat/completions", Completions(service, is_chat=True), methods=post),
        Route("/v1/completions", Completions(service, is_chat=False), methods=post),
        Route("/v1/models", endpoints.models, methods=get),
        Route("/v1/models/{name:path}", endpoints.model, methods=get),
        Route("/tokenize", endpoints.tokenize, methods=post),
        Route("/detokenize", endpoints.detokenize, methods=post),
        Route("/health", endpoints.health, methods=get),
        Route("/ping", endpoints.health, methods=[*get, *post]),
        Route("/metrics", endpoints.metrics, methods=get),
        Route("/version", endpoints.version, methods=get),
        Route("/openapi.json", endpoints.openapi, methods=get),
        Route("/", endpoints.page, methods=get),
    ]
    middleware = [Middleware(Gate, service=service)]
    if origins := service.settings.origins:
        every, exposed = ["*"], ["Retry-After", "X-Request-Id"]
        cors = Middleware(
            CORSMiddleware, allow_origins=origins, allow_methods=every, allow_headers=every, expose_headers=exposed
        )
        middleware.insert(0, cors)
    app = Starlette(routes=routes, middleware=middleware, exception_handlers={HTTPException: _http_error})
    app.router.redirect_slashes = False
    return app


class Endpoints:
    """The endpoints that do not generate."""

    def __init__(self, service: Service):
        self.service, self.created = service, int(time.time())
        self._page, self._policy = _read_page()

    async def models(self, request: Request) -> Response:
        return json_response({"object": "list", "data": [self._model(name) for name in self.service.settings.models]})

    async def model(self, request: Request) -> Response:
        name = request.path_params["name"]
        check_model(name, self.service.settings.models)
        return json_response(self._model(name))

    def _model(self, name: str) -> dict[str, Any]:
        root = self.service.settings.models[0]
        return {
            "id": name, "object": "model", "created": self.created, "owned_by": "llava-jax", "root": root,
            "parent": None, "max_model_len": self.service.context, "permission": [],
        }  # fmt: skip

    async def health(self, request: Request) -> Response:
        return Response(status_code=200 if self.service.is_healthy else 503)

    async def metrics(self, request: Request) -> Response:
        return Response(self.service.metrics.text(), media_type=CONTENT_TYPE)

    async def version(self, request: Request) -> Response:
        return json_response({"version": __version__})

    async def openapi(self, request: Request) -> Response:
        return json_response(describe())

    async def page(self, request: Request) -> Response:
        headers = {
            "Content-Security-Policy": self._policy, "Referrer-Policy": "no-referrer", "Cache-Control": "no-cache",
        }  # fmt: skip
        return Response(self._page, headers=headers, media_type="text/html")

    async def tokenize(self, request: Request) -> Response:
        service, models = self.service, self.service.settings.models
        with service.place() as place:
            body = await service.prepare(read_body, await service.read(request, place), TokenizeBody)
            check_model(body.model, models)
            if (body.prompt is None) == (body.messages is None):
                raise ApiError(400, "give either prompt or messages", "prompt")
            if body.prompt is not None:
                prompt = await service.prompt(Conversation((body.prompt,), (), None), place, RAW)
            else:
                prompt = await service.prompt(read_messages(body.messages, service.settings.max_images), place)
            return json_response(await service.prepare(self._tokens, prompt, body))

    def _tokens(self, prompt: Prompt, body: TokenizeBody) -> dict[str, Any]:
        """The tokens of a prompt; `IMAGE` at the positions of images."""
        tokenizer, tokens = self.service.engine.tokenizer, np.where(prompt.places == TEXT, prompt.ids, IMAGE).tolist()
        if body.add_special_tokens is False and tokens[:1] == [tokenizer.bos_id]:
            del tokens[0]
        strings = None
        if body.return_token_strs:
            strings = [IMAGE_TOKEN if i == IMAGE else tokenizer.token_bytes(i).decode(errors="replace") for i in tokens]
        return {
            "count": len(tokens), "max_model_len": self.service.context, "tokens": tokens, "token_strs": strings,
        }  # fmt: skip

    async def detokenize(self, request: Request) -> Response:
        service = self.service
        with service.place() as place:
            body = await service.prepare(read_body, await service.read(request, place), DetokenizeBody)
            check_model(body.model, service.settings.models)
            vocab_size = service.engine.config.text.vocab_size
            if high := [token for token in body.tokens if token >= vocab_size]:
                raise ApiError(400, f"tokens: {high[0]} is not a token id below {vocab_size:,}", "tokens")
            return json_response({"prompt": await service.prepare(service.engine.tokenizer.decode, body.tokens)})


async def _http_error(request: Request, error: Exception) -> Response:
    return as_api_error(error, request.state.record.id, with_message=False).response()


def _read_page() -> tuple[bytes, str]:
    """The page, and its content security policy: its own scripts and styles, by their hashes, and requests to its own
    origin."""
    page = PAGE.read_bytes()

    def hashes(tag: bytes) -> str:
        found = re.findall(rb"<%b\b[^>]*>(.*?)</%b>" % (tag, tag), page, re.DOTALL)
        return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(text).digest()).decode()}'" for text in found)

    return page, (
        f"default-src 'none'; script-src {hashes(b'script')}; style-src {hashes(b'style')}; img-src data: blob:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
