"""Conversation templates, which turn a conversation into the text of a prompt (host only).

`render` renders a conversation and returns the character spans that the model is trained on; `to_jinja` converts a
template to an equivalent chat template for transformers, and `render_chat` renders with such a chat template. Prompts
equal llava/conversation.py's.
"""

import dataclasses
import json
import re
from collections.abc import Sequence

from llava_jax import sandbox
from llava_jax.config import LlavaConfig
from llava_jax.console import InputError, first_line, shorten

IMAGE_TOKEN = "<image>"
MAX_CHAT_TEMPLATE = 2**20  # characters
IMAGE_START, IMAGE_END, IMAGE_PATCH = "<im_start>", "<im_end>", "<im_patch>"
ROLE_MARKS = (
    *("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>", "###"),
    *("USER:", "ASSISTANT:", "Human:", "Assistant:"),
)
SPECIAL_MARK = re.compile(r"<\|[^<>|\s]+\|>")  # as in `<|im_start|>`


class Markup(str):
    """A part of a turn that is no text: `IMAGE_PART`, for an image at this place."""


IMAGE_PART = Markup(IMAGE_TOKEN)
Turn = str | Sequence[str] | None  # a text, or texts and `IMAGE_PART`s; None for what the model is to generate


@dataclasses.dataclass(frozen=True)
class Template:
    """The format of a prompt (llava/conversation.py `Conversation`).

    style    jinja     `system` is the Jinja source of a checkpoint's own chat template
             single    `{system}{sep}{role}: {turn}{sep}...`
             two       `{system}{sep}{role}: {question}{sep}{role}: {answer}{sep2}...`
             chatml    `{system}{sep}{role}{turn}{sep}...`
             llama_2   `{sep}[INST] <<SYS>>...{question} [/INST] {answer} {sep2}...`
             plain     `{turn}{sep}{turn}{sep}...`
    stop     the string that ends an answer
    shots    turns before the first one
    """

    style: str
    system: str = ""
    roles: tuple[str, str] = ("", "")
    sep: str = ""
    sep2: str = ""
    stop: str | None = None
    shots: tuple[str, ...] = ()
    image_tag: bool = False  # in training, `<Image>` and `</Image>` around `<image>`

    @property
    def role_marks(self) -> list[str]:
        """The strings around turns, which may be plain text to a tokenizer."""
        if self.style == "jinja":
            return [mark for mark in ROLE_MARKS if mark in self.system] + SPECIAL_MARK.findall(self.system)
        marks = ["[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"] if self.style == "llama_2" else []
        if self.style in ("single", "two"):
            marks += [f"{role}:" for role in self.roles]
        ends = [end.strip() for end in (self.sep, self.sep2, self.stop or "")]
        return marks + [end for end in ends if end] + SPECIAL_MARK.findall("".join(self.roles))

    def with_system(self, system: str) -> str:
        """The template's system text with its message replaced."""
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
    """The template of a name, or of the Jinja source of a chat template.

    Raises:
      InputError: the name is unknown.
    """
    if is_jinja(name):
        return Template("jinja", name)
    if name not in TEMPLATES:
        raise InputError(f"unknown template {shorten(repr(name))}; known: {', '.join(sorted(TEMPLATES))}")
    return TEMPLATES[name]


def choose_template(config: LlavaConfig) -> str:
    """The template that a checkpoint was most likely trained with: a name, or the Jinja source of its chat template.

    The checkpoint's files determine it (`config.template`); otherwise the type of the decoder does, and among LLaMA
    decoders the checkpoint's name. (The reference uses the name only, llava/eval/run_llava.py.)
    """
    return config.template or _guess(config)[0]


def explain_template(config: LlavaConfig, name: str | None = None) -> str:
    """A description of the template that a model uses, and why. `name` is the user's choice."""
    if name:
        return f"{name} (as requested)"
    if config.template and is_jinja(config.template):
        return f"the checkpoint's own ({config.template_from or 'its configuration'}; no named template matches it)"
    if config.template:
        return f"{config.template} (from the checkpoint's {config.template_from or 'configuration'})"
    guessed, reason = _guess(config)
    return f"{guessed} (for {reason}; --template overrides it)"


