"""Answer questions about pictures.

    python -m infer.generate
    python -m infer.generate --checkpoint DIR --image photo.jpg --prompt "What is in this picture?"
    python -m infer.generate --checkpoint DIR --questions q.jsonl --image-folder pictures --answers a.jsonl

The answer goes to standard output, everything else to standard error. Without `--checkpoint` a small bundled model
answers; with neither model nor question it is asked one about a bundled picture.
"""

import argparse
import dataclasses
from pathlib import Path

from infer.flags import add_batch_size_flag, add_model_flags, load_engine
from infer.sampling import Sampling
from llava_jax.console import InputError, Parser, note, print_json, ranges, run_main, terminal_safe
from llava_jax.data.templates import get_template

BUNDLED = Path(__file__).parent / "shapes"  # its README.md is its card
KNOWS = "knows pictures of coloured shapes and nothing else"
QUESTION = "How many objects are there?"  # about example.png, where nothing is asked


def parser() -> argparse.ArgumentParser:
    p = Parser(prog="python -m infer.generate", description="Answer questions about pictures.")
    add_model_flags(p, default=f"the bundled model, which {KNOWS}")
    one = p.add_argument_group("one question")
    about = "a path, or an http(s), data: or file: URL; repeatable"
    one.add_argument("--image", action="append", default=[], metavar="FILE", help=about)
    one.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="the question; <image> marks say where the images go, default: in front",
    )
    one.add_argument(
        "--stream", action=argparse.BooleanOptionalAction, help="print the answer as it comes; default: without --json"
    )
    many = p.add_argument_group("many questions")
    many.add_argument(
        "--questions", metavar="FILE", help="JSON lines with question_id, text and, unless text-only, image"
    )
    many.add_argument("--image-folder", metavar="DIR", help="where their images are; default: the current directory")
    many.add_argument("--answers", metavar="FILE", help="JSON lines, appended; questions answered there are skipped")
    add_batch_size_flag(many, default=8)
    how = p.add_argument_group("answers")
    how.add_argument("--system", metavar="TEXT", help="a system message instead of the template's")
    limits = ranges(Sampling)
    how.add_argument("--max-new-tokens", type=limits["max_new_tokens"], default=512, metavar="N", help="(default 512)")
    how.add_argument(
        "--temperature", type=limits["temperature"], default=0.0, metavar="X", help="0, the default, is greedy"
    )
    how.add_argument("--top-p", type=limits["top_p"], default=1.0, metavar="P", help="above 0 (default 1, off)")
    how.add_argument("--top-k", type=limits["top_k"], default=0, metavar="K", help="(default 0, off)")
    how.add_argument("--seed", type=limits["seed"], default=0, metavar="N", help="(default 0)")
    how.add_argument("--json", action="store_true", help="print one JSON object per answer")
    return p


def use_bundled(args: argparse.Namespace) -> None:
    """Let the bundled model answer, and say so.

    Raises:
      InputError: it cannot be meant.
    """
    if args.vision_tower is not None:
        raise InputError("--vision-tower wants --checkpoint")
    args.checkpoint = str(BUNDLED)
    note(f"no --checkpoint: the bundled model answers, which {KNOWS} ({BUNDLED})")
    if not args.image and args.prompt is None and args.questions is None:
        args.image, args.prompt = [str(BUNDLED / "example.png")], QUESTION
        note(f'--image {args.image[0]} --prompt "{args.prompt}"')


def main() -> int:
    args = parser().parse_args()
    if args.prompt and len(args.prompt) > 1:
        raise InputError(f"--prompt is given {len(args.prompt)} times: a command asks one; --questions asks many")
    args.prompt = args.prompt[0] if args.prompt else None
    for name in ("answers", "image_folder"):
        if getattr(args, name) is not None and not args.questions:
            raise InputError(f"--{name.replace('_', '-')} belongs to --questions")
    if args.checkpoint is None:
        use_bundled(args)
    if bool(args.questions) == (args.prompt is not None):
        raise InputError("give either --prompt or --questions")
    if args.questions and not args.answers:
        raise InputError("--questions wants --answers, the file to write to")
    if args.questions and args.image:
        raise InputError("--image belongs to --prompt; the images of --questions are named in its file")

    if args.template:
        get_template(args.template)  # or complain, sooner than the packages below, which take their time to load
    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.seed, args.max_new_tokens)
    if args.questions:
        return answer_file(args, sampling)
    args.image = check_images(args.image)
    engine = load_engine(args)
    if args.stream or (args.stream is None and not args.json):
        for piece in engine.stream(args.prompt, args.image, system=args.system, **dataclasses.asdict(sampling)):
            if isinstance(piece, str) and not args.json:
                print(terminal_safe(piece), end="", flush=True)
            answer = piece
        if not args.json:
            print()
    else:
        answer = engine.ask(args.prompt, args.image, system=args.system, **dataclasses.asdict(sampling))
    if args.json:
        print_json(dataclasses.asdict(answer))
    elif args.stream is False:
        print(terminal_safe(answer.text))
    return 0


def answer_file(args: argparse.Namespace, sampling) -> int:
    """Answer the questions of a file that are not answered yet."""
    from infer.answers import AnswersFile
    from infer.questions import answer_questions, read_questions

    with AnswersFile(args.answers, args.questions) as answers:
        questions = read_questions(args, answers)
        if not questions.rows and not questions.errors:
            n = questions.answered
            note("the question is answered already" if n == 1 else f"all {n} questions are answered already")
            return 0
        return answer_questions(load_engine(args), questions, answers, sampling, args)


def check_images(images: list[str]) -> list:
    """The images, downloaded where they are URLs: whatever is wrong with one is said before the weights are loaded."""
    from llava_jax.data.images import image_size
    from llava_jax.data.urls import fetch

    fetched = [fetch(image) for image in images]
    for image in fetched:
        image_size(image)
    return fetched


def run() -> None:
    """The command `llava-generate`."""
    run_main(main)


if __name__ == "__main__":
    run()
