"""Conversation templates: how a conversation is written out for a model (host only).

`render` writes a conversation out in a template and says which characters the model is trained on; `jinja` writes the
template out as a program for transformers that does the same, `render_chat` runs such a program. Prompts equal
llava/conversation.py's.
"""

import dataclasses
import json
import re
from collections.abc import Sequence

from llava_jax import limited
from llava_jax.config import LlavaConfig
from llava_jax.console import InputError, first_line, shorten

MARK = "<image>"
MOST = 2**20  # characters of a chat template
IMAGE_START, IMAGE_END, IMAGE_PATCH = "<im_start>", "<im_end>", "<im_patch>"


@dataclasses.dataclass(frozen=True)
class Template:
    """How a conversation is written out (llava/conversation.py `Conversation`).

    style    jinja     `system` is the program of a checkpoint's own chat template
             single    `{system}{sep}{role}: {turn}{sep}...`
             two       `{system}{sep}{role}: {question}{sep}{role}: {answer}{sep2}...`
             chatml    `{system}{sep}{role}{turn}{sep}...`
             llama_2   `{sep}[INST] <<SYS>>...{question} [/INST] {answer} {sep2}...`
             plain     `{turn}{sep}{turn}{sep}...`
    stop     text that ends an answer
    shots    turns that come before the first one
    """

    style: str
    system: str = ""
    roles: tuple[str, str] = ("", "")
    sep: str = ""
    sep2: str = ""
    stop: str | None = None
    shots: tuple[str, ...] = ()
    image_tag: bool = False  # `<Image>` and `</Image>` around the mark, in training

    def with_system(self, system: str) -> str:
        """The template's system text with another message in it."""
        header, end, _ = self.system.partition({"chatml": "\n", "llama_3": "\n\n"}.get(self.style, "\0"))
        return header + end + system if end else system


_HUMAN = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
_USER = _HUMAN.replace("human", "user")
_SEEING = (
    "You are able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
)
_TAGGED = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant is able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
    "The visual content will be provided with the following format: <Image>visual content</Image>."
)
_LLAMA_2 = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being "
    "safe.  Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal "
    "content. Please ensure that your responses are socially unbiased and positive in nature.\n\n"
    "If a question does not make any sense, or is not factually coherent, explain why instead of answering "
    "something not correct. If you don't know the answer to a question, please don't share false information."
)
_ENERGY = (
    "What are the key differences between renewable and non-renewable energy sources?",
    "Renewable energy sources are those that can be replenished naturally in a relatively short amount of time, "
    "such as solar, wind, hydro, geothermal, and biomass. Non-renewable energy sources, on the other hand, are "
    "finite and will eventually be depleted, such as coal, oil, and natural gas. Here are some key differences "
    "between renewable and non-renewable energy sources:\n"
    "1. Availability: Renewable energy sources are virtually inexhaustible, while non-renewable energy sources "
    "are finite and will eventually run out.\n"
    "2. Environmental impact: Renewable energy sources have a much lower environmental impact than non-renewable "
    "sources, which can lead to air and water pollution, greenhouse gas emissions, and other negative effects.\n"
    "3. Cost: Renewable energy sources can be more expensive to initially set up, but they typically have lower "
    "operational costs than non-renewable sources.\n"
    "4. Reliability: Renewable energy sources are often more reliable and can be used in more remote locations "
    "than non-renewable sources.\n"
    "5. Flexibility: Renewable energy sources are often more flexible and can be adapted to different situations "
    "and needs, while non-renewable sources are more rigid and inflexible.\n"
    "6. Sustainability: Renewable energy sources are more sustainable over the long term, while non-renewable "
    "sources are not, and their depletion can lead to economic and social instability.\n",
)


def _v0(system: str, **kw) -> Template:
    return Template("single", system, ("Human", "Assistant"), "###", stop="###", **kw)


def _v1(system: str, **kw) -> Template:
    return Template("two", system, ("USER", "ASSISTANT"), " ", "</s>", stop="</s>", **kw)


