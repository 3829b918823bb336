"""The model for lmms-eval, with a tiny checkpoint. lmms-eval is not installed for tests, since it pins its own
releases of many packages: what the model needs of it is declared here, and `benchmarks/lmms_eval.py` runs the harness.
"""

import dataclasses
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from helpers import GOLDEN, one_device
from infer.lmms_eval_requests import read_messages, read_settings
from infer.prompt import Request
from infer.sampling import Sampling
from llava_jax.console import MIN_POSITIVE, InputError
from llava_jax.data.templates import IMAGE_PART
from train.datasets.shapes.scenes import draw, make_scene

CHECKPOINT = str(GOLDEN / "checkpoints" / "v1.5-llama")
SETTINGS = {"max_new_tokens": 8, "temperature": 0, "do_sample": False, "until": ["\n\n"]}
QUESTIONS = ["How many circles are there?", "What colour is the background?", "Is there a red square?"]


class lmms:
    """The members of lmms_eval/api/model.py `lmms` that a model has to set."""

    def __init__(self):
        self.task_dict = {}


@dataclasses.dataclass
class TokenCounts:
    input_tokens: int | None = None
    output_tokens: int | None = None


@dataclasses.dataclass
class GenerationResult:
    text: str
    token_counts: TokenCounts | None = None


@dataclasses.dataclass
class ModelManifest:
    model_id: str
    simple_class_path: str
    chat_class_path: str


@pytest.fixture(scope="module")
def throughput():
    return []


