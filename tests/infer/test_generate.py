"""The engine: golden greedy tokens, batches, the cache, sampling, stopping, streaming, and what compiles when."""

import dataclasses
import gc
import weakref

import jax
import numpy as np
import pytest
from PIL import Image

from convert.to_orbax import to_orbax
from helpers import CHECKPOINTS, GOLDEN, QUESTION, golden_engine, golden_json, load_golden, one_device
from infer import features
from infer.engine import Answer, Engine
from infer.prompt import Request
from infer.sampling import Sampling
from infer.warm_up import warm_up
from llava_jax.aot import programs
from llava_jax.aot.programs import compilations, memory_maps
from llava_jax.console import InputError
from llava_jax.data import images, urls
from llava_jax.data.buckets import Buckets
from llava_jax.data.splice import IMAGE, Row, splice
from llava_jax.data.tokenizer import load_tokenizer
from llava_jax.models import llava

NEW = 24


def image_file(i: int):
    return next((GOLDEN / "images").glob(f"{i}_*"))


def random_image(random, low=8, high=200) -> Image.Image:
    w, h = (int(x) for x in random.integers(low, high, 2))
    return Image.fromarray(random.integers(0, 256, (h, w, 3), dtype=np.uint8))


# ---------------------------------------------------------------- greedy, one by one and in batches


@pytest.mark.parametrize(("name", "how"), [*((name, "direct") for name in CHECKPOINTS), ("v1.6-mistral", "converted")])
def test_greedy_tokens_equal_the_reference(name, how, tmp_path):
    engine = golden_engine(name)
    if how == "converted":
        to_orbax(GOLDEN / "checkpoints" / name, tmp_path / "orbax")
        engine = Engine.load(tmp_path / "orbax", mesh=one_device())
    for case in golden_json(f"checkpoints/{name}/expected.greedy.json"):
        answer = engine.ask(QUESTION, GOLDEN / "images" / case["image"], max_new_tokens=NEW)
        assert answer.token_ids == case["output_ids"][1:]  # the reference's begin with a BOS
        assert answer.stopped_by == ("end" if len(answer.token_ids) < NEW else "length")
        assert answer.prompt_tokens == len(case["input_ids"]) - 1 + answer.image_tokens


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_mixed_batch_gives_what_each_row_gives_alone(name):
    engine = golden_engine(name)
    requests = [
        Request((QUESTION,), (image_file(0),)),
        Request(("Just text, no picture at all.",)),
        Request(("First <image> then <image> here.",), (image_file(3), image_file(4))),
        Request(("Hi", "Hello.", "And now?"), (image_file(6),)),
        Request(("A",)),
        *(Request((QUESTION + "!" * i,), (image_file(i),)) for i in range(7)),
    ]
    sampling = Sampling(max_new_tokens=NEW)
    alone = [engine.ask(r.turns, r.images, max_new_tokens=NEW).token_ids for r in requests]
    for rows in (3, 8) if name == "v1.6-mistral" else (8,):
        together = dict(engine.generate(requests, sampling, rows=rows))
        assert [together[i].token_ids for i in range(len(requests))] == alone


def test_one_bad_request_does_not_stop_the_others(tmp_path):
    engine = golden_engine("v1.6-mistral")
    (tmp_path / "cut.png").write_bytes(image_file(0).read_bytes()[:-300])
    requests = [
        Request((QUESTION,), (image_file(0),), name="q 1"),
        Request((QUESTION,), ("nowhere.png",), name="q 2"),
        Request((QUESTION,), (tmp_path / "cut.png",), name="q 3"),
        Request(("x <image> <image>",), (image_file(0),), name="q 4"),
    ]
    answers = dict(engine.generate(requests, Sampling(max_new_tokens=2), rows=4))
    assert isinstance(answers[0], Answer)
    assert [str(answers[i]).split(":")[0] for i in (1, 2, 3)] == ["q 2", "q 3", "q 4"]


# ---------------------------------------------------------------- the cache


def test_sliding_window_in_generation():
    """The cache, behind its gap of padding, sees as far back as a full pass does."""
    found, params = load_golden("v1.6-mistral")
    config = found.config.replace(text=dataclasses.replace(found.config.text, sliding_window=20))
    engine = Engine(params, config, found.tokenizer, one_device())
    question = "hello " * 20
    answer = engine.ask(question, max_new_tokens=NEW).token_ids
    prompt = engine.logits((question, None))[1]
    batch = splice([Row(np.concatenate([prompt, answer[:-1]]).astype(np.int32))], config)
    assert np.asarray(llava.forward(params, config, batch))[0, len(prompt) - 1 :].argmax(-1).tolist() == answer
    assert golden_engine("v1.6-mistral").ask(question, max_new_tokens=NEW).token_ids != answer


