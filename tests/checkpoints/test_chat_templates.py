"""The chat template that a checkpoint carries: recognized as a named one, or run as it is."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from convert.to_hf import to_hf
from convert.to_orbax import to_orbax
from helpers import GOLDEN, golden_tensors, turns, write_checkpoint
from infer import generate
from llava_jax import config as c
from llava_jax import sandbox
from llava_jax.checkpoints.chat_template import read_chat_template, with_chat_template
from llava_jax.checkpoints.checkpoint import open_any, open_checkpoint
from llava_jax.console import InputError
from llava_jax.data.prompts import encode, encode_prompt
from llava_jax.data.templates import TEMPLATES, choose_template, explain_template, get_template, render, to_jinja
from llava_jax.data.tokenizer import load_tokenizer
from train.samples import Samples

# llava-hf/llava-1.5-7b-hf's: no system message, `USER:` and `ASSISTANT:`.
USER_ASSISTANT = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{# Render all images first #}{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}{# Render all text next #}{% if message['role'] != 'assistant' %}{% for content in "
    "message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}{% endfor %}{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{% generation %}"
    "{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
# Mistral's own, of text only, as its tokenizer has it.
INST = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ ' ' + message['content'] + ' ' + eos_token}}{% else %}{{ raise_exception('Only user and assistant!') }}"
    "{% endif %}{% endfor %}"
)
FILES = ("chat_template.jinja", "chat_template.json", "tokenizer_config.json", "processor_config.json")


def write_template(directory, file: str, program, **settings):
    """A directory with a tokenizer and a chat template."""
    directory.mkdir(exist_ok=True)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(GOLDEN / "tokenizer" / name, directory)
    if file.endswith(".jinja"):
        (directory / file).write_text(program)
        return directory
    path = directory / file
    there = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(there | {"chat_template": program} | settings))
    return directory


def resolved(directory, config=None) -> c.LlavaConfig:
    return with_chat_template(config or c.tiny(template=None), directory)


@pytest.mark.parametrize("name", [name for name in TEMPLATES if not TEMPLATES[name].image_tag])
def test_each_named_template_is_recognized_by_what_it_writes(name, tmp_path):
    config = c.tiny(template=None)
    for i, file in enumerate(FILES):
        directory = write_template(tmp_path / str(i), file, to_jinja(get_template(name), config))
        found = resolved(directory)
        assert get_template(found.template) == get_template(name)  # or another name of the same
        assert found.template_from == file


@pytest.mark.parametrize("program", [USER_ASSISTANT, INST.replace(" [/INST]", "[/INST]")])
def test_any_other_is_run_as_transformers_runs_it(program, tmp_path):
    from transformers import AutoTokenizer

    config = resolved(write_template(tmp_path / "t", "chat_template.json", program))
    assert "{%" in config.template
    theirs = AutoTokenizer.from_pretrained(GOLDEN / "tokenizer")
    text = program != USER_ASSISTANT
    question = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    messages = [
        {"role": "user", "content": "<image>\nWhat is it?" if text else question},
        {"role": "assistant", "content": "A cat." if text else [{"type": "text", "text": "A cat."}]},
        {"role": "user", "content": "Why?" if text else [{"type": "text", "text": "Why?"}]},
    ]
    want = theirs.apply_chat_template(messages, chat_template=program, tokenize=False, add_generation_prompt=True)
    got, spans = render(get_template(config.template), ["<image>\nWhat is it?", "A cat.", "Why?", None])
    assert got == want
    assert spans == []


def test_a_system_message_and_marks_inside_the_text(tmp_path):
    config = resolved(write_template(tmp_path / "t", "chat_template.jinja", USER_ASSISTANT))
    template = get_template(config.template)
    text, _ = render(template, ["What changed from <image> to <image>?", None])
    assert text == "USER: What changed from <image> to <image>? ASSISTANT:"
    assert render(template, ["Hi", None], system="Be brief.")[0].startswith("Be brief. USER: Hi")
    with pytest.raises(InputError, match=r"cannot render this conversation .*Only user and assistant.*--template"):
        render(get_template(INST), ["Hi", None], system="Be brief.")


def test_a_template_of_text_only_that_writes_a_named_one(tmp_path):
    found = resolved(write_template(tmp_path / "t", "tokenizer_config.json", INST))
    assert found.template == "mistral_instruct"
    assert explain_template(found) == "mistral_instruct (from the checkpoint's tokenizer_config.json)"


def test_of_several_files_the_processors_counts(tmp_path):
    write_template(tmp_path / "t", "tokenizer_config.json", INST)
    write_template(tmp_path / "t", "chat_template.json", USER_ASSISTANT, bos_token="<s>")
    assert resolved(tmp_path / "t").template_from == "chat_template.json"
    (tmp_path / "t" / "chat_template.jinja").write_text(INST)
    assert resolved(tmp_path / "t").template_from == "chat_template.json"
    write_template(tmp_path / "t", "processor_config.json", to_jinja(get_template("chatml_direct"), c.tiny()))
    assert resolved(tmp_path / "t").template == "chatml_direct"


# Templates of text only, some of which write a list out instead of raising.
HEADER = "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
SEEING = TEMPLATES["llava_llama_3"].system.split("\n\n")[1]
TEXT_ONLY = {
    "mistral_instruct": INST,
    "chatml_direct": "<|im_start|>system\nAnswer the questions.<|im_end|>{% for m in messages %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "llava_llama_3": f"{{% for m in [{{'role': 'system', 'content': '{SEEING}'}}] + messages %}}{HEADER}"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
}


@pytest.mark.parametrize("name", TEXT_ONLY)
def test_a_template_of_text_only_is_given_text(name, tmp_path):
    directory = write_template(tmp_path / "t", "chat_template.json", TEXT_ONLY[name])
    assert resolved(directory).template == name
    tokens = "{%- set bos_token, eos_token = '', '</s>' -%}"
    template = get_template(tokens + TEXT_ONLY[name])
    for said in (["Hi", None], ["Look: <image> there", None], ["<image>\nHi", "Yes.", "Why?", None]):
        assert render(template, said) == (render(get_template(name), said)[0], [])


def test_bos_is_there_once_whoever_writes_it(tmp_path):
    tokenizer = load_tokenizer(GOLDEN / "tokenizer")
    for bos in ("{{ bos_token }}", "<s>", ""):
        directory = write_template(tmp_path / f"{len(bos)}", "chat_template.jinja", bos + USER_ASSISTANT)
        ids = encode_prompt(get_template(resolved(directory).template), ["Hi", None], tokenizer)
        assert ids.tolist() == encode("USER: Hi ASSISTANT:", tokenizer)[0].tolist()


def test_a_system_message_is_never_dropped(tmp_path):
    program = "{% for m in messages if m.role != 'system' %}USER: {{ m.content }} {% endfor %}"
    with pytest.raises(InputError, match="ignores the system message"):
        render(get_template(program), ["Hi", None], system="Answer in French.")


def test_of_several_by_name_the_default_counts(tmp_path):
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": INST}]
    assert resolved(write_template(tmp_path / "t", "tokenizer_config.json", named)).template == "mistral_instruct"
    assert read_chat_template(write_template(tmp_path / "u", "tokenizer_config.json", named[:1])) is None


def test_another_image_token_becomes_the_mark(tmp_path):
    program = USER_ASSISTANT.replace("<image>", "<|vision|>")
    write_template(tmp_path / "t", "processor_config.json", program, image_token="<|vision|>")
    config = resolved(tmp_path / "t")
    assert render(get_template(config.template), ["<image>\nHi", None])[0] == "USER: <image>\nHi ASSISTANT:"


@pytest.mark.parametrize(
    "program", ["{% for m in messages %}", "{{ 1 / 0 }}", "{{ raise_exception('no') }}", "no {{ '' }}"]
)
def test_a_template_that_cannot_be_run_is_named_and_not_used(program, tmp_path, capsys):
    config = resolved(write_template(tmp_path / "t", "chat_template.jinja", program))
    assert config.template is None
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: chat_template.jinja: is not used")


# What the environment of transformers has beyond Jinja's own.
ENVIRONMENT = {
    "loops": "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}<image>"
    "{{ m.content[1].text }}{% endfor %}",
    "JSON": "<image>{{ messages | tojson(indent=1) }}{{ {'b': '<é>', 'a': none} | tojson(sort_keys=true) }}",
    "whitespace": "{% if true %}\n  {% set x = 1 %}\n<image>\n  {# no #}\n{{ x }}\n\n{% endif %}\n",
    "generation": "{% set x = 1 %}<image>{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}",
    "names": "{% set n = namespace(a=1) %}{% set n.a = dict(b=n.a) %}<image>{{ n.a }}{{ tools is none }}{{ documents }}"
    "{{ strftime_now('%Z') }}{{ add_generation_prompt }}{{ bos_token }}",
}


def test_a_chat_template_is_a_file_of_bounded_size(tmp_path):
    (tmp_path / "chat_template.jinja").write_text("{{ 1 }}" * 2**18)
    with pytest.raises(InputError, match=r"chat_template.jinja: has 1,835,008 bytes"):
        read_chat_template(tmp_path)


@pytest.mark.parametrize("program", ENVIRONMENT.values(), ids=ENVIRONMENT)
def test_the_environment_is_that_of_transformers(program):
    from transformers.utils.chat_template_utils import render_jinja_template

    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Hi é 🙂"}]}] * 2
    [[want], _] = render_jinja_template([messages], chat_template=program, add_generation_prompt=True)
    assert sandbox.run("render", program, messages, True) == want


@pytest.fixture
def hasty(monkeypatch):
    """A limit of a second."""
    monkeypatch.setattr(sandbox, "_shared", sandbox.Worker(seconds=1))


LIMITS = {
    "loops": ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "more than 1 s"),
    "power": ("{{ (7 ** (10 ** 8)) % 10 }}", "more than 1 s"),
    "lipsum": ("{{ lipsum(n=10 ** 9) }}", "more than 1 s"),
    "text": ("{{ 'a' * 10 ** 10 }}", "512 MB"),
    "format": ("{{ '%1000000000d' % 1 }}", "512 MB"),
    "center": ("{{ 'a' | center(10 ** 10) }}", "512 MB"),
    "JSON": ("{{ [1] | tojson(indent=10 ** 10) }}", "512 MB"),
    "doubling": (
        "{% set n = namespace(s='a') %}{% for i in range(99) %}{% set n.s = n.s.replace('a', 'aa') %}{% endfor %}",
        "takes more than",
    ),
    "output": ("{{ '<image>' ~ 'a' * 2 ** 21 }}", "renders 2,097,1"),
    "recursion": ("{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    "nesting": ("{{ " + "(" * 9999 + ")" * 9999 + " }}", "recursion"),
    "size": ("{{ 1 }}" + "a" * 2**20, "more than 1,048,576 characters"),
    "half a character": ("<image>{{ '\\ud800' }}", "surrogates"),
    "private": ("{% set n = namespace(_a=1) %}<image>", "cannot have _a"),
}


@pytest.mark.parametrize(("program", "says"), LIMITS.values(), ids=LIMITS)
def test_a_template_runs_within_limits(program, says, hasty):
    with pytest.raises(InputError, match=says) as refused:
        render(get_template(program), ["<image>\nHi", None])
    assert len(str(refused.value)) < 300 and "\n" not in str(refused.value)
    assert render(get_template(USER_ASSISTANT), ["Hi", None])[0] == "USER: Hi ASSISTANT:"  # the next one is run


def test_a_worker_ends_with_what_it_belongs_to(hasty):
    program = "from llava_jax import sandbox; sandbox.run('match', 'a', ['a']); print(sandbox._shared._process.pid)"
    pid = int(subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stdout)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_worker_is_of_the_same_package_and_leaves_nothing_where_it_ends(tmp_path):
    (tmp_path / "llava_jax").symlink_to(Path(sandbox.__file__).parent)
    program = """