@pytest.fixture(scope="module")
def lmms_eval_model(throughput):
    modules = {
        "api.model": dict(lmms=lmms),
        "api.instance": dict(GenerationResult=GenerationResult, TokenCounts=TokenCounts),
        "models.registry_v2": dict(ModelManifest=ModelManifest),
        "models.model_utils.gen_metrics": dict(log_metrics=lambda **metrics: throughput.append(metrics)),
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, members in modules.items():
            parts = f"lmms_eval.{name}".split(".")
            for i in range(1, len(parts)):
                patch.setitem(sys.modules, ".".join(parts[:i]), ModuleType(parts[i - 1]))
            module = ModuleType(parts[-1])
            vars(module).update(members)
            patch.setitem(sys.modules, ".".join(parts), module)
        patch.delitem(sys.modules, "infer.lmms_eval_model", raising=False)
        import infer.lmms_eval_model

        yield infer.lmms_eval_model
        del sys.modules["infer.lmms_eval_model"]


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(3)
    return [draw(make_scene(rng), rng).resize((60, 60)) for _ in range(4)]  # one size, and so one program


@pytest.fixture(scope="module")
def chat(lmms_eval_model):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("infer.engine.inference_mesh", lambda config, devices: one_device())
        return lmms_eval_model.LlavaJax(CHECKPOINT, batch_size="4")


@pytest.fixture(scope="module")
def simple(lmms_eval_model, chat):
    model = lmms_eval_model.LlavaJaxSimple.__new__(lmms_eval_model.LlavaJaxSimple)
    vars(model).update(vars(chat))
    return model


def user(*parts):
    content = [dict(type="text", text=p) if isinstance(p, str) else dict(type="image", url=p) for p in parts]
    return {"role": "user", "content": content}


def ask(model, turns, images=(), max_new_tokens=8):
    """The engine's own answer, in as many slots as the model has, so that nothing else is compiled."""
    request = Request((turns,) if isinstance(turns, str) else turns, tuple(images))
    ((_, answer),) = model.engine.generate([request], Sampling(max_new_tokens=max_new_tokens), rows=model.rows)
    return answer


def chat_requests(model, documents, settings=SETTINGS, doc_to_messages=lambda document: document):
    """A request for each document, as a chat task makes it; a document is its messages."""
    model.task_dict = {"shapes": {"test": documents}}
    all_settings = settings if isinstance(settings, list) else [settings] * len(documents)
    return [
        SimpleNamespace(args=("", doc_to_messages, one, i, "shapes", "test"), task_name="shapes", doc_id=i)
        for i, one in enumerate(all_settings)
    ]


def simple_requests(model, documents, second=None):
    """As a simple task makes them; a document is its context and its images."""
    model.task_dict = {"shapes": {"test": documents}}
    visual = lambda document: document[1]  # noqa: E731
    return [
        SimpleNamespace(args=(context, second or SETTINGS, visual, i, "shapes", "test"))
        for i, (context, _) in enumerate(documents)
    ]


def test_manifest_names_both_classes(lmms_eval_model):
    found = lmms_eval_model.manifest()
    assert found.model_id == "llava_jax"
    for path, is_simple in ((found.chat_class_path, False), (found.simple_class_path, True)):
        module, _, name = path.rpartition(".")
        model = getattr(sys.modules[module], name)
        assert issubclass(model, lmms) and model.is_simple is is_simple


def test_answers_are_the_engines_in_the_order_of_the_requests(chat, images, throughput):
    documents = [[user(image, question)] for image, question in zip(images, 2 * QUESTIONS, strict=False)]
    documents += [[user(images[0], images[1], "Do both images have circles?")], [user("How many sides has a square?")]]
    settings = [SETTINGS, SETTINGS | {"max_new_tokens": 2}, SETTINGS, SETTINGS, SETTINGS, SETTINGS]
    throughput.clear()
    found = chat.generate_until(chat_requests(chat, documents, settings))
    total = 0
    for (message,), one, result in zip(documents, settings, found, strict=True):
        *seen, text = message["content"]
        answer = ask(chat, text["text"], [part["url"] for part in seen], one["max_new_tokens"])
        assert result.text == answer.text
        assert result.token_counts == TokenCounts(answer.prompt_tokens, len(answer.token_ids))
        total += len(answer.token_ids)
    assert found[0].text and len({result.text for result in found}) > 2
    assert throughput[0]["total_gen_tokens"] == total


def test_turns_of_a_conversation(chat, images):
    answer = {"role": "assistant", "content": [dict(type="text", text="Yes.")]}
    document = [user(images[0], "Is there a circle?"), answer, user("What colour is it?")]
    (found,) = chat.generate_until(chat_requests(chat, [document]))
    turns = ("Is there a circle?", "Yes.", "What colour is it?")
    assert found.text == ask(chat, turns, images[:1]).text


def test_repeated_questions_are_sampled_anew(chat, images):
    settings = SETTINGS | {"temperature": 5.0, "do_sample": True}
    requests = chat_requests(chat, [[user(images[0], QUESTIONS[0])]] * 4, settings)
    first, again = (chat.generate_until(requests) for _ in range(2))
    assert len({result.text for result in first}) > 1
    assert first == again


def test_documents_are_read_when_their_turn_comes(chat, images):
    """A benchmark's images do not fit memory all at once."""
    taken = []

    def read(i):
        taken.append(i)
        return read_messages([user(images[0], QUESTIONS[i % 3])], "")

    answers = chat.engine.generate(map(read, range(40)), Sampling(max_new_tokens=4), rows=4)
    next(answers)
    assert len(taken) <= 20
    assert len(list(answers)) == 39


def test_rounds_end_when_the_task_ends_them(chat, images):
    """The second question depends on the first answer, and is not asked about the second document."""
    asked = []

    def doc_to_messages(document, *, round_idx=None, previous_output=None, previous_round_info=None):
        if round_idx is None:
            return [user(images[document], QUESTIONS[0])]
        assert len(previous_output) == round_idx
        asked.append((document, round_idx, previous_output[-1], previous_round_info))
        ended = round_idx > 2 - document
        messages = [user(images[document], f"Is it {previous_output[-1]}?")]
        return (None if ended else messages), ended, previous_output, f"after {round_idx}"

    documents = [0, 1, 2, 2, 1]  # more than are answered at once
    found = chat.generate_until_multi_round(chat_requests(chat, documents, doc_to_messages=doc_to_messages))
    assert [len(texts) for texts in found] == [3, 2, 1, 1, 2]
    for document, texts in zip(documents, found, strict=True):
        question = QUESTIONS[0]
        for text in texts:
            assert text == ask(chat, question, [images[document]]).text
            question = f"Is it {text}?"
    assert [(n, memory) for document, n, _, memory in asked if document == 0] == [
        (1, None), (2, "after 1"), (3, "after 2"),
    ]  # fmt: skip


def test_a_question_that_fails_is_named_and_the_others_are_answered(chat, images, tmp_path, capsys):
    documents = [[user(images[0], QUESTIONS[0])], [user(QUESTIONS[1])], [user(images[1], QUESTIONS[0])]]
    documents[1][0]["content"].insert(0, dict(type="image", url=str(tmp_path / "lost.png")))
    found = chat.generate_until(chat_requests(chat, documents))
    assert [bool(result.text) for result in found] == [True, False, True]
    assert found[1].token_counts == TokenCounts(0, 0)
    logged = capsys.readouterr().err
    assert "shapes document 1: " in logged and "lost.png" in logged
    assert "1 of 3 questions could not be asked, and count as wrong" in logged


# ---------------------------------------------------------------- simple tasks


def test_simple_tasks_place_images_at_their_marks(simple, images):
    documents = [(f"{QUESTIONS[0]}", [images[0]]), ("Circles in <image> or <image>?", images[:2]), ("Hello", None)]
    found = simple.generate_until(simple_requests(simple, documents))
    for (context, seen), result in zip(documents, found, strict=True):
        assert result.text == ask(simple, context, seen or ()).text


def test_losses_are_per_token_and_least_for_the_greedy_answer(simple, images):
    greedy = ask(simple, QUESTIONS[0], images[:1], max_new_tokens=3).text
    choices = [" Purple and gold.", f" {greedy}", " Nothing"]
    simple.task_dict = {"shapes": {"test": [images[0]]}}
    requests = [
        SimpleNamespace(args=(QUESTIONS[0], choice, lambda image: [image], 0, "shapes", "test")) for choice in choices
    ]
    requests.append(SimpleNamespace(args=(QUESTIONS[0], lambda _: choices[0], *requests[0].args[2:])))
    found = [one.text for one in simple.loglikelihood(requests)]
    assert [is_greedy for _, is_greedy in found] == [False, True, False, False]
    assert np.argmin([loss for loss, _ in found]) == 1
    assert found[3] == found[0]
    scores = simple.engine.score(QUESTIONS[0], [choice.strip() for choice in choices], [images[0]])
    assert [loss for loss, _ in found[:3]] == [-np.mean(score.logprobs) for score in scores]


def test_what_has_no_loss_ends_the_evaluation(simple, tmp_path):
    simple.task_dict = {"shapes": {"test": [str(tmp_path / "lost.png")]}}
    request = SimpleNamespace(args=("Why?", "No", lambda file: [file], 0, "shapes", "test"))
    with pytest.raises(InputError, match=r"shapes document 0: .*lost.png"):
        simple.loglikelihood([request])
    unconditional = SimpleNamespace(args=("", "No"), task_name="shapes", doc_id=5)
    with pytest.raises(InputError, match="shapes document 5: acc_mutual_info"):
        simple.loglikelihood([unconditional])
    with pytest.raises(InputError, match="shapes: several rounds need chat tasks"):
        simple.generate_until_multi_round([request])


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "arguments, problem",
    [
        (dict(batch_size="auto"), "--batch_size 'auto': must be a whole number"),
        (dict(batch_size=0), "--batch_size 0: must be"),
        (dict(device="cuda:0"), "--device: is not implemented by llava_jax; use JAX_PLATFORMS"),
        (dict(max_batch_size=8), "--max_batch_size: is not implemented by llava_jax; use --batch_size"),
        (dict(dtype="float16"), "dtype 'float16': must be bfloat16 or float32"),
        (dict(int8_cache="yes"), "int8_cache 'yes': must be true or false"),
        (dict(mesh='"data=1,rows=2"'), "mesh 'data=1,rows=2'"),
        (dict(template="none"), "none"),
    ],
)
def test_invalid_arguments(lmms_eval_model, arguments, problem):
    with pytest.raises(InputError, match=problem):
        lmms_eval_model.LlavaJax(CHECKPOINT, **arguments)


