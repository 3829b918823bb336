"""The fields of requests: their types and ranges, which values are refused, and what they mean for sampling.

The `Body` types are the table of fields, which the description of the API is made from too. Fields that are not in
it are ignored, since clients send many (Open WebUI its own ones): OpenAI's and vLLM's rules, as vLLM's
chat endpoint has them.
"""

import dataclasses
import re
import secrets
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from infer.sampling import Sampling
from infer.serve.errors import ApiError, not_implemented
from llava_jax.console import MAX_INT32, MIN_POSITIVE, InputError
from llava_jax.json_files import decode_json

MAX_CHOICES = 16
MAX_VALUES = 2**20  # of JSON in a request: each takes up to 100 bytes of memory for 2 bytes of text

Int64 = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
StopText = Annotated[str, Meta(min_length=1, max_length=1000)]
TokenId = Annotated[int, Meta(ge=0, le=MAX_INT32)]
Body = TypeVar("Body", bound=msgspec.Struct)


class ImageUrl(msgspec.Struct):
    url: str
    detail: Literal["auto", "low", "high", "original"] | None = None  # the model has one level of detail


class TextPart(msgspec.Struct, tag_field="type", tag="text"):
    text: str


class ImagePart(msgspec.Struct, tag_field="type", tag="image_url"):
    image_url: str | ImageUrl

    @property
    def url(self) -> str:
        return self.image_url if isinstance(self.image_url, str) else self.image_url.url


class Message(msgspec.Struct):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[TextPart | ImagePart] | None = None


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class SamplingBody(msgspec.Struct, kw_only=True):
    """Fields of every request that generates. None is the default of each."""

    model: str | None = None
    max_tokens: Annotated[int, Meta(ge=1, le=MAX_INT32)] | None = None
    min_tokens: Annotated[int, Meta(ge=0, le=MAX_INT32)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=MAX_INT32)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=2)] | None = None
    logit_bias: dict[str, Annotated[float, Meta(ge=-100, le=100)]] | None = None
    stop: StopText | Annotated[list[StopText], Meta(max_length=4)] | None = None
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=128)] | None = None
    ignore_eos: bool | None = None
    seed: Int64 | None = None
    n: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None


