"""What lmms-eval asks for -> prompts and sampling options. Does not need lmms-eval."""

import os
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from PIL import Image

from infer.prompt import Request, turn_of
from infer.sampling import Sampling
from llava_jax.console import MIN_POSITIVE, InputError, show_value
from llava_jax.data.templates import IMAGE_PART

MAX_NEW_TOKENS = 1024  # of tasks that set none, as of lmms-eval's own models
IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tiff", ".webp")
HARNESS_STOP = "\n\n"  # the harness's own, of tasks that name none; its models for LLaVA do not stop there
# Settings that are not implemented, with the values that change nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "num_beams": (None, 1), "num_return_sequences": (None, 1), "length_penalty": (None, 1), "penalty_alpha": (None, 0),
    "no_repeat_ngram_size": (None, 0), "typical_p": (None, 1), "skip_special_tokens": (None, True),
}  # fmt: skip
READ = {
    *("max_new_tokens", "min_new_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed"),
    *("do_sample", "until", "stop_sequences", "use_cache"),  # the engine always has a cache
}
IGNORED = {"image_aspect_ratio": "images are processed as the checkpoint's configuration says"}


def read_messages(messages: Sequence[Mapping[str, Any]], name: str, number: int = 0) -> Request:
    """Convert the messages of a chat task (lmms_eval/protocol.py `ChatMessages`) to a prompt, as the server does.

    Args:
      name: of the document, for errors.
      number: selects the random numbers of the answer, so that repeated questions get different ones.

    Raises:
      InputError: they have video or audio, or do not end with a question.
    """
    system, images, turns = [], [], list[list[str]]()
    for message in messages:
        role, content = message["role"], message["content"]
        parts: list[str] = []
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            if part["type"] == "image":
                images += read_visuals([part["url"]], name)
                parts.append(IMAGE_PART)
            elif part["type"] == "text":
                parts.append(part["text"])
            else:
                raise _no_media(name, part["type"])
        if role == "system":
            system.append("\n".join(parts))
            continue
        is_answer = role == "assistant"
        if is_answer and not turns:
            raise InputError(f"{name}: the conversation begins with an answer")
        if is_answer == bool(len(turns) % 2):
            turns.append([])
        turns[-1] += parts
    if len(turns) % 2 == 0:
        raise InputError(f"{name}: the conversation {'ends with an answer' if turns else 'is empty'}")
    return Request(
        tuple(map(turn_of, turns)), tuple(images), "\n\n".join(system) or None, name, number, trust_special_tokens=False
    )


def read_visuals(visuals: Any, name: str) -> list[Any]:
    """The images of a document, as Pillow images or paths.

    Raises:
      InputError: one is a video or audio.
    """
    images = list(visuals) if isinstance(visuals, (list, tuple)) else [] if visuals is None else [visuals]
    for image in images:
        is_file = isinstance(image, (str, os.PathLike)) and PurePath(image).suffix.lower() in IMAGE_SUFFIXES
        if not is_file and not isinstance(image, Image.Image):
            raise _no_media(name, "audio" if isinstance(image, dict) and "array" in image else "video")
    return images


def read_settings(settings: Mapping[str, Any]) -> tuple[Sampling, list[str]]:
    """Convert a task's `generation_kwargs` to sampling options.

    As in lmms-eval's own models the temperature alone decides whether to sample, and it is 0 if a task sets none.

    Returns:
      The options, and warnings about settings that change nothing.

    Raises:
      InputError: a setting is not implemented or out of range.
    """
    for name, value in settings.items():
        if name not in READ and name not in IGNORED and value not in NEUTRAL.get(name, (None,)):
            raise InputError(f"generation_kwargs: {name} {show_value(value)} is not implemented by llava_jax")
    given = {name: value for name, value in settings.items() if value is not None}
    temperature = given.get("temperature", 0.0)
    warnings = [f"{name} is ignored: {why}" for name, why in IGNORED.items() if name in given]
    if given.get("do_sample") is False and temperature:
        warnings.append(f"do_sample is ignored: answers are sampled, with temperature {temperature}")
    if given.get("do_sample") is True and not temperature:
        warnings.append("do_sample is ignored: decoding is greedy, without a temperature")
    stops: list[str] = []
    for name in ("until", "stop_sequences"):
        value = given.get(name, [])
        stops += [value] if isinstance(value, str) else value
    same = ("min_new_tokens", "top_k", "min_p", "repetition_penalty", "seed")
    sampling = Sampling(
        temperature=temperature,
        top_p=given.get("top_p", 1.0) or MIN_POSITIVE,  # of 0, the most likely token remains
        max_new_tokens=given.get("max_new_tokens", MAX_NEW_TOKENS),
        stop=tuple(stop for stop in stops if stop and stop != HARNESS_STOP),
        **{name: given[name] for name in same if name in given},
    )
    return sampling, warnings


def _no_media(name: str, kind: str) -> InputError:
    return InputError(f"{name}: has {kind}; llava_jax answers questions about images and text")
