"""The official client against the server: what each field does."""

import base64
import io

import openai
import pytest
from PIL import Image

from llava_jax.data.templates import IMAGE_PART
from scripted_server import IMAGE_POSITIONS, WORDS, answer_of

QUESTION = "What is in this image?"


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:
        yield client


def ask(client, *messages, **fields):
    """Ask with messages, or texts of the user."""
    messages = [{"role": "user", "content": m} if isinstance(m, str) else m for m in messages]
    return client.chat.completions.create(model="scripted", messages=messages, temperature=0, **fields)


def data_url(size=(8, 8), colour="red") -> str:
    Image.new("RGB", size, colour).save(file := io.BytesIO(), "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def image_part(url=None) -> dict:
    return {"type": "image_url", "image_url": {"url": url or data_url(), "detail": "auto"}}


def test_an_answer(client):
    reply = ask(client, QUESTION)
    assert reply.object == "chat.completion" and reply.model == "scripted" and reply.id.startswith("chatcmpl-")
    [choice] = reply.choices
    assert choice.message.role == "assistant" and choice.message.content == answer_of((QUESTION,))
    assert choice.finish_reason == "stop" and choice.logprobs is None
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens, reply.usage.total_tokens) == (5, 13, 18)
    assert reply.usage.prompt_tokens_details.cached_tokens == 0


def test_a_stream_has_a_chunk_for_each_token(client):
    chunks = list(ask(client, QUESTION, stream=True, stream_options={"include_usage": True}))
    first, *middle, last, usage = chunks
    assert first.choices[0].delta.role == "assistant" and first.choices[0].delta.content == ""
    assert len({chunk.id for chunk in chunks}) == 1 and {c.object for c in chunks} == {"chat.completion.chunk"}
    assert "".join(c.choices[0].delta.content for c in chunks[:-1]) == answer_of((QUESTION,))
    assert len(middle) == 12 and all(c.choices[0].finish_reason is None for c in middle)
    assert last.choices[0].finish_reason == "stop"
    assert usage.choices == [] and usage.usage.completion_tokens == 13
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_usage_of_every_chunk(client):
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(ask(client, QUESTION, stream=True, stream_options=options))
    assert chunks[-1].usage.completion_tokens == 13 and all(chunk.usage.prompt_tokens == 5 for chunk in chunks)


