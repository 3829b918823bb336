"""`/v1/chat/completions` and `/v1/completions`: a request from its body to the last byte of its answer."""

import contextlib
import dataclasses
import json
import secrets
import time
from collections.abc import Callable, Sequence

from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive, Scope, Send

from infer.prompt import Prompt
from infer.serve.answers import Reply, event
from infer.serve.content import Conversation, read_messages
from infer.serve.errors import ApiError, as_api_error, json_response
from infer.serve.fields import ChatBody, Options, TextBody, read_body, read_options
from infer.serve.service import RAW, Service
from infer.serve.worker import Answering
from llava_jax.console import note

STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would collect chunks
]


@dataclasses.dataclass(frozen=True)
class Asked:
    """A request that has been read."""

    conversation: Conversation
    options: Options
    model: str


class Completions:
    """An endpoint, as an ASGI application."""

    def __init__(self, service: Service, *, is_chat: bool):
        self.service, self.is_chat = service, is_chat

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request, arrived, service = Request(scope, receive), time.perf_counter(), self.service
        with service.place() as place:
            asked = await service.prepare(self._read, await service.read(request, place))
            place.grow(asked.options.n)
            prompt = await service.prompt(asked.conversation, place, None if self.is_chat else RAW)
            prompts = [numbered(prompt, number) for number in range(asked.options.n)]
            kind = "chatcmpl" if self.is_chat else "cmpl"
            reply = Reply(
                f"{kind}-{secrets.token_hex(12)}", asked.model, self.is_chat, asked.options, prompt,
                service.engine.tokenizer,
            )  # fmt: skip
            async with service.answers(prompts, asked.options.sampling, arrived, receive) as answering:
                try:
                    if asked.options.stream:
                        await _stream(reply, answering, send, lambda error: self._failure(request, error))
                    else:
                        await answering.wait()
                        answering.check()
                        # In a thread: log probabilities of thousands of tokens take seconds.
                        response = await service.prepare(lambda: json_response(reply.whole(answering.choices)))
                        await response(scope, receive, send)
                finally:
                    answering.cancel()
                    request.state.record.tokens = (reply.prompt.length, sum(c.seen[0] for c in answering.choices))
                    if service.settings.log_prompts:
                        _log(request, asked, [choice.generation.text for choice in answering.choices])

    def _failure(self, request: Request, error: Exception) -> ApiError:
        return as_api_error(error, request.state.record.id, with_message=self.service.settings.log_prompts)

    def _read(self, data: bytes) -> Asked:
        """Read a body. Runs in a thread.

        Raises:
          ApiError: it is invalid.
        """
        settings, engine = self.service.settings, self.service.engine
        body: ChatBody | TextBody = read_body(data, ChatBody) if self.is_chat else read_body(data, TextBody)
        check_model(body.model, settings.models)
        options = read_options(
            body, vocab_size=engine.config.text.vocab_size, temperature=settings.temperature,
            max_tokens=min(settings.max_tokens, self.service.context),
        )  # fmt: skip
        if isinstance(body, ChatBody):
            conversation = read_messages(body.messages, settings.max_images)
        else:
            conversation = Conversation((body.prompt,), (), None)
        return Asked(conversation, options, body.model or settings.models[0])


def numbered(prompt: Prompt, number: int) -> Prompt:
    """The prompt of answer `number`, which has random numbers of its own."""
    return dataclasses.replace(prompt, request=dataclasses.replace(prompt.request, number=number))


def check_model(name: str | None, models: Sequence[str]) -> None:
    """Check the name of a model.

    Raises:
      ApiError: there is none of this name.
    """
    if name is not None and name not in models:
        raise ApiError(404, f"The model `{name[:200]}` does not exist.", "model")


async def _stream(reply: Reply, answering: Answering, send: Send, log: Callable[[Exception], ApiError]) -> None:
    """Send an answer as a stream. An error that comes now is an event of it, converted by `log`."""
    await send({"type": "http.response.start", "status": 200, "headers": STREAM_HEADERS})
    try:
        async with contextlib.aclosing(reply.events(answering)) as events:
            async for data in events:
                await send({"type": "http.response.body", "body": data, "more_body": True})
    except ClientDisconnect:
        raise
    except Exception as error:
        await send({"type": "http.response.body", "body": event(log(error).body()), "more_body": True})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


def _log(request: Request, asked: Asked, answers: Sequence[str]) -> None:
    said = {"system": asked.conversation.system, "turns": asked.conversation.turns, "answers": answers}
    note(f"{request.state.record.id} {json.dumps(said, ensure_ascii=False)}")