def _inst(system: str, sep: str = "<s>") -> Template:
    return Template("llama_2", system, sep=sep, sep2="</s>", stop="</s>")


def _chatml(system: str, end: str = "<|im_end|>") -> Template:
    roles = ("<|im_start|>user\n", "<|im_start|>assistant\n")
    return Template("chatml", f"<|im_start|>system\n{system}", roles, end, stop="<|im_end|>")


def _llama_3(system: str) -> Template:
    head, end = "<|start_header_id|>{}<|end_header_id|>\n\n", "<|eot_id|>"
    roles = (head.format("user"), head.format("assistant"))
    return Template("llama_3", head.format("system") + system, roles, end, stop=end)


TEMPLATES: dict[str, Template] = {
    "v0": _v0(_HUMAN, shots=_ENERGY),
    "llava_v0": _v0(_HUMAN),
    "v0_mmtag": _v0(_TAGGED, image_tag=True),
    "v1": _v1(_USER),
    "llava_v1": _v1(_HUMAN),
    "v1_mmtag": _v1(_TAGGED, image_tag=True),
    "llama_2": _inst(_LLAMA_2),
    "llava_llama_2": _inst("You are a helpful language and vision assistant. " + _SEEING),
    "mistral_instruct": _inst("", sep=""),
    "mpt": _chatml(
        "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and honest answers."
    ),
    "chatml_direct": _chatml("Answer the questions."),
    "plain": Template("plain", sep="\n"),
    "llava_llama_3": _llama_3("You are a helpful language and vision assistant. " + _SEEING),
    "qwen_1_5": _chatml("You are a helpful assistant.", end="<|im_end|>\n"),
}
TEMPLATES |= {
    "default": TEMPLATES["v0"],
    "vicuna_v1": TEMPLATES["v1"],
    "mistral_direct": TEMPLATES["chatml_direct"],
    "v0_plain": TEMPLATES["plain"],
}


def get_template(name: str) -> Template:
    """A template by its name, or of a chat template's Jinja program.

    Raises:
      InputError: there is none of that name.
    """
    if is_program(name):
        return Template("jinja", name)
    if name not in TEMPLATES:
        raise InputError(f"unknown template {shorten(repr(name))}; known: {', '.join(sorted(TEMPLATES))}")
    return TEMPLATES[name]


def choose_template(config: LlavaConfig) -> str:
    """The template that a checkpoint was most likely trained for: a name, or the program of its own chat template.

    What the checkpoint's files say counts first (`config.template`). Without that this goes by what the decoder is, and
    by the checkpoint's name where LLaMA decoders differ. (The reference goes by the name alone,
    llava/eval/run_llava.py.)
    """
    return config.template or _guess(config)[0]


def explain_template(config: LlavaConfig, name: str | None = None) -> str:
    """Which template a model gets, and why, for people. `name` is what the user asked for."""
    if name:
        return f"{name} (as asked for)"
    if config.template and is_program(config.template):
        return f"of the checkpoint ({config.template_from or 'its configuration'}; no named one writes the same)"
    if config.template:
        return f"{config.template} (by the checkpoint's {config.template_from or 'configuration'})"
    guessed, reason = _guess(config)
    return f"{guessed} (for {reason}; --template names another)"


def is_program(template: str) -> bool:
    """Whether it is a chat template's Jinja program, and no name."""
    return "{%" in template or "{{" in template


def _guess(config: LlavaConfig) -> tuple[str, str]:
    text, name = config.text, config.name.lower()
    if text.family == "qwen2":
        return "qwen_1_5", "a Qwen decoder"
    if 128_000 <= text.vocab_size < 150_000:
        return "llava_llama_3", "a Llama 3 decoder"
    if 64_000 <= text.vocab_size < 65_000:
        return "chatml_direct", "a Yi decoder"
    if text.family == "mistral" and config.merge == "flat" and "mistral" not in name:
        return "llava_v1", "a Mistral decoder in a v1.5 model, as BakLLaVA"
    if text.family == "mistral":
        return "mistral_instruct", "a Mistral decoder"
    if "llama-2" in name or "llama2" in name:
        return "llava_llama_2", "a Llama 2 decoder, by the checkpoint's name"
    if re.search(r"[-_]v0\b", name):
        return "llava_v0", "a first LLaVA, by the checkpoint's name"
    return "llava_v1", "a Vicuna decoder"


