"""Many answers at once: they join and leave, share prefixes, and are those of a prompt alone."""

import dataclasses

import jax
import numpy as np
import pytest
from PIL import Image

from helpers import GOLDEN, QUESTION, golden_engine, load_golden, one_device
from infer import compiled
from infer.engine import Answer, Engine
from infer.prompt import Request
from infer.sampling import Sampling
from llava_jax.console import InputError
from llava_jax.data.buckets import MIN_CONTEXT, Buckets
from llava_jax.data.templates import Template
from llava_jax.sharding.mesh import make_mesh
from llava_jax.sharding.partition import Partition

NEW = 12
SMALL = Buckets(chunks=(16, 32))  # so that prompts have several chunks


def new_engine(name="v1.6-mistral", mesh=None, **options) -> Engine:
    found, params = load_golden(name)
    mesh = mesh or one_device()
    if mesh.size > 1:
        params = jax.device_put(params, Partition(found.config, mesh).shardings(params))
    return Engine(params, found.config, found.tokenizer, mesh, **{"buckets": SMALL} | options)


def image_file(i: int):
    return next((GOLDEN / "images").glob(f"{i}_*"))


def ask_alone(engine: Engine, request: Request, **sampling) -> Answer:
    """Answer a question with nothing in the cache."""
    if engine._scheduler:
        engine._scheduler.forget()
    return engine.ask(request.turns, request.images, **sampling)


REQUESTS = [
    Request((QUESTION,), (image_file(0),)),
    Request(("Just text, no picture at all.",)),
    Request(("First <image> then <image> here.",), (image_file(3), image_file(4))),
    Request(("Hi", "Hello.", "And now?"), (image_file(6),)),
    Request(("A",)),
    Request((QUESTION,), (image_file(0),)),
    Request((QUESTION, "Yes.", "Where?"), (image_file(0),)),
    Request(("hello " * 70,), (image_file(5),)),
]


@pytest.fixture(scope="module")
def alone():
    """The greedy answers to `REQUESTS`, each from an empty cache."""
    engine = new_engine()
    return [ask_alone(engine, request, max_new_tokens=NEW).token_ids for request in REQUESTS]


# ---------------------------------------------------------------- joining and leaving


@pytest.mark.parametrize("mesh", [{}, {"fsdp": 2, "tensor": 2}], ids=str)
def test_answers_do_not_depend_on_what_else_runs(mesh, alone):
    """Requests join at random moments, and more of them than slots."""
    mesh = make_mesh(mesh, jax.devices()[: 4 if mesh else 1])
    engine, random = new_engine(mesh=mesh), np.random.default_rng(0)
    scheduler = engine.scheduler(4, 512)
    generations = []
    for i in [int(i) for i in random.permutation(np.repeat(np.arange(len(REQUESTS)), 3))]:
        prompt = engine.prepare(REQUESTS[i])
        generations.append((i, scheduler.submit(prompt, Sampling(max_new_tokens=NEW))))
        for _ in range(int(random.integers(3))):
            scheduler.step()
    scheduler.run([generation for _, generation in generations])
    for i, generation in generations:
        assert [token.id for token in generation.tokens] == alone[i], i
    assert scheduler.idle
    assert scheduler.statistics.cached_tokens > 0


def test_a_sampled_answer_depends_on_its_seed_alone():
    engine = new_engine("v1.5-llama")
    hot = [Sampling(temperature=1.0, seed=i, max_new_tokens=NEW) for i in range(4)]
    request = REQUESTS[0]
    one = [ask_alone(engine, request, **dataclasses.asdict(sampling)).token_ids for sampling in hot]
    scheduler = engine.scheduler(3, 512)
    prompt = engine.prepare(request)
    others = [scheduler.submit(engine.prepare(other), Sampling(max_new_tokens=NEW)) for other in REQUESTS[1:4]]
    generations = [scheduler.submit(prompt, sampling) for sampling in hot]
    scheduler.run([*others, *generations])
    assert [[token.id for token in generation.tokens] for generation in generations] == one
    assert len({tuple(ids) for ids in one}) == 4