# ---------------------------------------------------------------- sampling


def test_an_answer_depends_on_seed_and_question_not_on_its_batch():
    engine = golden_engine("v1.5-llama")
    requests = [Request((QUESTION,), (image_file(i % 7),), number=i) for i in range(9)]
    hot = Sampling(temperature=1.0, seed=5, max_new_tokens=NEW)
    together = dict(engine.generate(requests, hot, rows=8))
    one_by_one = dict(engine.generate(requests, hot, rows=1))
    assert all(together[i].token_ids == one_by_one[i].token_ids for i in range(9))
    assert together[0].token_ids != together[7].token_ids  # the same question with another number
    other = dict(engine.generate(requests, dataclasses.replace(hot, seed=6), rows=8))
    assert together[0].token_ids != other[0].token_ids


# ---------------------------------------------------------------- stopping and streaming


def test_stops_at_an_end_token_of_any_kind():
    found, params = load_golden("v1.5-llama")
    free = golden_engine("v1.5-llama").ask(QUESTION, image_file(0), max_new_tokens=NEW)
    text = dataclasses.replace(found.config.text, eos_ids=(2, free.token_ids[5]))
    engine = Engine(params, found.config.replace(text=text), found.tokenizer, one_device())
    answer = engine.ask(QUESTION, image_file(0), max_new_tokens=NEW)
    assert answer.token_ids == free.token_ids[:6]
    assert answer.stopped_by == "end"


def test_stops_at_the_templates_stop_string_even_across_tokens():
    found, params = load_golden("v1.5-llama")
    free = golden_engine("v1.5-llama").ask(QUESTION, image_file(0), max_new_tokens=NEW)
    at = free.text.index("ifr")
    engine = Engine(params, found.config, found.tokenizer, one_device())
    engine.template = dataclasses.replace(engine.template, stop=free.text[at - 2 : at + 2])
    answer = engine.ask(QUESTION, image_file(0), max_new_tokens=NEW)
    assert answer.text == free.text[: at - 2].strip()
    assert answer.stopped_by == "stop"
    assert free.token_ids[: len(answer.token_ids)] == answer.token_ids
    shown = [x for x in engine.stream(QUESTION, image_file(0), max_new_tokens=NEW) if isinstance(x, str)]
    assert "".join(shown) == answer.text


def test_a_rows_answer_ends_where_the_context_does():
    found, params = load_golden("v1.5-llama")
    text = dataclasses.replace(found.config.text, max_positions=110)
    engine = Engine(params, found.config.replace(text=text), found.tokenizer, one_device())
    answer = engine.ask(QUESTION, image_file(0), max_new_tokens=NEW)
    assert len(answer.token_ids) == 110 - answer.prompt_tokens
    assert answer.stopped_by == "length"


def test_prompt_longer_than_the_context_says_by_how_much():
    engine = golden_engine("v1.5-llama")
    with pytest.raises(
        InputError,
        match=r"prompt takes \d+ positions \(0 of them for images\); at most 511 fit the model.s context of 512, which",
    ):
        engine.ask("hello " * 600)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_streamed_pieces_make_the_answer(name):
    engine = golden_engine(name)
    for i in range(7):
        *pieces, answer = engine.stream(QUESTION, image_file(i), max_new_tokens=NEW)
        assert "".join(pieces) == answer.text == engine.ask(QUESTION, image_file(i), max_new_tokens=NEW).text


def test_streams_of_single_bytes_never_take_back_what_was_shown():
    """Byte tokens turn into other characters as more of them come: they wait until their run has ended."""
    engine = golden_engine("v1.5-llama")
    for seed in range(12):
        *pieces, answer = engine.stream("Hi", temperature=1.5, seed=seed, max_new_tokens=40)
        assert "".join(pieces) == answer.text


def test_questions_that_are_none():
    engine = golden_engine("v1.5-llama")
    for turns in ([], ["Hi", "Hello"], [None]):
        with pytest.raises(InputError, match="a prompt is a question"):
            engine.ask(turns)
    with pytest.raises(InputError, match="unpaired surrogate"):
        engine.ask("a\ud83d")
    with pytest.raises(InputError, match="not NoneType"):
        engine.ask("a", [None])


def test_a_tokenizer_of_another_model_is_noticed():
    found, params = load_golden("v1.5-llama")
    config = found.config.replace(use_im_start_end=True)  # whose tokens the model has no embeddings for
    engine = Engine(params, config, load_tokenizer(found.directory), one_device())
    with pytest.raises(InputError, match="id 1001, but the model has 1000 embeddings"):
        engine.ask("Hi", [image_file(0)])


def test_longer_answers_than_the_context_are_truncated_there():
    engine = golden_engine("v1.5-llama")
    answer = engine.ask("Hi", max_new_tokens=10**6, temperature=1.0, top_k=1)
    assert answer.prompt_tokens + len(answer.token_ids) <= engine.context