class ChatBody(SamplingBody, kw_only=True):
    """Fields of `/v1/chat/completions`."""

    messages: Annotated[list[Message], Meta(min_length=1)]
    max_completion_tokens: Annotated[int, Meta(ge=1, le=MAX_INT32)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None


class TextBody(SamplingBody, kw_only=True):
    """Fields of `/v1/completions`."""

    prompt: str
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None


class TokenizeBody(msgspec.Struct):
    """Fields of `/tokenize`: text, or messages as of `/v1/chat/completions`."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeBody(msgspec.Struct):
    """Fields of `/detokenize`."""

    tokens: Annotated[list[TokenId], Meta(max_length=2**20)]
    model: str | None = None


# Fields that would change the answer and are not implemented, with the values beside null that change nothing.
REFUSED: dict[str, tuple[Any, ...]] = {
    "add_generation_prompt": (True,), "allowed_token_ids": (), "audio": (), "bad_words": ([],), "best_of": (1,),
    "chat_template": (), "chat_template_kwargs": ({},), "continue_final_message": (False,), "documents": ([],),
    "echo": (False,), "function_call": ("none", "auto"), "functions": ([],), "guided_choice": (), "guided_grammar": (),
    "guided_json": (), "guided_regex": (), "include_stop_str_in_output": (False,), "length_penalty": (1, 1.0),
    "logits_processors": ([],), "mm_processor_kwargs": ({},), "modalities": (["text"], []), "prediction": (),
    "prompt_logprobs": (), "response_format": ({"type": "text"},), "skip_special_tokens": (True,),
    "structured_outputs": (), "suffix": ("",), "tool_choice": ("none", "auto"), "tools": ([],),
    "truncate_prompt_tokens": (), "use_beam_search": (False,), "web_search_options": (),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Options:
    """How a request wants to be answered.

    Attributes:
      n: answers to one prompt.
      logprobs: whether to return log probabilities.
      continuous_usage: whether every chunk of a stream has the usage so far.
    """

    sampling: Sampling
    n: int
    logprobs: bool
    stream: bool
    include_usage: bool
    continuous_usage: bool


def read_body(data: bytes, schema: type[Body]) -> Body:
    """Parse the body of a request.

    Raises:
      ApiError: it is not JSON, a field has another type or is out of range, or is not implemented.
    """
    if sum(map(data.count, (b"{", b"[", b",", b'"'))) > MAX_VALUES:
        raise ApiError(400, f"the body has more than {MAX_VALUES:,} values")
    try:
        fields = decode_json(data, dict[str, msgspec.Raw], "body")
        for name in fields.keys() & REFUSED.keys():
            value = decode_json(fields[name], Any, name)
            if value is not None and not any(value == same and type(value) is type(same) for same in REFUSED[name]):
                raise not_implemented(name)
        return decode_json(data, schema, "body")
    except InputError as error:
        raise invalid(error) from None


def invalid(error: InputError) -> ApiError:
    """The error for an invalid field, which the message names: "body: messages[0].role: ...", "--top-p 3: ..."."""
    message = str(error).removeprefix("body: ")
    found = re.match(r"--([a-z-]+) |([a-z][\w.\[\]]*)(?:: | is missing)", message)
    if not found:
        return ApiError(400, message)
    param = found[1].replace("-", "_") if found[1] else found[2]
    if found[1]:
        message = f"{param} {message[found.end() :]}"
    return ApiError(400, message, param)


def read_options(body: ChatBody | TextBody, *, vocab_size: int, temperature: float, max_tokens: int) -> Options:
    """Combine the fields of a request.

    Args:
      temperature: of requests without one.
      max_tokens: the most that an answer may have.

    Raises:
      ApiError: fields contradict each other, or a token id is not one of the model's.
    """
    if body.stream_options and not body.stream:
        raise ApiError(400, "stream_options needs stream: true", "stream_options")
    limit = min(getattr(body, "max_completion_tokens", None) or body.max_tokens or max_tokens, max_tokens)
    if (body.min_tokens or 0) > limit:
        raise ApiError(
            400, f"min_tokens {body.min_tokens} is more than the {limit} tokens that an answer may have", "min_tokens"
        )
    if isinstance(body, ChatBody):
        if body.top_logprobs is not None and not body.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs: true", "top_logprobs")
        top_logprobs = (body.top_logprobs or 0) if body.logprobs else None
    else:
        top_logprobs = body.logprobs
    if high := [token for token in body.stop_token_ids or () if token >= vocab_size]:
        raise ApiError(400, f"stop_token_ids: {high[0]} is not a token id below {vocab_size:,}", "stop_token_ids")
    values: dict[str, Any] = {
        "temperature": _rounded(temperature if body.temperature is None else body.temperature),
        "top_p": 1.0 if body.top_p is None else max(body.top_p, MIN_POSITIVE),  # of 0, the most likely token remains
        "top_k": max(body.top_k or 0, 0),
        "min_p": _rounded(body.min_p or 0.0),
        "seed": secrets.randbelow(MAX_INT32) if body.seed is None else body.seed & MAX_INT32,
        "max_new_tokens": limit,
        "min_new_tokens": body.min_tokens or 0,
        "presence_penalty": _rounded(body.presence_penalty or 0.0),
        "frequency_penalty": _rounded(body.frequency_penalty or 0.0),
        "repetition_penalty": 1.0 if body.repetition_penalty is None else max(body.repetition_penalty, MIN_POSITIVE),
        "logit_bias": _biases(body.logit_bias or {}, vocab_size),
        "stop": (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ()),
        "stop_token_ids": tuple(body.stop_token_ids or ()),
        "ignore_eos": bool(body.ignore_eos),
        "top_logprobs": top_logprobs,
    }
    try:
        sampling = Sampling(**values)
    except InputError as error:
        raise invalid(error) from None
    stream = body.stream_options or StreamOptions()
    return Options(
        sampling, body.n or 1, top_logprobs is not None, bool(body.stream),
        bool(stream.include_usage), bool(stream.continuous_usage_stats),
    )  # fmt: skip


def _rounded(value: float) -> float:
    """A number as float32 has it: 0 for a smaller one than `Sampling` accepts."""
    return 0.0 if abs(value) < MIN_POSITIVE else value


def _biases(biases: dict[str, float], vocab_size: int) -> tuple[tuple[int, float], ...]:
    """The pairs of token id and bias in `logit_bias`, whose keys are strings."""
    for key in biases:
        if not re.fullmatch("[0-9]{1,9}", key) or int(key) >= vocab_size:
            raise ApiError(400, f"logit_bias: {key[:20]!r} is not a token id below {vocab_size:,}", "logit_bias")
    return tuple((int(key), _rounded(bias)) for key, bias in biases.items())
