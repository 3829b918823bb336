"""Have a language model write conversations about images, from captions and boxes (LLaVA's own data, paper section 3).

    python -m train.datasets.instruct --captions captions_train2017.json --boxes instances_train2017.json \\
        --endpoint http://localhost:8000/v1 --model NAME --output instruct

    answers.jsonl        the replies as they came; the same command asks for what is missing
    conversation.json    questions and answers about an image
    detail.json          a detailed description
    reasoning.json       a question that takes thought
    instruct.json        all of them
    rejected.jsonl       what could not be used, with the reasons

The conversations have the original's format. They are built from `answers.jsonl` alone, in the order of the captions:
a second run asks nothing, and writes the same files.
"""

import argparse
import collections
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from llava_jax.batch_files import Failure, read_results, write_batches
from llava_jax.console import (
    SEED,
    InputError,
    Parser,
    Progress,
    elapsed,
    integer,
    note,
    number,
    plural,
    run_main,
    shorten,
)
from llava_jax.data.image_folder import ImageFolder
from llava_jax.endpoints import Endpoint, Outcome, Request, request_body
from llava_jax.json_files import parse_json
from llava_jax.replies import Prices, show_tokens
from train.datasets.instruct.coco import Record, read_records
from train.datasets.instruct.dialogues import Dialogue, Dialogues, Images, State
from train.datasets.instruct.messages import KINDS, read_prompt, read_questions
from train.datasets.instruct.output import check_settings, open_output, read_settings, write_results

CHARACTERS_PER_TOKEN = 4  # for estimates
OWN_FIELDS = ("model", "messages", "stream", "n")  # of a request, which --extra-body cannot set
Pending = list[tuple[Dialogue, State]]


# ---------------------------------------------------------------- asking


def draw(records: list[Record], limit: int | None, seed: int) -> set[str]:
    """The ids of `limit` random records, or of all. A larger limit draws those of a smaller one too."""

    def rank(record: Record) -> bytes:
        return hashlib.sha256(f"{seed}/{record.id}".encode()).digest()

    return {record.id for record in (records if limit is None else sorted(records, key=rank)[:limit])}


def find_pending(dialogues: Dialogues, drawn: set[str], kinds: Sequence[str]) -> Pending:
    """The dialogues that have not ended, of these records and kinds."""
    pending = []
    with Progress("reading replies", len(dialogues.by_id), "conversations") as bar:
        for dialogue in dialogues.by_id.values():
            if dialogue.kind in kinds and dialogue.record.id in drawn:
                state = dialogues.state(dialogue)
                if dialogues.request(dialogue, state):
                    pending.append((dialogue, state))
            bar.advance()
    return pending


def estimate(pending: Pending, dialogues: Dialogues) -> tuple[int, int]:
    """The expected tokens of requests and replies: as those so far, or else by characters, replies being as long as
    those of the worked examples. Without images and retries."""
    replies = dialogues.replies
    if replies.prompt_tokens:
        share = len(pending) / len(replies)
        return round(share * replies.prompt_tokens), round(share * replies.completion_tokens)
    requests = answers = 0
    for dialogue, _ in pending:
        prompt = dialogues.prompts[dialogue.kind]
        requests += prompt.characters + len(dialogues.text(dialogue.record, dialogue.kind))
        answers += prompt.answer_characters
    return requests // CHARACTERS_PER_TOKEN, answers // CHARACTERS_PER_TOKEN


def add_results(paths: Sequence[str], dialogues: Dialogues) -> None:
    """Add the results of batches to the replies.

    Raises:
      InputError: a file is not of results.
    """
    added, failures, unknown = 0, [], 0
    for path in paths:
        for result in read_results(path):
            if not dialogues.of(result.id):
                unknown += 1
            elif result.id in dialogues.replies:
                continue
            elif isinstance(result, Failure):
                failures.append(result)
            else:
                dialogues.replies.append(result)
                added += 1
    if paths:
        note(f"{added:,} replies added")
    if failures:
        first = f"{failures[0].id}: {failures[0].reason}"
        note(f"warning: {plural(len(failures), 'request')} failed, to be asked again; the first is {first}")
    if unknown:
        note(f"warning: {plural(unknown, 'result')} ignored: not about these captions")


# ---------------------------------------------------------------- the command