def test_an_image_is_fetched_once(monkeypatch):
    data, asked = (GOLDEN / "images" / "0_64x48.png").read_bytes(), []
    monkeypatch.setattr(urls, "_download", lambda url, guard=None: asked.append(url) or data)
    engine = golden_engine("v1.5-llama")
    answer = engine.ask("Hi", ["http://x/a.png"], max_new_tokens=4)
    assert asked == ["http://x/a.png"]
    assert answer.token_ids == engine.ask("Hi", [image_file(0)], max_new_tokens=4).token_ids


def test_each_thread_holds_one_image_at_a_time(monkeypatch):
    opened, alive, decode = [], [], images._decode

    def watched(*arguments, **options):
        alive.append(sum(there() is not None for there in opened))
        opened.append(weakref.ref(image := decode(*arguments, **options)))
        return image

    monkeypatch.setattr(images, "_decode", watched)
    monkeypatch.setattr(features, "READERS", 1)
    found, params = load_golden("v1.5-llama")
    engine = Engine(params, found.config, found.tokenizer, one_device())
    engine.ask("Hi", [image_file(0), image_file(1), image_file(2)], max_new_tokens=1)
    assert alive == [0, 0, 0]


# ---------------------------------------------------------------- logits


def test_logits_for_a_conversation():
    engine = golden_engine("v1.6-mistral")
    case = golden_json("checkpoints/v1.6-mistral/expected.greedy.json")[0]
    logits, ids = engine.logits((QUESTION, None), [GOLDEN / "images" / case["image"]])
    assert logits.shape == (len(ids), 1000)
    assert ids[ids != IMAGE].tolist() == [i for i in case["input_ids"] if i != IMAGE]
    assert logits[-1].argmax() == case["output_ids"][1]
    assert engine.logits(QUESTION, [image_file(0)])[0].shape == logits.shape
    longer, _ = engine.logits((QUESTION, "Yes.", "Where?", None), [image_file(0)])
    np.testing.assert_allclose(longer[: len(ids)], logits, atol=1e-5)


# ---------------------------------------------------------------- what compiles


def test_after_the_warm_up_nothing_compiles():
    """Short questions one after the other, in empty slots; then 100 images of random sizes, with questions of random
    lengths, several at a time."""
    found, params = load_golden("v1.6-mistral")
    engine = Engine(params, found.config, found.tokenizer, one_device(), buckets=Buckets(chunks=(32, 64)))
    scheduler = engine.scheduler(4, 384)
    assert warm_up(scheduler) > 10
    random, before, seen = np.random.default_rng(0), compilations(), set()
    for word in ("What", "Is", "How", "Why"):
        generation = scheduler.submit(engine.prepare(Request((f"{word}?",))), Sampling(max_new_tokens=4))
        scheduler.run([generation])
        assert generation.cached_tokens < generation.prompt.length <= 32
    generations = []
    for i in range(100):
        images = [random_image(random) for _ in range(int(random.integers(0, 3)))]
        question = "hello " * int(random.integers(1, 30))
        controls = [{}, dict(temperature=1.0, seed=i), dict(repetition_penalty=1.1, top_logprobs=2)][i % 3]
        prompt = engine.prepare(Request((question,), tuple(images)))
        seen.add(prompt.length // 64)
        generations.append(scheduler.submit(prompt, Sampling(max_new_tokens=int(random.integers(1, 40)), **controls)))
    scheduler.run(generations)
    assert not [generation.error for generation in generations if generation.error]
    assert compilations() == before
    assert len(seen) >= 4


def test_an_engine_asked_with_many_shapes_keeps_a_bounded_number_of_programs(monkeypatch):
    """A shape's programs hold several hundred memory maps; there is room for two of the four."""
    found, params = load_golden("v1.5-llama")
    sizes = (24, 32, 40, 48)
    jax.clear_caches()
    gc.collect()
    room = 1500
    limit = memory_maps() + room
    monkeypatch.setattr(programs, "map_limit", lambda: limit)
    answers, most = [], 0
    for n in sizes:
        engine = Engine(params, found.config, found.tokenizer, one_device(), buckets=Buckets(chunks=(n,)))
        answers.append(engine.ask("Hi", max_new_tokens=4))
        most = max(most, memory_maps())
    assert limit - room < most < limit
    assert len({tuple(answer.token_ids) for answer in answers}) == 1


def test_text_needs_no_vision_tower():
    found, params = load_golden("v1.5-llama")
    engine = Engine(params, found.config, found.tokenizer, one_device())
    answer = engine.ask("hello", max_new_tokens=2)
    assert answer.image_tokens == 0
    assert engine._scheduler.statistics.image_queries == 0