def test_several_choices(client):
    fields = dict(messages=[{"role": "user", "content": QUESTION}], model="scripted", temperature=1, seed=7, n=3)
    expected = [answer_of((QUESTION,), number=i, temperature=1.0, seed=7) for i in range(3)]
    assert len(set(expected)) == 3
    reply = client.chat.completions.create(**fields)
    assert [choice.message.content for choice in reply.choices] == expected
    assert reply.usage.completion_tokens == 39 and reply.usage.prompt_tokens == 5
    texts = ["", "", ""]
    for chunk in client.chat.completions.create(**fields, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content
    assert texts == expected


def test_seeds(client):
    def ask_seed(**fields):
        messages = [{"role": "user", "content": QUESTION}]
        return client.chat.completions.create(model="scripted", messages=messages, **fields).choices[0].message.content

    assert ask_seed(seed=5) == ask_seed(seed=5) == answer_of((QUESTION,), temperature=1.0, seed=5)
    assert len({ask_seed() for _ in range(4)}) == 4  # random without one
    assert ask_seed(seed=-1) == answer_of((QUESTION,), temperature=1.0, seed=2**31 - 1)
    assert ask_seed(seed=2**63 - 1) == ask_seed(seed=-1)


def test_stop_strings_and_limits(client):
    text = answer_of((QUESTION,))
    stop = next(word for word in WORDS if word in text and not text.startswith(word))
    reply = ask(client, QUESTION, stop=[stop, "never"])
    assert reply.choices[0].message.content == text.partition(stop)[0]
    assert reply.choices[0].finish_reason == "stop" and reply.choices[0].stop_reason == stop
    chunks = list(ask(client, QUESTION, stop=stop, stream=True))
    assert chunks[-1].choices[0].finish_reason == "stop"
    for fields in ({"max_tokens": 3}, {"max_completion_tokens": 3, "max_tokens": 9}):
        reply = ask(client, QUESTION, **fields)
        assert reply.choices[0].finish_reason == "length" and reply.usage.completion_tokens == 3
    [*_, last] = ask(client, QUESTION, max_tokens=1, stream=True)
    assert last.choices[0].finish_reason == "length"


def test_fields_reach_the_engine(server, client):
    extra = {
        "top_k": -1, "min_p": 0.25, "repetition_penalty": 1.5, "min_tokens": 2, "ignore_eos": True,
        "stop_token_ids": [4], "unknown": {"is": "ignored"}, "tools": None,
    }  # fmt: skip
    submitted = []
    submit, server.scheduler.submit = server.scheduler.submit, lambda *a: submitted.append(a[1]) or submit(*a)
    try:
        ask(
            client, QUESTION, top_p=0, presence_penalty=-2, frequency_penalty=2, logit_bias={"7": -100}, seed=3,
            response_format={"type": "text"}, user="me", metadata={}, extra_body=extra,
        )  # fmt: skip
    finally:
        server.scheduler.submit = submit
    [sampling] = submitted
    assert (sampling.temperature, sampling.top_k, sampling.min_p, sampling.seed) == (0, 0, 0.25, 3)
    assert 0 < sampling.top_p < 1e-20 and sampling.repetition_penalty == 1.5
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (-2, 2)
    assert sampling.logit_bias == ((7, -100.0),) and sampling.stop_token_ids == (4,)
    assert sampling.min_new_tokens == 2 and sampling.ignore_eos and sampling.max_new_tokens == 64


def test_log_probabilities(client):
    reply = ask(client, QUESTION, logprobs=True, top_logprobs=2, max_tokens=2)
    first, second = reply.choices[0].logprobs.content
    assert first.token + second.token == reply.choices[0].message.content
    assert bytes(first.bytes).decode() == first.token and first.logprob == -0.5
    assert [top.logprob for top in first.top_logprobs] == [-0.5, -9999.0]
    assert ask(client, QUESTION, logprobs=True, max_tokens=1).choices[0].logprobs.content[0].top_logprobs == []
    chunks = [c.choices[0] for c in ask(client, QUESTION, logprobs=True, top_logprobs=1, stream=True)]
    assert [len(c.logprobs.content) if c.logprobs else 0 for c in chunks] == [0] + [1] * 13


def test_messages_become_turns(server, client):
    system = {"role": "system", "content": "Be brief."}
    developer = {"role": "developer", "content": [{"type": "text", "text": "Be kind."}]}
    answer = {"role": "assistant", "content": "Red.", "name": "ignored"}
    ask(client, system, "What colour?", answer, developer, "Sure?", "Really?")
    request = server.engine.prepared[-1]
    assert request.turns == ("What colour?", "Red.", "Sure?\nReally?")
    assert request.system == "Be brief.\n\nBe kind." and not request.trust_special_tokens


def test_images(server, client):
    parts = [image_part(), {"type": "text", "text": QUESTION}, {"type": "image_url", "image_url": data_url((9, 5))}]
    reply = ask(client, {"role": "user", "content": parts})
    request = server.engine.prepared[-1]
    assert request.turns == ((IMAGE_PART, QUESTION, "\n", IMAGE_PART),)
    assert [part is IMAGE_PART for part in request.turns[0]] == [True, False, False, True]
    assert len(request.images) == 2 and reply.usage.prompt_tokens == 2 * IMAGE_POSITIONS + 5
    assert reply.usage.prompt_tokens_details.image_tokens == 2 * IMAGE_POSITIONS
    with Image.open(io.BytesIO(request.images[1])) as image:
        assert image.size == (9, 5)


def test_where_images_are(server, client):
    text = lambda value: {"type": "text", "text": value}  # noqa: E731
    for parts, turn in [
        ([image_part()], (IMAGE_PART,)),
        ([text("a"), image_part()], (IMAGE_PART, "a")),
        ([text("a"), text("b"), image_part(), image_part()], (IMAGE_PART, IMAGE_PART, "a", "\n", "b")),
        ([text("a"), image_part(), text("b")], ("a", "\n", IMAGE_PART, "\n", "b")),
        ([image_part(), text("a"), text("b")], (IMAGE_PART, "a", "\n", "b")),
        ([image_part(), text("<image>")], (IMAGE_PART, "<image>")),
        ([text("<image>"), text("a")], "<image>\na"),
    ]:
        ask(client, {"role": "user", "content": parts})
        [found] = server.engine.prepared[-1].turns
        assert found == turn and sum(part is IMAGE_PART for part in found) == parts.count(image_part())


def test_completions(client):
    fields = dict(model="alias", prompt=QUESTION, temperature=0)
    reply = client.completions.create(**fields, logprobs=1)
    assert reply.object == "text_completion" and reply.model == "alias"
    assert reply.choices[0].text == answer_of((QUESTION,)) and reply.choices[0].finish_reason == "stop"
    logprobs = reply.choices[0].logprobs
    assert len(logprobs.tokens) == 13 and logprobs.text_offset[:2] == [0, len(logprobs.tokens[0])]
    chunks = list(client.completions.create(**fields, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == answer_of((QUESTION,)) and len(chunks) == 13


def test_models(client):
    assert [model.id for model in client.models.list()] == ["scripted", "alias"]
    assert client.models.retrieve("alias").max_model_len == 64
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")