def test_every_answer_has_its_own_controls():
    engine = new_engine("v1.5-llama")
    scheduler = engine.scheduler(4, 512)
    settings = [
        Sampling(max_new_tokens=NEW),
        Sampling(max_new_tokens=NEW, repetition_penalty=1.5, top_logprobs=3),
        Sampling(max_new_tokens=NEW, logit_bias=((5, 100.0),)),
        Sampling(max_new_tokens=NEW, temperature=2.0, top_k=7, seed=3, frequency_penalty=1.0),
        Sampling(max_new_tokens=3, stop=("a", "e")),
    ]
    together = [scheduler.submit(engine.prepare(REQUESTS[0]), sampling) for sampling in settings]
    scheduler.run(together)
    for sampling, generation in zip(settings, together, strict=True):
        one = ask_alone(engine, REQUESTS[0], **dataclasses.asdict(sampling))
        assert [token.id for token in generation.tokens] == one.token_ids
        assert (generation.text, generation.stopped_by) == (one.text, one.stopped_by)
    assert {token.id for token in together[2].tokens} == {5}


@pytest.mark.parametrize("streamed", [False, True])
def test_stop_strings_do_not_end_an_answer_that_is_too_short(streamed):
    engine = new_engine("v1.5-llama")
    options = dict(images=image_file(0), max_new_tokens=NEW, ignore_eos=True)
    whole = engine.ask(QUESTION, **options)
    stop = engine.tokenizer.decode(whole.token_ids[:1]).strip()[0]
    assert engine.ask(QUESTION, **options, stop=stop).text == ""
    options |= dict(stop=stop, min_new_tokens=NEW)
    *pieces, answer = engine.stream(QUESTION, **options) if streamed else [engine.ask(QUESTION, **options)]
    assert (answer.token_ids, answer.text, answer.stopped_by) == (whole.token_ids, whole.text, "length")
    assert not streamed or "".join(pieces) == whole.text


def test_cancelling_frees_the_slot():
    engine = new_engine("v1.5-llama")
    scheduler = engine.scheduler(1, 512)
    updates = []
    first = scheduler.submit(engine.prepare(REQUESTS[0]), Sampling(max_new_tokens=400, ignore_eos=True), updates.append)
    second = scheduler.submit(engine.prepare(REQUESTS[1]), Sampling(max_new_tokens=NEW))
    third = scheduler.submit(engine.prepare(REQUESTS[1]), Sampling(max_new_tokens=NEW))
    while not first.tokens:
        scheduler.step()
    first.cancel()
    third.cancel()  # while it waits
    scheduler.run([second, third])
    assert (first.stopped_by, third.stopped_by) == ("cancelled", "cancelled")
    assert updates[-1].done
    assert second.stopped_by in ("end", "length")
    assert [t.id for t in second.tokens] == ask_alone(engine, REQUESTS[1], max_new_tokens=NEW).token_ids
    assert scheduler.idle


def test_an_unreadable_image_fails_its_own_request(tmp_path):
    engine = new_engine("v1.5-llama")
    path = tmp_path / "image.png"
    path.write_bytes(image_file(0).read_bytes())
    scheduler = engine.scheduler(2, 512)
    prompt = engine.prepare(Request((QUESTION,), (path,)))
    path.unlink()
    bad = scheduler.submit(prompt, Sampling())
    good = scheduler.submit(engine.prepare(REQUESTS[1]), Sampling(max_new_tokens=NEW))
    scheduler.run([bad, good])
    assert isinstance(bad.error, InputError)
    assert (bad.stopped_by, bad.tokens) == ("error", [])
    assert good.tokens


def test_a_prompt_that_no_slot_has_room_for_is_refused():
    engine = new_engine("v1.5-llama")
    scheduler = engine.scheduler(1, 32)
    with pytest.raises(InputError, match="at most 31 fit a slot's context of 32"):
        scheduler.submit(engine.prepare(REQUESTS[0]), Sampling())


def test_the_smallest_context_answers():
    engine = new_engine("v1.5-llama")
    scheduler = engine.scheduler(1, MIN_CONTEXT)
    generation = scheduler.submit(engine.prepare(Request(("A",)), template=Template("plain")), Sampling())
    scheduler.run([generation])
    assert len(generation.tokens) == MIN_CONTEXT - generation.prompt.length or generation.stopped_by == "end"
    with pytest.raises(InputError, match="--context 15"):
        engine.scheduler(1, MIN_CONTEXT - 1)