def kind_list(text: str) -> tuple[str, ...]:
    """Parse a list of kinds."""
    given = [] if text == "none" else text.split(",")
    if not set(given) <= {*KINDS}:
        raise argparse.ArgumentTypeError(f"{shorten(text)!r}: must be some of {','.join(KINDS)}")
    return tuple(kind for kind in KINDS if kind in given)


def json_object(text: str) -> dict[str, Any]:
    """Parse fields of a request."""
    try:
        value = parse_json(text)
    except InputError as error:
        raise argparse.ArgumentTypeError(f"{shorten(text)!r}: must be a JSON object: {error}") from None
    if not isinstance(value, dict) or not value.keys().isdisjoint(OWN_FIELDS):
        raise argparse.ArgumentTypeError(f"{shorten(text)!r}: must be a JSON object without {', '.join(OWN_FIELDS)}")
    return value


def parser() -> argparse.ArgumentParser:
    p = Parser(
        prog="python -m train.datasets.instruct",
        description="Have a language model write conversations about images, from captions and boxes.",
    )
    p.add_argument("--captions", required=True, metavar="FILE", help="COCO's captions_*.json, or JSON lines with boxes")
    p.add_argument("--boxes", metavar="FILE", help="COCO's instances_*.json")
    p.add_argument("--model", required=True, metavar="NAME", help="the endpoint's name of the model")
    p.add_argument("--output", required=True, metavar="DIR", help="a new directory, or one to continue")
    p.add_argument(
        "--kinds", type=kind_list, default=KINDS, metavar="LIST", help=f"what to ask for (default {','.join(KINDS)})"
    )
    p.add_argument("--limit", type=integer(1, 10**9), metavar="N", help="ask about N random images (by --seed)")
    p.add_argument("--seed", type=SEED, default=0, metavar="N", help="(default 0)")

    g = p.add_argument_group("how to ask: online, or through files for a batch")
    g.add_argument("--endpoint", metavar="URL", help="an OpenAI-compatible endpoint; OPENAI_API_KEY is its key, if any")
    g.add_argument("--write-batch", metavar="FILE", help="write the requests instead: a new .jsonl file, or several")
    g.add_argument(
        "--read-batch", action="append", default=[], metavar="FILE", help="add a batch's results; repeatable"
    )
    g.add_argument(
        "--concurrency", type=integer(1, 1000), default=16, metavar="N", help="requests at a time (default 16)"
    )
    g.add_argument(
        "--timeout", type=number(0.1, 86400), default=600.0, metavar="SECONDS", help="for a reply (default 600)"
    )
    g.add_argument("--price-in", type=number(0, 1e6), metavar="DOLLARS", help="per million tokens of requests")
    g.add_argument("--price-out", type=number(0, 1e6), metavar="DOLLARS", help="per million tokens of replies")

    g = p.add_argument_group("requests")
    g.add_argument("--max-tokens", type=integer(1, 10**6), default=1024, metavar="N", help="of a reply (default 1024)")
    g.add_argument("--temperature", type=number(0, 2), metavar="X", help="default: the endpoint's own")
    g.add_argument(
        "--extra-body", type=json_object, default={}, metavar="JSON", help="more fields of a request; null removes one"
    )
    g.add_argument("--prompts", metavar="DIR", help="a folder of prompts (default: this package's own)")
    g.add_argument(
        "--boxes-for", type=kind_list, default=("detail", "reasoning"), metavar="LIST",
        help="kinds asked for with boxes, or none (default detail,reasoning, as in the paper)",
    )  # fmt: skip
    g.add_argument("--image-folder", metavar="DIR", help="send the images too, to a model that sees")
    g.add_argument(
        "--image-side",
        type=integer(28, 8192),
        default=768,
        metavar="N",
        help="longest side of images sent (default 768)",
    )

    g = p.add_argument_group("replies")
    g.add_argument(
        "--attempts", type=integer(1, 10), default=3, metavar="N", help="until a reply can be used (default 3)"
    )
    g.add_argument("--language", choices=("en", "none"), default="en", help="that replies must be in (default en)")
    return p


def check_flags(args: argparse.Namespace) -> None:
    """Raises:
    InputError: flags are missing, or contradict each other.
    """
    if "://" in args.output:
        raise InputError(f"--output {shorten(args.output)}: must be a local directory")
    if not (args.endpoint or args.write_batch or args.read_batch):
        raise InputError("give --endpoint, --write-batch or --read-batch")
    if args.endpoint and args.write_batch:
        raise InputError("--write-batch writes requests instead of sending them: leave out --endpoint")
    if (args.price_in is None) != (args.price_out is None):
        raise InputError("--price-in and --price-out go together")
    if not args.kinds:
        raise InputError("--kinds none: there is nothing to ask for")