# ---------------------------------------------------------------- writing a conversation out

Span = tuple[int, int]


def render(template: Template, turns: Sequence[str | None], *, system: str | None = None) -> tuple[str, list[Span]]:
    """Write a conversation out.

    Args:
      template: how.
      turns: question, answer, question, ...; None where the model is to go on.
      system: a system message instead of the template's.

    Returns:
      The text, and the spans of characters that the model is trained on: the answers, each with what separates
      it from the role before it and with the marker that ends it. A checkpoint's own chat template has no spans.

    Raises:
      InputError: a checkpoint's own chat template does not take the conversation.
    """
    if template.style == "jinja":
        return render_chat(template.system, turns, system=system), []
    text = template.system if system is None else template.with_system(system)
    spans: list[Span] = []

    def answer(begin: str, turn: str, end: str) -> None:
        nonlocal text
        spans.append((len(text), len(text) + len(begin + turn + end)))
        text += begin + turn + end

    turns = [*template.shots, *turns]
    if template.style == "llama_2":
        system, text = text, ""
        wrapped = f"<<SYS>>\n{system}\n<</SYS>>\n\n" if system else ""
        for i, turn in enumerate(turns):
            if i % 2 == 0:
                text += f"{template.sep if i else ''}[INST] {wrapped if i == 0 else ''}{turn} [/INST]"
            elif turn:
                answer(" ", turn, f" {template.sep2}")
        return text, spans

    if template.style == "llama_3":
        turns = [turn and turn.strip() for turn in turns]
    if template.style != "plain":
        text += template.sep
    space = " " if template.style in ("single", "two") else ""
    colon = ":" if space else ""
    for i, turn in enumerate(turns):
        text += template.roles[i % 2] + colon
        end = template.sep2 if template.style == "two" and i % 2 else template.sep
        if i % 2 == 0:
            text += f"{space}{turn}{end}" if turn else ""
        elif turn:
            answer(space, turn, end)
            if end.endswith("\n") and template.style != "plain":  # the newline after `<|im_end|>` begins the next turn
                spans[-1] = (spans[-1][0], spans[-1][1] - 1)
        elif turn is not None and template.style == "chatml":
            # An answer of nothing is written as an open turn. Here the reference trains the header's newline.
            spans.append((len(text) - 1, len(text)))
    return text, spans


def render_chat(program: str, turns: Sequence[str | None], *, system: str | None = None) -> str:
    """Write a conversation out by a chat template of transformers.

    Images that come first in a turn, each on a line of its own, are given to the template as images, for it to write;
    others stay in the text. A template that takes text only is given text only. The program runs within limits
    (`limited`).

    Raises:
      InputError: the template does not take the conversation, or takes too much time or memory for it.
    """
    if len(program) > MOST:
        raise InputError(f"the checkpoint's own chat template has more than {MOST:,} characters")
    said = [("system", system)] if system else []
    said += [(("user", "assistant")[i % 2], turn) for i, turn in enumerate(turns) if turn is not None]
    marks = sum(turn.count(MARK) for _, turn in said)
    problem = ""
    for content_of in (_parts, str):
        messages = [{"role": role, "content": content_of(turn)} for role, turn in said]
        try:
            written = limited.run("render", program, messages, turns[-1] is None)
        except ValueError as error:
            problem = problem or first_line(error)
            continue
        except limited.LimitError as error:
            raise InputError(f"the checkpoint's own chat template {error}; name a template with --template") from None
        if any(str(part) in written for part in messages[-1]["content"] if isinstance(part, dict)):
            continue  # a template of text only, which wrote a list out
        if system and system.strip() not in written:
            problem = "it has no place for a system message"
        elif written.count(MARK) == marks:
            return written
    raise InputError(
        "the checkpoint's own chat template cannot write this conversation"
        f"{f' ({shorten(problem)})' if problem else ''}; name a template with --template"
    )