import resource, sys
resource.setrlimit(resource.RLIMIT_CORE, (resource.getrlimit(resource.RLIMIT_CORE)[1],) * 2)
sys.path = [path for path in sys.path if "site-packages" in path or "lib/python" in path or not path]
from llava_jax import sandbox
try:
    sandbox.Worker(seconds=1).run("match", "(a+)+$", ["a" * 40 + "b"])
except sandbox.LimitError as error:
    print(error)
"""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, cwd=tmp_path, env=environment, text=True)
    assert ran.stdout == "takes more than 1 s\n", ran.stderr
    assert os.listdir(tmp_path) == ["llava_jax"]


def test_what_config_json_names_stands(tmp_path):
    directory = write_template(tmp_path / "t", "chat_template.jinja", USER_ASSISTANT)
    assert resolved(directory, c.tiny(template="llava_v1")).template == "llava_v1"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A whole checkpoint of transformers' with a template of its own."""
    directory = tmp_path_factory.mktemp("checkpoint") / "hf"
    to_hf(GOLDEN / "checkpoints/v1.6-mistral", directory)
    fields = json.loads((directory / "config.json").read_text())
    del fields["conversation_template"]
    (directory / "config.json").write_text(json.dumps(fields))
    (directory / "chat_template.jinja").write_text(USER_ASSISTANT)
    return directory