def main() -> int:
    args = parser().parse_args()
    check_flags(args)
    with elapsed("reading captions and boxes"):
        records = read_records(args.captions, args.boxes)
    images = Images(ImageFolder(args.image_folder), args.image_side) if args.image_folder is not None else None
    folder, output = Path(args.prompts) if args.prompts is not None else None, Path(args.output)
    questions = read_questions(folder)
    with open_output(output) as replies:
        before = read_settings(output)
        kinds = [kind for kind in KINDS if kind in args.kinds or (before and kind in before["prompts"])]
        prompts = {kind: read_prompt(folder, kind, with_image=images is not None) for kind in kinds}
        check_settings(output, args.model, images.side if images else None, prompts)
        with elapsed("preparing requests"):
            dialogues = Dialogues(
                records, prompts, replies, attempts=args.attempts, boxes_for=args.boxes_for, images=images,
                language=None if args.language == "none" else args.language,
            )  # fmt: skip
        add_results(args.read_batch, dialogues)
        outcome = ask(dialogues, find_pending(dialogues, draw(records, args.limit, args.seed), args.kinds), args)
        if outcome.signal:
            note(f"stopped: {outcome.answered:,} replies are kept; the same command asks for the rest")
            return 128 + outcome.signal
        if len(replies) or outcome.failed:
            counts = write_results(output, dialogues, outcome.failed, questions, args.seed)
            note(summary(output, dialogues, counts, prices_of(args)))
    return 0


def ask(dialogues: Dialogues, pending: Pending, args: argparse.Namespace) -> Outcome:
    """Ask the endpoint, or write the requests to files."""
    if not pending:
        note("nothing is left to ask")
    if not pending or not (args.endpoint or args.write_batch):
        return Outcome()
    fields = {"max_tokens": args.max_tokens, "temperature": args.temperature} | args.extra_body
    prices = prices_of(args)
    endpoint = Endpoint(args.endpoint or "", args.model, args.concurrency, args.timeout, fields, prices)
    tokens = estimate(pending, dialogues)
    note(
        f"{'writing requests to' if args.write_batch else 'asking'} {shorten(args.model)} for "
        f"{plural(len(pending), 'conversation')}, an estimated "
        f"{show_tokens(*tokens, prices)}{', not counting images' if dialogues.images else ''}"
    )
    requests = filter(None, (dialogues.request(dialogue, state) for dialogue, state in pending))
    if args.write_batch:
        outcome = Outcome()
        paths = write_batches(Path(args.write_batch), bodies_of(requests, endpoint, outcome))
        note(f"requests in {', '.join(map(shorten, paths))}; add their results with --read-batch")
        return outcome
    return endpoint.ask(requests, dialogues.replies, total=len(pending), follow_up=dialogues.follow_up)


def bodies_of(requests: Iterable[Request], endpoint: Endpoint, outcome: Outcome) -> Iterator[tuple[str, dict]]:
    """Ids and bodies of requests, except those whose image cannot be read, which have failed."""
    for request in requests:
        try:
            yield request.id, request_body(endpoint, request.messages())
        except InputError as error:
            outcome.failed[request.id] = str(error)


def prices_of(args: argparse.Namespace) -> Prices | None:
    return None if args.price_in is None else Prices(args.price_in, args.price_out)


def summary(output: Path, dialogues: Dialogues, counts: collections.Counter[str], prices: Prices | None) -> str:
    """What there is at the end."""
    found = ", ".join(f"{counts[kind]:,} {kind}" for kind in dialogues.prompts)
    parts = [f"{found} in {shorten(output)}"]
    if counts["rejected"]:
        parts.append(f"{counts['rejected']:,} rejected (rejected.jsonl)")
    if counts["open"]:
        parts.append(f"{counts['open']:,} still to ask")
    replies = dialogues.replies
    tokens = show_tokens(replies.prompt_tokens, replies.completion_tokens, prices)
    models = shorten(", ".join(filter(None, replies.models)))
    parts.append(f"{len(replies):,} replies{f' of {models}' if models else ''}, {tokens}")
    return "; ".join(parts)


if __name__ == "__main__":
    run_main(main)