def test_a_launcher_of_several_processes(lmms_eval_model, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="without a launcher"):
        lmms_eval_model.LlavaJax(CHECKPOINT)


def test_media_and_settings_that_are_not_implemented_are_named(chat, simple, images):
    for part, kind in ((dict(type="video", url="a.mp4"), "video"), (dict(type="audio", url="a.wav"), "audio")):
        with pytest.raises(InputError, match=f"shapes document 1: has {kind}"):
            chat.generate_until(chat_requests(chat, [[user("Hello")], [{"role": "user", "content": [part]}]]))
    for visual, kind in (("a.mp4", "video"), (dict(array=np.zeros(3), sampling_rate=1), "audio")):
        with pytest.raises(InputError, match=f"shapes document 0: has {kind}"):
            simple.generate_until(simple_requests(simple, [("Hello", [visual])]))
    with pytest.raises(InputError, match="shapes document 0: generation_kwargs: num_beams 5 is not implemented"):
        chat.generate_until(chat_requests(chat, [[user("Hello")]], SETTINGS | {"num_beams": 5}))
    assert ask(chat, "Hello", max_new_tokens=1)  # its slots are free again


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({}, dict(max_new_tokens=1024)),
        ({"until": ["\n\n"], "do_sample": False}, dict(max_new_tokens=1024)),
        ({"until": ["ASSISTANT:", ""], "max_new_tokens": 5}, dict(max_new_tokens=5, stop=("ASSISTANT:",))),
        ({"until": "\n", "stop_sequences": ["Q:"]}, dict(max_new_tokens=1024, stop=("\n", "Q:"))),
        ({"temperature": 0.2, "top_p": 0}, dict(max_new_tokens=1024, temperature=0.2, top_p=MIN_POSITIVE)),
        ({"temperature": None, "top_p": None, "num_beams": 1}, dict(max_new_tokens=1024)),
        ({"top_k": 1, "seed": 3, "repetition_penalty": 1.2, "use_cache": True},
         dict(max_new_tokens=1024, top_k=1, seed=3, repetition_penalty=1.2)),
    ],
)  # fmt: skip
def test_settings(settings, expected):
    assert read_settings(settings) == (Sampling(**expected), [])


