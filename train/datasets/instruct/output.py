"""The output directory of `train.datasets.instruct`: settings, replies, and the conversations built from them."""

import collections
import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

from llava_jax.checkpoints.outputs import make_directories, write_file
from llava_jax.console import InputError, Progress, first_line, shorten
from llava_jax.files import new_file
from llava_jax.json_files import read_json
from llava_jax.replies import Replies
from train.datasets.instruct.dialogues import Dialogues, to_row
from train.datasets.instruct.messages import Prompt

SETTINGS, ANSWERS = "settings.json", "answers.jsonl"


class Settings(TypedDict):
    """What all replies in a directory have in common. `prompts` are fingerprints by kind."""

    model: str
    image_side: int | None
    prompts: dict[str, str]


@contextlib.contextmanager
def open_output(output: Path) -> Iterator[Replies]:
    """Open the replies in a directory, which is made if missing. After an error without replies nothing is left.

    Raises:
      InputError: it holds something else, is in use or cannot be written.
    """
    name = f"--output {shorten(output)}"
    made = [path for path in (output, *output.parents) if not path.exists()]
    try:
        is_ours = (output / SETTINGS).exists()
        if not made and not is_ours and any(output.iterdir()):
            raise InputError(f"{name}: holds something else; give a new directory")
        make_directories(output)
    except OSError as error:
        raise InputError(f"{name}: cannot be used ({first_line(error)})") from None
    try:
        with Replies(output / ANSWERS) as replies:
            try:
                yield replies
            except BaseException:
                if not is_ours and not len(replies):
                    (output / SETTINGS).unlink(missing_ok=True)
                raise
    except OSError as error:  # for example a full disk
        raise InputError(f"{name}: cannot be written ({first_line(error)})") from None
    finally:
        with contextlib.suppress(OSError):  # at the first that is not empty
            for path in made:
                path.rmdir()


def read_settings(output: Path) -> Settings | None:
    """The settings of earlier replies in a directory, if there are any.

    Raises:
      InputError: the file is damaged.
    """
    return read_json(output / SETTINGS, Settings)


def check_settings(output: Path, model: str, image_side: int | None, prompts: Mapping[str, Prompt]) -> None:
    """Check that the replies in a directory are to requests of this kind, and record what was not asked for before.

    Raises:
      InputError: they are not.
    """
    fingerprints = {kind: prompt.fingerprint for kind, prompt in prompts.items()}
    settings: Settings = {"model": model, "image_side": image_side, "prompts": fingerprints}
    found = read_settings(output)
    if found:
        asked = found["prompts"]
        pairs = [(found["model"], model), (_images(found["image_side"]), _images(image_side))]
        pairs += [(f"other prompts of {kind}", "these") for kind in asked if asked[kind] != fingerprints.get(kind)]
        for old, new in pairs:
            if old != new:
                was = f"was made with {shorten(old)}, not {shorten(new)}"
                raise InputError(f"--output {shorten(output)}: {was}; give a new directory")
        settings["prompts"] = asked | fingerprints
    if settings != found:
        write_file(output / SETTINGS, json.dumps(settings, indent=2).encode() + b"\n")


def _images(side: int | None) -> str:
    return "no images" if side is None else f"images of {side} pixels"


def write_results(
    output: Path, dialogues: Dialogues, failed: Mapping[str, str], questions: Sequence[str], seed: int
) -> collections.Counter[str]:
    """Write the conversations and what was rejected. Returns the number of conversations by kind, of those `rejected`,
    and of those `open`, which another run asks for.

    Args:
      failed: reasons for which requests have no reply, by the request's id.
      questions: those that a description answers.
    """
    counts: collections.Counter[str] = collections.Counter()
    for path in output.glob(".*.incomplete"):  # of a command that was killed, since `Replies` locks the directory
        path.unlink()
    with contextlib.ExitStack() as stack:
        names = (*dialogues.prompts, "instruct")
        append = {name: stack.enter_context(_json_list(output / f"{name}.json")) for name in names}
        rejected = stack.enter_context(new_file(output / "rejected.jsonl"))
        bar = stack.enter_context(Progress("writing", len(dialogues.by_id), "conversations"))
        for dialogue in dialogues.by_id.values():
            state = dialogues.state(dialogue)
            request = dialogues.request(dialogue, state)
            if state.turns:
                row = to_row(dialogue, state.turns, questions, seed)
                append[dialogue.kind](row)
                append["instruct"](row)
                counts[dialogue.kind] += 1
            elif request is None or request.id in failed:
                reasons = [reason for _, reason in state.rejected]
                reasons += [failed[request.id]] if request else []
                line = {"id": dialogue.record.id, "image": dialogue.record.image, "kind": dialogue.kind}
                last = state.rejected[-1][0] if state.rejected else None
                rejected.write(_encode(line | {"reasons": reasons, "reply": last}) + b"\n")
                counts["rejected"] += 1
            else:
                counts["open"] += 1
            bar.advance()
    return counts


@contextlib.contextmanager
def _json_list(path: Path) -> Iterator[Callable[[Any], None]]:
    """A function that appends an element to a JSON list in a new file, one a line."""
    with new_file(path) as file:
        separator = b"[\n"

        def append(value: Any) -> None:
            nonlocal separator
            file.write(separator + _encode(value))
            separator = b",\n"

        yield append
        file.write(b"\n]\n" if separator == b",\n" else b"[]\n")


def _encode(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()
