"""Answer questions about images.

    python -m infer.generate
    python -m infer.generate --checkpoint DIR --image photo.jpg --prompt "What is in this image?"
    python -m infer.generate --checkpoint DIR --questions q.jsonl --image-folder images --answers a.jsonl

The answer goes to standard output, everything else to standard error. Without `--checkpoint`, a small bundled model
answers; without a question too, it is asked about a bundled example image.
"""

import argparse
import dataclasses
from pathlib import Path

from infer.flags import add_batch_size_flag, add_model_flags, add_sampling_flags, load_engine, sampling_of
from llava_jax.console import InputError, Parser, note, print_json, run_main, terminal_safe
from llava_jax.data.templates import get_template

BUNDLED = Path(__file__).parent / "shapes"  # README.md is its model card
TRAINED_ON = "images of coloured shapes only"
QUESTION = "How many objects are there?"  # the default question, about example.png


def parser() -> argparse.ArgumentParser:
    p = Parser(prog="python -m infer.generate", description="Answer questions about images.")
    add_model_flags(p, default=f"the bundled model, trained on {TRAINED_ON}")
    one = p.add_argument_group("one question")
    about = "a path, or an http(s), data: or file: URL; repeatable"
    one.add_argument("--image", action="append", default=[], metavar="FILE", help=about)
    one.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="the question; each <image> in it stands for one image; default: images in front",
    )
    one.add_argument(
        "--stream",
        action=argparse.BooleanOptionalAction,
        help="print the answer as it is generated; default: unless --json",
    )
    many = p.add_argument_group("many questions")
    many.add_argument(
        "--questions", metavar="FILE", help="JSON lines with question_id, text and, unless text-only, image"
    )
    many.add_argument(
        "--image-folder", metavar="DIR", help="the folder of their images; default: the current directory"
    )
    many.add_argument("--answers", metavar="FILE", help="JSON lines, appended; answered questions are skipped")
    add_batch_size_flag(many, default=8)
    how = p.add_argument_group("answers")
    how.add_argument("--system", metavar="TEXT", help="a system message instead of the template's")
    add_sampling_flags(how)
    how.add_argument("--json", action="store_true", help="print one JSON object per answer")
    return p


def use_bundled(args: argparse.Namespace, verb: str = "using") -> None:
    """Select the bundled model, and log that.

    Raises:
      InputError: a flag needs `--checkpoint`.
    """
    if args.vision_tower is not None:
        raise InputError("--vision-tower needs --checkpoint")
    args.checkpoint = str(BUNDLED)
    note(f"no --checkpoint: {verb} the bundled model, trained on {TRAINED_ON} ({BUNDLED})")


def main() -> int:
    args = parser().parse_args()
    if args.prompt and len(args.prompt) > 1:
        raise InputError(f"--prompt is given {len(args.prompt)} times; give it once, or use --questions")
    args.prompt = args.prompt[0] if args.prompt else None
    for name in ("answers", "image_folder"):
        if getattr(args, name) is not None and not args.questions:
            raise InputError(f"--{name.replace('_', '-')} needs --questions")
    if args.checkpoint is None:
        use_bundled(args)
        if not args.image and args.prompt is None and args.questions is None:
            args.image, args.prompt = [str(BUNDLED / "example.png")], QUESTION
            note(f'--image {args.image[0]} --prompt "{args.prompt}"')
    if bool(args.questions) == (args.prompt is not None):
        raise InputError("give either --prompt or --questions")
    if args.questions and not args.answers:
        raise InputError("--questions needs --answers, the file to write")
    if args.questions and args.image:
        raise InputError("--image needs --prompt; a --questions file names its own images")
    if args.logprobs is not None and (args.questions or not args.json):
        raise InputError("--logprobs needs --prompt and --json")

    if args.template:
        get_template(args.template)  # fail on an unknown name before slow imports
    sampling = sampling_of(args)
    if args.questions:
        return answer_file(args, sampling)
    args.image = check_images(args.image)
    engine = load_engine(args)
    if args.stream or (args.stream is None and not args.json):
        for answer in engine.stream(args.prompt, args.image, system=args.system, **dataclasses.asdict(sampling)):
            if isinstance(answer, str) and not args.json:
                print(terminal_safe(answer), end="", flush=True)
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
    """Answer the questions of a file that have no answer yet."""
    from infer.answers import AnswersFile
    from infer.questions import answer_questions, read_questions

    with AnswersFile(args.answers, args.questions) as answers:
        questions = read_questions(args, answers)
        if not questions.rows and not questions.errors:
            n = questions.answered
            note("the question already has an answer" if n == 1 else f"all {n} questions already have answers")
            return 0
        return answer_questions(load_engine(args), questions, answers, sampling, args)


def check_images(images: list[str]) -> list:
    """Download and check images, so that errors are raised before the weights are loaded."""
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