def _parts(text: str) -> list[dict[str, str]]:
    lines = re.match(rf"(?:{re.escape(MARK)}\n)*", text)[0]
    images = [{"type": "image"}] * lines.count(MARK)
    return [*images, {"type": "text", "text": text[len(lines) :]}]


def mark(config: LlavaConfig) -> str:
    """What stands for an image in text: the mark, between its start and end tokens where the model has them."""
    return f"{IMAGE_START}{MARK}{IMAGE_END}" if config.use_im_start_end else MARK


def jinja(template: Template, config: LlavaConfig) -> str:
    """The template as a chat template of transformers: a Jinja program that writes what `render` writes.

    Messages have a role (`system`, `user`, `assistant`) and a content: text, or a list of `{"type": "image"}` and
    `{"type": "text", "text": ...}`, whose images come first.
    """
    if template.style == "jinja":
        return template.system
    quote = json.dumps
    head, tail = "{%- macro said(m) -%}", "{%- endmacro -%}"
    said = (
        f"{head}{{%- if m.content is string -%}}{{{{ m.content }}}}{{%- else -%}}{{%- for c in m.content "
        f"if c.type == 'image' -%}}{{{{ {quote(mark(config))} + '\\n' }}}}{{%- endfor -%}}{{%- for c in m.content "
        f"if c.type == 'text' -%}}{{{{ c.text }}}}{{%- endfor -%}}{{%- endif -%}}{tail}"
    )
    begin = template.with_system("\0").partition("\0")[0]  # what a template keeps of its own before another system text
    system = (
        "{%- if messages and messages[0].role == 'system' -%}"
        f"{{%- set system = {quote(begin)} + said(messages[0]) -%}}{{%- set turns = messages[1:] -%}}"
        f"{{%- else -%}}{{%- set system = {quote(template.system)} -%}}{{%- set turns = messages -%}}{{%- endif -%}}"
    )
    user, assistant = template.roles
    if template.style == "llama_2":
        body = (
            "{%- for m in turns -%}{%- if m.role == 'user' -%}"
            f"{{%- if not loop.first -%}}{{{{ {quote(template.sep)} }}}}{{%- endif -%}}{{{{ '[INST] ' }}}}"
            "{%- if loop.first and system -%}{{ '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' }}{%- endif -%}"
            "{{ said(m) + ' [/INST]' }}{%- else -%}"
            f"{{{{ ' ' + said(m) + {quote(' ' + template.sep2)} }}}}"
            "{%- endif -%}{%- endfor -%}"
        )
        return said + system + body
    spoken = "said(m) | trim" if template.style == "llama_3" else "said(m)"
    gap = ": " if template.style in ("single", "two") else ""
    ends = template.sep, template.sep2 if template.style == "two" else template.sep
    shots = "".join(
        template.roles[i % 2] + gap + turn + ends[i % 2] for i, turn in enumerate(template.shots)
    )  # fmt: skip
    start = "" if template.style == "plain" else f"{{{{ system + {quote(template.sep + shots)} }}}}"
    body = (
        "{%- for m in turns -%}{%- if m.role == 'user' -%}"
        f"{{{{ {quote(user + gap)} + ({spoken}) + {quote(ends[0])} }}}}{{%- else -%}}"
        f"{{{{ {quote(assistant + gap)} + ({spoken}) + {quote(ends[1])} }}}}"
        "{%- endif -%}{%- endfor -%}"
        f"{{%- if add_generation_prompt -%}}{{{{ {quote(assistant + gap.rstrip())} }}}}{{%- endif -%}}"
    )
    return said + system + start + body