def test_inference_runs_it_and_says_so(checkpoint, run_cli):
    status, _, err = run_cli(generate.main, "--checkpoint", checkpoint, "--prompt", "Hi", "--max-new-tokens", 2)
    assert status == 0
    assert "template the checkpoint's own (chat_template.jinja; no named template matches it)" in err


def test_training_asks_for_a_template(checkpoint, tmp_path):
    found = open_checkpoint(checkpoint)
    data = tmp_path / "data.json"
    data.write_text(json.dumps([{"conversations": turns("Hi", "Yes.")}]))
    with pytest.raises(InputError, match=r"chat template of its own \(chat_template.jinja\).*--template"):
        Samples(str(data), str(tmp_path), found.config, found.tokenizer)
    assert len(Samples(str(data), str(tmp_path), found.config, found.tokenizer, template="v1")) == 1


@pytest.mark.parametrize("form", ["transformers", "original"])
def test_it_goes_along_with_conversions(checkpoint, form, tmp_path):
    program = open_checkpoint(checkpoint).config.template
    to_orbax(checkpoint, tmp_path / "orbax")
    assert open_checkpoint(tmp_path / "orbax").config.template == program
    to_hf(tmp_path / "orbax", tmp_path / "back", form=form)
    back = open_any(tmp_path / "back").config
    turns = ["<image>\nWhat?", "A cat.", "Why?", None]
    assert render(get_template(choose_template(back)), turns) == render(get_template(program), turns)


def test_the_template_beside_an_original_is_its_language_models(tmp_path):
    directory = write_checkpoint(tmp_path / "c", golden_tensors("v1.6-mistral"), "v1.6-mistral")
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": USER_ASSISTANT}))
    assert choose_template(open_checkpoint(directory).config) == "mistral_instruct"


def test_a_template_that_differs_for_two_images_alone_is_not_a_named_one(tmp_path):
    config = c.tiny(template=None)
    program = to_jinja(get_template("v1"), config) + (
        "{% if messages[0]['content'] is not string and messages[0]['content'] | selectattr('type', 'equalto', 'image')"
        " | list | length > 1 %} Two!{% endif %}"
    )
    found = resolved(write_template(tmp_path / "t", "chat_template.jinja", program))
    assert found.template.endswith(program)
