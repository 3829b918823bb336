"""Convert conversations to token ids with image tokens, and to labels for training (host only).

`encode` tokenizes text around its `<image>` tokens; `encode_conversation` renders a conversation, tokenizes it and
labels the tokens. Ids equal llava/mm_utils.py's `tokenizer_image_token`, labels llava/train/train.py's.

Labels come from character offsets. The reference instead sums the lengths of separately tokenized pieces, which fails
with many tokenizers ("tokenization mismatch") and then drops the whole sample. Where it works, the labels are the same.
"""

import itertools
import re
from collections.abc import Callable, Sequence

import numpy as np

from llava_jax.config import LlavaConfig
from llava_jax.console import InputError, shorten
from llava_jax.data.splice import IGNORE, IMAGE
from llava_jax.data.templates import (
    IMAGE_END,
    IMAGE_PATCH,
    IMAGE_START,
    IMAGE_TOKEN,
    Markup,
    Span,
    Template,
    Turn,
    image_markup,
    render,
)
from llava_jax.data.tokenizer import Tokenizer

MARK = re.compile(f"({re.escape(IMAGE_TOKEN)})")


def add_image_tokens(
    turns: Sequence[Turn], images: int, config: LlavaConfig, *, trust_special_tokens: bool = True
) -> list[Turn]:
    """Ensure that a conversation has an image token per image: if it has none, all are put in front.

    Args:
      turns: texts, or sequences of texts and `IMAGE_PART`s; those that a turn begins with get a newline each.
      trust_special_tokens: whether `<image>` in a text is an image token too.

    Returns:
      The turns with the configuration's image tokens: texts, or, if they are not trusted, sequences.

    Raises:
      InputError: it has image tokens, but not one per image.
    """
    split = [turn if turn is None else _parts(turn, trust_special_tokens) for turn in turns]
    count = sum(isinstance(part, Markup) for parts in split for part in parts or ())
    if count not in (0, images):
        marks = f"{IMAGE_TOKEN} tokens" if trust_special_tokens else "places of images"
        raise InputError(f"the prompt has {count} {marks} for {images} images; give one for each image, or none")
    if count == 0:
        split[0] = [*[Markup(f"{IMAGE_TOKEN}\n")] * images, *(split[0] or ())]
    markup = image_markup(config)
    found = [
        parts and [Markup(p.replace(IMAGE_TOKEN, markup)) if isinstance(p, Markup) else p for p in parts]
        for parts in split
    ]
    return ["".join(parts) if parts is not None and trust_special_tokens else parts for parts in found]


def _parts(turn: str | Sequence[str], trusted: bool) -> list[str]:
    """The texts and images of a turn; of a trusted one, also the images in its texts."""
    parts = [turn] if isinstance(turn, str) else list(turn)
    for i, part in enumerate(parts):
        if not isinstance(part, Markup):
            break
        parts[i] = Markup(f"{part}\n")
    if not trusted:
        return parts
    return [Markup(part) if part == IMAGE_TOKEN else part for part in MARK.split("".join(parts))]


def encode(text: str, tokenizer: Tokenizer, *, guarded: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Tokenize text around its `<image>` tokens: each piece separately, one BOS in front.

    Args:
      guarded: whether parts of it come from `Tokenizer.guard`.

    Returns:
      ids int32 [n], with `IMAGE` for `<image>`; offsets int32 [n, 2], the (start, end) of each token in `text`.

    Raises:
      InputError: the text cannot be encoded as UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"the text is not valid Unicode: {text[error.start : error.end]!a} is an unpaired surrogate"
        ) from None
    ids: list[int] = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    offsets: list[Span] = [(0, 0)] * len(ids)
    at = 0
    for i, piece in enumerate(text.split(IMAGE_TOKEN)):
        if i:
            ids.append(IMAGE)
            offsets.append((at, at + len(IMAGE_TOKEN)))
            at += len(IMAGE_TOKEN)
        piece_ids, piece_offsets = tokenizer.encode(piece, guarded=guarded)
        ids += piece_ids
        offsets += [(at + a, at + b) for a, b in piece_offsets]
        at += len(piece)
    return np.array(ids, np.int32), np.array(offsets, np.int32).reshape(-1, 2)


def encode_prompt(
    template: Template,
    turns: Sequence[Turn],
    tokenizer: Tokenizer,
    *,
    system: str | None = None,
    trust_special_tokens: bool = True,
) -> np.ndarray:
    """Token ids [n] of a conversation for the model to continue.

    Args:
      turns: texts, or sequences of texts and of image tokens from `add_image_tokens`.
      trust_special_tokens: whether the texts and the system message may have special tokens. Otherwise these are
        spelled as any other text, and of the template's own marks of roles that are plain text, a space makes others:
        `[ INST]`, `USER :`.
    """
    join = "".join if trust_special_tokens else _guard(template, tokenizer)
    texts = [turn if turn is None else join([turn] if isinstance(turn, str) else turn) for turn in turns]
    text, _ = render(template, texts, system=join([system]) if system else system)
    if template.style == "jinja" and tokenizer.bos_id is not None:  # the template writes BOS, and `encode` adds it
        text = text.removeprefix(tokenizer.token(tokenizer.bos_id) or "")
    return encode(text, tokenizer, guarded=not trust_special_tokens)[0]