def test_an_error_of_the_device_does_not_outlive_its_question(monkeypatch):
    engine = new_engine("v1.5-llama")
    expected = engine.ask(QUESTION, image_file(0), max_new_tokens=NEW).token_ids
    prefill = compiled.prefill

    def fail(params, slots, *args, **options):
        prefill(params, slots, *args, **options)  # the slots are donated
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(compiled, "prefill", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            engine.ask("And now?", max_new_tokens=NEW)
    answer = engine.ask(QUESTION, image_file(0), max_new_tokens=NEW)
    assert (answer.token_ids, answer.cached_tokens) == (expected, 0)


def test_keys_of_a_slot_are_those_of_its_prompt_and_answer():
    engine = new_engine("v1.5-llama")
    answer = engine.ask(QUESTION, image_file(0), max_new_tokens=40, ignore_eos=True)  # several dispatches
    prompt = engine.prepare(REQUESTS[0])
    expected = [*prompt.keys, *answer.token_ids[:-1]]  # the last one is not in the cache
    assert engine._scheduler.table.slots[0].keys.tolist() == expected


def test_an_array_that_a_device_may_still_read_is_not_changed(monkeypatch):
    """On a CPU, an array on the device may be the host's own memory."""
    engine = new_engine("v1.5-llama")
    scheduler, given = engine.scheduler(2, 512), []
    put = scheduler._put
    monkeypatch.setattr(scheduler, "_put", lambda rows: given.append((rows, rows.copy())) or put(rows))
    first = scheduler.submit(engine.prepare(REQUESTS[4]), Sampling(max_new_tokens=400, ignore_eos=True))
    second = scheduler.submit(engine.prepare(REQUESTS[1]), Sampling(max_new_tokens=40, ignore_eos=True))
    while not first.tokens:
        scheduler.step()
    first.cancel()
    scheduler.run([second])
    assert any(before.any() for _, before in given)  # the cancelled slot was stopped
    assert all((rows == before).all() for rows, before in given)


def test_one_stream_stopped_early_does_not_hold_the_engine():
    engine = new_engine("v1.5-llama")
    stream = engine.stream(QUESTION, image_file(0), max_new_tokens=200, ignore_eos=True)
    next(stream)
    stream.close()
    assert engine._scheduler.idle


def test_the_engine_answers_other_questions_between_those_of_generate(alone):
    engine = new_engine()
    unreadable = Request(("What is this?",), ("missing.png",))
    answers = []
    for i, answer in engine.generate([unreadable, REQUESTS[1], REQUESTS[4]], Sampling(max_new_tokens=NEW), rows=2):
        answers.append((i, answer))
        assert engine.ask(QUESTION, image_file(0), max_new_tokens=NEW).token_ids == alone[0]
    assert isinstance(answers[0][1], InputError)
    assert {i: answer.token_ids for i, answer in answers[1:]} == {1: alone[1], 2: alone[4]}


# ---------------------------------------------------------------- what is known is not computed again


@pytest.mark.parametrize("name", ["v1.5-llama", "v1.6-mistral"])
def test_the_next_turn_computes_only_what_is_new(name):
    engine = new_engine(name)
    turns, images, known = [QUESTION], [image_file(1)], 0
    for turn in range(4):
        answer = engine.ask(turns, images, max_new_tokens=NEW)
        assert answer.cached_tokens >= known
        known = answer.prompt_tokens - 2
        fresh = ask_alone(new_engine(name), Request(tuple(turns), tuple(images)), max_new_tokens=NEW)
        assert fresh.cached_tokens == 0
        assert answer.token_ids == fresh.token_ids
        turns += [answer.text or "...", f"<image> And {turn}?" if turn == 1 else f"And {turn}?"]
        if turn == 1:
            turns[0] = f"<image>\n{turns[0]}"
            images.append(image_file(2))


def test_another_image_of_the_same_size_shares_no_position():
    engine = new_engine()
    answers = []
    for seed in (0, 1):
        image = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 60, 3), dtype=np.uint8))
        answers.append(engine.ask(QUESTION, [image], max_new_tokens=NEW))
    before_image = answers[0].prompt_tokens - answers[0].image_tokens
    assert answers[1].cached_tokens < before_image
    assert engine.ask(QUESTION, [image.copy()], max_new_tokens=1).cached_tokens == answers[1].prompt_tokens - 1