def is_jinja(template: str) -> bool:
    """Whether a template is the Jinja source of a chat template rather than a name."""
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
        return "llava_v1", "a Mistral decoder in a v1.5 model, like BakLLaVA"
    if text.family == "mistral":
        return "mistral_instruct", "a Mistral decoder"
    if "llama-2" in name or "llama2" in name:
        return "llava_llama_2", "a Llama 2 decoder, by the checkpoint's name"
    if re.search(r"[-_]v0\b", name):
        return "llava_v0", "a v0 LLaVA, by the checkpoint's name"
    return "llava_v1", "a Vicuna decoder"


# ---------------------------------------------------------------- rendering

Span = tuple[int, int]


def render(template: Template, turns: Sequence[str | None], *, system: str | None = None) -> tuple[str, list[Span]]:
    """Render a conversation.

    Args:
      template: the template.
      turns: question, answer, question, ...; None for the answer that the model is to generate.
      system: a system message instead of the template's.

    Returns:
      The text, and the character spans that the model is trained on: each answer with the separator before it and the
      marker that ends it. A checkpoint's own chat template has no spans.

    Raises:
      InputError: a checkpoint's own chat template cannot render the conversation.
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
            # An empty answer renders as an open turn, of which the reference trains the header's newline.
            spans.append((len(text) - 1, len(text)))
    return text, spans


def render_chat(source: str, turns: Sequence[str | None], *, system: str | None = None) -> str:
    """Render a conversation with a chat template in transformers' format.

    Images at the start of a turn, each on a line of its own, are passed to the template as images; others stay in the
    text. A template that only supports text gets text. The template runs within limits (`sandbox`).

    Raises:
      InputError: the template cannot render the conversation, or takes too much time or memory.
    """
    if len(source) > MAX_CHAT_TEMPLATE:
        raise InputError(f"the checkpoint's own chat template has more than {MAX_CHAT_TEMPLATE:,} characters")
    spoken = [("system", system)] if system else []
    spoken += [(("user", "assistant")[i % 2], turn) for i, turn in enumerate(turns) if turn is not None]
    images = sum(turn.count(IMAGE_TOKEN) for _, turn in spoken)
    problem = ""
    for to_content in (_parts, str):
        messages = [{"role": role, "content": to_content(turn)} for role, turn in spoken]
        try:
            text = sandbox.run("render", source, messages, turns[-1] is None)
        except ValueError as error:
            problem = problem or first_line(error)
            continue
        except sandbox.LimitError as error:
            raise InputError(f"the checkpoint's own chat template {error}; choose a template with --template") from None
        if any(str(part) in text for part in messages[-1]["content"] if isinstance(part, dict)):
            continue  # a template for text only, which printed the list
        if system and system.strip() not in text:
            problem = "it ignores the system message"
        elif text.count(IMAGE_TOKEN) == images:
            return text
    raise InputError(
        "the checkpoint's own chat template cannot render this conversation"
        f"{f' ({shorten(problem)})' if problem else ''}; choose a template with --template"
    )


def _parts(text: str) -> list[dict[str, str]]:
    rest, count = text, 0
    while rest.startswith(f"{IMAGE_TOKEN}\n"):
        rest, count = rest.removeprefix(f"{IMAGE_TOKEN}\n"), count + 1
    return [*[{"type": "image"}] * count, {"type": "text", "text": rest}]


def image_markup(config: LlavaConfig) -> str:
    """The text for an image: `<image>`, between start and end tokens if the model has them."""
    return f"{IMAGE_START}{IMAGE_TOKEN}{IMAGE_END}" if config.use_im_start_end else IMAGE_TOKEN


def to_jinja(template: Template, config: LlavaConfig) -> str:
    """Convert a template to a chat template in transformers' format, which renders the same text as `render`.

    Messages have a role (`system`, `user`, `assistant`) and a content: text, or a list of `{"type": "image"}` and
    `{"type": "text", "text": ...}`, in which images come first.
    """
    if template.style == "jinja":
        return template.system
    quote = json.dumps
    head, tail = "{%- macro said(m) -%}", "{%- endmacro -%}"
    image = quote(image_markup(config))
    said = (
        f"{head}{{%- if m.content is string -%}}{{{{ m.content }}}}{{%- else -%}}{{%- for c in m.content "
        f"if c.type == 'image' -%}}{{{{ {image} + '\\n' }}}}{{%- endfor -%}}{{%- for c in m.content "
        f"if c.type == 'text' -%}}{{{{ c.text }}}}{{%- endfor -%}}{{%- endif -%}}{tail}"
    )
    begin = template.with_system("\0").partition("\0")[0]  # the template's own header of a system message
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
