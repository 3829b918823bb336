"""Conversations to token ids with image marks, and to the labels of training (host only).

`encode` tokenizes text around its image marks; `encode_conversation` renders a conversation, tokenizes it and labels
the tokens. Ids equal llava/mm_utils.py's `tokenizer_image_token`, labels llava/train/train.py's.

Labels come from character offsets. The reference instead adds up the lengths of separately tokenized pieces,
which goes wrong with many tokenizers ("tokenization mismatch"), whereupon it drops the whole sample. Where it
does not go wrong, the labels here are the same.
"""

from collections.abc import Sequence

import numpy as np

from llava_jax.config import LlavaConfig
from llava_jax.console import InputError, shorten
from llava_jax.data.splice import IGNORE, IMAGE
from llava_jax.data.templates import IMAGE_END, IMAGE_PATCH, IMAGE_START, MARK, Span, Template, mark, render
from llava_jax.data.tokenizer import Tokenizer


def with_images(turns: Sequence[str | None], images: int, config: LlavaConfig) -> list[str | None]:
    """A conversation with its image marks: as written, or one for each image in front of it if it has none.

    Raises:
      InputError: it has marks, but not one for each image.
    """
    marks = sum(turn.count(MARK) for turn in turns if turn)
    if marks not in (0, images):
        raise InputError(
            f"the prompt has {marks} {MARK} marks for {images} images; there must be one for each, or none at all"
        )
    if marks == 0:
        turns = [f"{MARK}\n" * images + turns[0], *turns[1:]]
    return [turn and turn.replace(MARK, mark(config)) for turn in turns]


def encode(text: str, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Tokenize text around its image marks: each piece on its own, one BOS in front.

    Returns:
      ids int32 [n], `IMAGE` for each mark; offsets int32 [n, 2], where in `text` each token comes from.

    Raises:
      InputError: the text cannot be written as UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"the text is not Unicode: {text[error.start : error.end]!a} is half a character") from None
    ids: list[int] = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    offsets: list[Span] = [(0, 0)] * len(ids)
    at = 0
    for i, piece in enumerate(text.split(MARK)):
        if i:
            ids.append(IMAGE)
            offsets.append((at, at + len(MARK)))
            at += len(MARK)
        piece_ids, piece_offsets = tokenizer.encode(piece)
        ids += piece_ids
        offsets += [(at + a, at + b) for a, b in piece_offsets]
        at += len(piece)
    return np.array(ids, np.int32), np.array(offsets, np.int32).reshape(-1, 2)


def encode_prompt(
    template: Template, turns: Sequence[str | None], tokenizer: Tokenizer, *, system: str | None = None
) -> np.ndarray:
    """Token ids [n] of a conversation that the model is to continue."""
    text, _ = render(template, turns, system=system)
    if template.style == "jinja" and tokenizer.bos_id is not None:  # written and added, one of them is enough
        text = text.removeprefix(tokenizer.token(tokenizer.bos_id))
    return encode(text, tokenizer)[0]


def prepare_tokenizer(tokenizer: Tokenizer, config: LlavaConfig) -> None:
    """Add the image tokens that a configuration asks for (llava/model/builder.py), where they are missing."""
    if config.use_im_patch and config.use_im_start_end:
        tokenizer.add_special([IMAGE_PATCH])
    if config.use_im_start_end:
        tokenizer.add_special([IMAGE_START, IMAGE_END])


def end_ids(config: LlavaConfig, tokenizer: Tokenizer, template: Template) -> tuple[int, ...]:
    """The tokens that end an answer: the configuration's, the tokenizer's, the template's where it is one token."""
    ends = {*config.text.eos_ids, tokenizer.eos_id, template.stop and tokenizer.token_id(template.stop)}
    return tuple(sorted(ends - {None, ""}))


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
    """Token ids and labels of a training conversation, as llava/train/train.py `preprocess` makes them.

    Args:
      conversation: `[{"from": "human" | "gpt", "value": text}, ...]`.
      config: for `mm_use_im_start_end`.
      system: a system message instead of the template's; the plain template, which discards questions, has none.
      images: how many the conversation has. With one, the marks of a turn become a single one in front of it,
        as the reference does (`preprocess_multimodal`); with several they stay where they are.
      image_last: put that single mark behind the turn's text.

    Returns:
      ids int32 [n] with `IMAGE`, labels int32 [n] with `IGNORE` where nothing is trained.

    Raises:
      InputError: a speaker is unknown or speaks out of turn.
    """
    values = [_place_marks(turn["value"], template, config, images, image_last) for turn in conversation]
    speakers = [turn["from"] for turn in conversation]
    if template.style == "single":
        return _encode_v0(speakers, values, template, tokenizer, system)
    turns = _turns(speakers, values)
    if template.style == "plain":
        if len(turns) != 2 or MARK not in turns[0]:
            raise InputError(f"the plain template wants one question with an {MARK} mark and one answer")
        text = MARK + turns[1] + template.sep
        spans = [(len(MARK), len(text))]
    else:
        text, spans = render(template, turns, system=system)
    ids, offsets = encode(text, tokenizer)
    return ids, np.where(_inside(offsets, spans) & (ids != IMAGE), ids, IGNORE)


def _place_marks(value: str, template: Template, config: LlavaConfig | None, images: int, image_last: bool) -> str:
    if MARK in value and images == 1:
        text = value.replace(MARK, "").strip()
        value = (f"{text}\n{MARK}" if image_last else f"{MARK}\n{text}").strip()
    if template.image_tag:
        value = value.replace(MARK, f"<Image>{MARK}</Image>")
    return value.replace(MARK, mark(config)) if config else value


def _turns(speakers: list[str], values: list[str]) -> list[str]:
    first = 1 if speakers[:1] == ["gpt"] else 0  # the reference drops an answer that nobody asked for
    expected = ["human", "gpt"] * len(speakers)
    if speakers[first:] != expected[: len(speakers) - first]:
        raise InputError(f"speakers must take turns, human first; here they are {shorten(', '.join(speakers))}")
    return values[first:]


def _inside(offsets: np.ndarray, spans: Sequence[Span]) -> np.ndarray:
    """[n] whether a token begins in one of the spans, or before it and ends in it: where a tokenizer's normalization
    makes the newline of a header a space, the space is part of the answer's first token."""
    inside = np.zeros(len(offsets), bool)
    begins, ends = offsets.T
    for start, end in spans:
        inside |= (begins < end) & ((begins >= start) | (ends > start))
    return inside


def _encode_v0(
    speakers: list[str], values: list[str], template: Template, tokenizer: Tokenizer, system: str | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """v0's own layout and mask, drift included.

    Its training text is not its prompt: `{system}\\n\\n### Human: ...\\n### Assistant: ...\\n### `. Of a human
    turn all but the first two tokens are masked, and the place of a turn is the sum of the lengths of those
    before it, each counted with a BOS that the whole text has only once (train.py `_mask_targets`).
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