def test_equal_prompts_at_once_are_computed_once():
    engine = new_engine()
    scheduler = engine.scheduler(4, 512)
    prompt = engine.prepare(REQUESTS[7])
    generations = [scheduler.submit(prompt, Sampling(max_new_tokens=NEW)) for _ in range(4)]
    scheduler.run(generations)
    assert sorted(generation.cached_tokens for generation in generations) == [0, *[prompt.length - 1] * 3]
    assert len({tuple(token.id for token in generation.tokens) for generation in generations}) == 1


def test_features_are_kept_up_to_a_bound():
    engine = new_engine("v1.5-llama")
    for i in (0, 1, 2, 0):
        engine.ask(f"{i}: {QUESTION}", image_file(i), max_new_tokens=1)
        engine.ask("something else " * 20, max_new_tokens=1)  # takes the slot
    statistics = engine._scheduler.statistics
    assert (statistics.image_queries, statistics.image_hits) == (4, 1)
    one = next(iter(engine.features._tables.values())).nbytes
    engine.features.max_bytes = 2 * one
    engine.ask(QUESTION, image_file(4), max_new_tokens=1)
    assert len(engine.features._tables) == 2
    assert engine.features._bytes == 2 * one


def test_growing_keeps_what_slots_hold():
    engine = new_engine("v1.5-llama")
    first = engine.ask(QUESTION, image_file(0), max_new_tokens=4)
    context = engine._scheduler.context
    second = engine.ask(QUESTION, image_file(0), max_new_tokens=300)
    assert engine._scheduler.context > context
    assert second.cached_tokens == first.prompt_tokens - 1
    assert second.token_ids[:4] == first.token_ids


@pytest.mark.parametrize("options", [dict(int8_cache=True), dict(buckets=Buckets(chunks=(8,)))], ids=str)
def test_other_chunks_and_caches(options, alone):
    engine = new_engine(**options)
    answers = dict(engine.generate(REQUESTS, Sampling(max_new_tokens=NEW), rows=3))
    same = [answers[i].token_ids == alone[i] for i in range(len(REQUESTS))]
    assert np.mean(same) >= (0.5 if "int8_cache" in options else 1)


# ---------------------------------------------------------------- log probabilities


def test_log_probabilities_are_the_models():
    engine = new_engine("v1.5-llama")
    answer = engine.ask(QUESTION, image_file(0), max_new_tokens=NEW, top_logprobs=5, temperature=1.5, seed=2)
    turns = (QUESTION, None)
    logits, _ = engine.logits(turns, [image_file(0)])
    expected = jax.nn.log_softmax(logits[-1])
    first = answer.logprobs[0]
    assert first.logprob == pytest.approx(float(expected[first.id]), abs=1e-4)
    np.testing.assert_allclose([p for _, p in first.top], np.sort(expected)[::-1][:5], atol=1e-4)
    assert [i for i, _ in first.top] == np.argsort(-expected)[:5].tolist()
    assert len(answer.logprobs) == len(answer.token_ids)
    assert "".join(token.text for token in answer.logprobs) == answer.text


@pytest.mark.parametrize("name", ["v1.5-llama", "v1.6-mistral"])
def test_scores_of_candidates_are_those_of_a_full_pass(name):
    engine = new_engine(name)
    candidates = ["Yes", "No, there is not.", "a photo " * 20]
    for candidate, score in zip(candidates, engine.score(QUESTION, candidates, [image_file(0)]), strict=True):
        assert score.text == candidate
        logits, ids = engine.logits((QUESTION, candidate), [image_file(0)])
        n = len(score.token_ids)
        start = next(i for i in range(len(ids), 0, -1) if ids[i : i + n].tolist() == score.token_ids)
        expected = jax.nn.log_softmax(logits)[np.arange(start - 1, start + n - 1), score.token_ids]
        np.testing.assert_allclose(score.logprobs, expected, atol=2e-4)
        assert score.logprob == pytest.approx(float(expected.sum()), abs=1e-2)
        assert engine.tokenizer.decode(score.token_ids).strip() == candidate.strip()
    with pytest.raises(InputError, match="candidate answer is empty"):
        engine.score(QUESTION, [" "])


@pytest.mark.parametrize(
    "candidates, problem", [("yes", "a list of strings"), ([1], "1; must be"), (["a <image>"], "contains <image>")]
)
def test_what_is_no_candidate(candidates, problem):
    with pytest.raises(InputError, match=problem):
        golden_engine("v1.5-llama").score(QUESTION, candidates, [image_file(0)])