def _guard(template: Template, tokenizer: Tokenizer) -> Callable[[Sequence[str]], str]:
    """A function that joins the parts of a turn, with no special token or mark of a role in its texts."""
    # Matches where a space goes: `USER| :`, `[| INST]`.
    places = [
        rf"(?<=\b{re.escape(mark[:-1])})(?=:)"
        if mark[-1] == ":"
        else f"(?<={re.escape(mark[0])})(?={re.escape(mark[1:])})"
        for mark in template.role_marks
        if len(mark) > 1 and tokenizer.guard(mark) == mark
    ]
    marks = re.compile("|".join(places) or r"(?!)")

    def guard(parts: Sequence[str]) -> str:
        joined = (
            (markup, "".join(group))
            for markup, group in itertools.groupby(parts, lambda part: isinstance(part, Markup))
        )
        return "".join(text if markup else tokenizer.guard(marks.sub(" ", text)) for markup, text in joined)

    return guard


def prepare_tokenizer(tokenizer: Tokenizer, config: LlavaConfig) -> None:
    """Add the special image tokens of a configuration that the tokenizer lacks (llava/model/builder.py)."""
    if config.use_im_patch and config.use_im_start_end:
        tokenizer.add_special([IMAGE_PATCH])
    if config.use_im_start_end:
        tokenizer.add_special([IMAGE_START, IMAGE_END])


def end_ids(config: LlavaConfig, tokenizer: Tokenizer, template: Template) -> tuple[int, ...]:
    """The ids that end an answer: those of the configuration and tokenizer, and the template's stop string if it is one
    token."""
    ends = (*config.text.eos_ids, tokenizer.eos_id, tokenizer.token_id(template.stop) if template.stop else None)
    return tuple(sorted({end for end in ends if end is not None}))


# ---------------------------------------------------------------- training


def encode_conversation(
    conversation: Sequence[dict[str, str]],
    template: Template,
    tokenizer: Tokenizer,
    config: LlavaConfig | None = None,
    *,
    system: str | None = None,
    images: int = 1,
    image_last: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and labels of a training conversation, as from llava/train/train.py `preprocess`.

    Args:
      conversation: `[{"from": "human" | "gpt", "value": text}, ...]`.
      config: for `mm_use_im_start_end`.
      system: a system message instead of the template's; the plain template, which discards questions, ignores it.
      images: the number of images. With one, the `<image>` tokens of a turn become a single one in front of it, as in
        the reference (`preprocess_multimodal`); with several they stay where they are.
      image_last: put that single `<image>` after the turn's text.

    Returns:
      ids int32 [n] with `IMAGE`, labels int32 [n] with `IGNORE` where nothing is trained.

    Raises:
      InputError: a speaker is unknown or out of turn.
    """
    values = [_place_images(turn["value"], template, config, images, image_last) for turn in conversation]
    speakers = [turn["from"] for turn in conversation]
    if template.style == "single":
        return _encode_v0(speakers, values, template, tokenizer, system)
    turns = _turns(speakers, values)
    if template.style == "plain":
        if len(turns) != 2 or IMAGE_TOKEN not in turns[0]:
            raise InputError(f"the plain template needs one question with an {IMAGE_TOKEN} token and one answer")
        text = IMAGE_TOKEN + turns[1] + template.sep
        spans = [(len(IMAGE_TOKEN), len(text))]
    else:
        text, spans = render(template, turns, system=system)
    ids, offsets = encode(text, tokenizer)
    return ids, np.where(_inside(offsets, spans) & (ids != IMAGE), ids, IGNORE)


def _place_images(value: str, template: Template, config: LlavaConfig | None, images: int, image_last: bool) -> str:
    if IMAGE_TOKEN in value and images == 1:
        text = value.replace(IMAGE_TOKEN, "").strip()
        value = (f"{text}\n{IMAGE_TOKEN}" if image_last else f"{IMAGE_TOKEN}\n{text}").strip()
    if template.image_tag:
        value = value.replace(IMAGE_TOKEN, f"<Image>{IMAGE_TOKEN}</Image>")
    return value.replace(IMAGE_TOKEN, image_markup(config)) if config else value


def _turns(speakers: list[str], values: list[str]) -> list[str]:
    first = 1 if speakers[:1] == ["gpt"] else 0  # the reference drops an answer without a question
    expected = ["human", "gpt"] * len(speakers)
    if speakers[first:] != expected[: len(speakers) - first]:
        raise InputError(f"speakers must take turns, human first; got {shorten(', '.join(speakers))}")
    return values[first:]


def _inside(offsets: np.ndarray, spans: Sequence[Span]) -> np.ndarray:
    """[n] whether a token begins in one of the spans, or begins before and ends in it: if a tokenizer normalizes the
    newline of a header to a space, that space belongs to the answer's first token."""
    inside = np.zeros(len(offsets), bool)
    begins, ends = offsets.T
    for start, end in spans:
        inside |= (begins < end) & ((begins >= start) | (ends > start))
    return inside


def _encode_v0(
    speakers: list[str], values: list[str], template: Template, tokenizer: Tokenizer, system: str | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """v0's own format and mask, including its offset error.

    The training text differs from the prompt: `{system}\\n\\n### Human: ...\\n### Assistant: ...\\n### `. All but
    the first two tokens of a human turn are masked, and a turn starts at the sum of the lengths of those before it,
    each counted with a BOS that the whole text has only once (train.py `_mask_targets`).
    """
    names = {"human": template.roles[0], "gpt": template.roles[1]}
    header = f"{template.system if system is None else template.with_system(system)}\n\n"
    pieces = [
        f"### {names.get(speaker.lower(), 'unknown')}: {value}\n"
        for speaker, value in zip(speakers, values, strict=True)
    ]
    ids, _ = encode(header + "".join(pieces) + "### ", tokenizer)
    labels = ids.copy()
    at = len(encode(header, tokenizer)[0])
    labels[:at] = IGNORE
    for speaker, piece in zip(speakers, pieces, strict=True):
        n = len(encode(piece, tokenizer)[0])
        if speaker == "human":
            labels[at + 2 : at + n] = IGNORE
        at += n
    labels[ids == IMAGE] = IGNORE
    return ids, labels
