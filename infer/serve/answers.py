"""What clients receive: answers as objects of JSON, and as events of a stream (Server-Sent Events).

A stream has one chunk for each token, which is what clients that measure latencies count, even if the token's text is
not certain yet and comes with a later one.
"""

import dataclasses
import itertools
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from typing import Any

import msgspec

from infer.serve.fields import Options
from infer.serve.worker import Answering, Choice

FINISH_REASONS = {"end": "stop", "stop": "stop", "length": "length"}
LEAST_LOGPROB = -9999.0  # JSON has no infinity; vLLM's number for it
KEEP_ALIVE_SECONDS = 10.0
KEEP_ALIVE, DONE = b": keep-alive\n\n", b"data: [DONE]\n\n"


@dataclasses.dataclass(frozen=True)
class Reply:
    """What all objects of a reply say of it.

    Attributes:
      is_chat: of `/v1/chat/completions`, not of `/v1/completions`.
      prompt: that is being answered.
      tokenizer: for the text of single tokens.
    """

    id: str
    model: str
    is_chat: bool
    options: Options
    prompt: Any
    tokenizer: Any
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))

    def whole(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """The reply with complete answers."""
        answers = []
        for choice in choices:
            text, tokens = choice.generation.text, range(len(choice.generation.tokens))
            content = {"message": {"role": "assistant", "content": text}} if self.is_chat else {"text": text}
            answers.append(self._choice(choice, content, tokens, offset=0, is_last=True))
        return self._object("chat.completion" if self.is_chat else "text_completion", answers, self.usage(choices))

    def usage(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """How many tokens were read and generated so far. The positions of images count as tokens."""
        completion = sum(choice.seen[0] for choice in choices)
        return {
            "prompt_tokens": self.prompt.length,
            "completion_tokens": completion,
            "total_tokens": self.prompt.length + completion,
            "prompt_tokens_details": {
                "cached_tokens": max(choice.generation.cached_tokens for choice in choices),
                "image_tokens": self.prompt.image_tokens,
                "multimodal_tokens": {"image": self.prompt.image_tokens},
            },
        }

    # ------------------------------------------------------------ stream

    async def events(self, answering: Answering) -> AsyncGenerator[bytes, None]:
        """The events of a stream, those at a time together that arrived together.

        Raises:
          ApiError: a generation ended with an error.
        """
        sent = [_Sent() for _ in answering.choices]
        while True:
            is_done, new = answering.done, bytearray()
            for choice, so_far in zip(answering.choices, sent, strict=True):
                for chunk in self._chunks(choice, so_far):
                    usage = self.usage(answering.choices) if self.options.continuous_usage else None
                    new += event(self._object(self._chunk_name, [chunk], usage))
            if new:
                yield bytes(new)
            if is_done:
                break
            while not await answering.changed(KEEP_ALIVE_SECONDS):
                yield KEEP_ALIVE
        answering.check()
        if self.options.include_usage:
            yield event(self._object(self._chunk_name, [], self.usage(answering.choices)))
        yield DONE

    @property
    def _chunk_name(self) -> str:
        return "chat.completion.chunk" if self.is_chat else "text_completion"

    def _chunks(self, choice: Choice, sent: "_Sent") -> Iterator[dict[str, Any]]:
        """The chunks of a choice that have not been sent."""
        tokens, is_done = choice.seen
        generation = choice.generation
        is_complete = is_done and generation.stopped_by in FINISH_REASONS
        if tokens and not sent.tokens and self.is_chat:
            yield {
                "index": choice.index, "delta": {"role": "assistant", "content": ""}, "logprobs": None,
                "finish_reason": None,
            }  # fmt: skip
        while sent.tokens < tokens or (is_complete and not sent.is_finished):
            new = range(sent.tokens, min(sent.tokens + 1, tokens))
            sent.is_finished = is_complete and sent.tokens + len(new) == tokens
            text = generation.text[sent.length :] if sent.is_finished else generation.tokens[new[0]].text
            content = {"delta": {"content": text}} if self.is_chat else {"text": text}
            yield self._choice(choice, content, new, offset=sent.length, is_last=sent.is_finished)
            sent.tokens, sent.length = sent.tokens + len(new), sent.length + len(text)

    # ------------------------------------------------------------ objects

    def _object(self, name: str, choices: list[dict], usage: dict | None) -> dict[str, Any]:
        base = {"id": self.id, "object": name, "created": self.created, "model": self.model, "choices": choices}
        return base | ({"usage": usage} if usage else {})

    def _choice(
        self, choice: Choice, content: dict[str, Any], tokens: range, *, offset: int, is_last: bool
    ) -> dict[str, Any]:
        """A choice of a reply or of a chunk, with the log probabilities of some of its tokens.

        Args:
          offset: characters of the answer's text before these tokens.
        """
        generation, logprobs = choice.generation, None
        if self.options.logprobs and tokens:
            new = [generation.tokens[i] for i in tokens]
            logprobs = (
                {"content": [self._logprob(t) for t in new]} if self.is_chat else self._text_logprobs(new, offset)
            )
        ended = {
            "finish_reason": FINISH_REASONS[generation.stopped_by] if is_last else None,
            "stop_reason": generation.stop_reason if is_last else None,
        }
        return {"index": choice.index, **content, "logprobs": logprobs, **ended}

    def _logprob(self, token: Any) -> dict[str, Any]:
        top = [self._token(id, logprob) for id, logprob in token.top]
        return self._token(token.id, token.logprob) | {"top_logprobs": top}

    def _token(self, id: int, logprob: float) -> dict[str, Any]:
        data = self.tokenizer.token_bytes(id)
        text = data.decode(errors="replace")
        return {"token": text, "logprob": max(logprob, LEAST_LOGPROB), "bytes": list(data)}

    def _text_logprobs(self, tokens: Sequence[Any], offset: int) -> dict[str, Any]:
        """Log probabilities as `/v1/completions` has them."""
        texts = [self.tokenizer.token_bytes(token.id).decode(errors="replace") for token in tokens]
        offsets = itertools.accumulate(map(len, texts[:-1]), initial=offset)
        return {
            "tokens": texts,
            "token_logprobs": [max(token.logprob, LEAST_LOGPROB) for token in tokens],
            "top_logprobs": [{t["token"]: t["logprob"] for t in self._logprob(x)["top_logprobs"]} for x in tokens],
            "text_offset": list(offsets),
        }


@dataclasses.dataclass
class _Sent:
    """What has been sent of a choice: tokens, and characters of its text."""

    tokens: int = 0
    length: int = 0
    is_finished: bool = False


def event(value: Any) -> bytes:
    """An event of a stream."""
    return b"data: " + msgspec.json.encode(value) + b"\n\n"