@pytest.mark.parametrize(
    "settings, warning",
    [
        ({"image_aspect_ratio": "original"}, "image_aspect_ratio is ignored"),
        ({"temperature": 0.2, "do_sample": False}, "answers are sampled, with temperature 0.2"),
        ({"do_sample": True}, "decoding is greedy"),
    ],
)
def test_settings_that_change_nothing_are_reported(settings, warning):
    (found,) = read_settings(settings)[1]
    assert warning in found


@pytest.mark.parametrize(
    "settings, problem",
    [
        ({"num_beams": 3}, "num_beams 3 is not implemented"),
        ({"thinking": "hard"}, "thinking 'hard' is not implemented"),
        ({"skip_special_tokens": False}, "skip_special_tokens False is not implemented"),
        ({"max_new_tokens": 0}, "--max-new-tokens 0: must be"),
        ({"temperature": "warm"}, "--temperature 'warm': must be"),
    ],
)
def test_settings_that_are_refused(settings, problem):
    with pytest.raises(InputError, match=problem):
        read_settings(settings)


# ---------------------------------------------------------------- messages


def test_messages_become_turns():
    image = Image.new("RGB", (4, 4))
    system = {"role": "system", "content": [dict(type="text", text="Be brief.")]}
    found = read_messages([system, user("Look:", image, "What?"), user("<image> is text")], "", 7)
    assert found.turns == (("Look:", "\n", IMAGE_PART, "\n", "What?", "\n", "<image> is text"),)
    assert (found.images, found.system, found.number) == ((image,), "Be brief.", 7)
    assert not found.trust_special_tokens
    assert read_messages([user("After:", image)], "").turns == ((IMAGE_PART, "After:"),)


@pytest.mark.parametrize(
    "roles, problem", [([], "is empty"), (["user", "assistant"], "ends with an answer"), (["assistant"], "begins with")]
)
def test_messages_that_are_no_question(roles, problem):
    with pytest.raises(InputError, match=f"pope document 3: the conversation {problem}"):
        read_messages([{"role": role, "content": "Hello"} for role in roles], "pope document 3")
