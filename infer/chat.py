"""Talk with a model about images, in a terminal.

    python -m infer.chat --checkpoint DIR --image photo.jpg
    python -m infer.chat --checkpoint DIR --image photo.jpg < questions.txt

Answers appear as they are generated. A line that begins with a slash is a command (`/help` lists them). If standard
input or output is not a terminal, each line is a question, and only answers go to standard output.
"""

import argparse
import contextlib
import dataclasses
import os
import shlex
import time
from collections.abc import Callable, Iterator
from typing import Any

from infer.conversation import Conversation, Exchange, Image, load, place_images, read_image, save
from infer.flags import add_model_flags, add_sampling_flags, load_engine, sampling_of
from infer.generate import BUNDLED, QUESTION, TRAINED_ON, use_bundled
from infer.line_input import LineInput, bold, history_file, interrupts
from infer.sampling import Sampling
from llava_jax.console import (
    MAX_INT32,
    InputError,
    Parser,
    note,
    plural,
    ranges,
    run_main,
    shorten,
    shorten_words,
    terminal_safe,
)
from llava_jax.data.templates import IMAGE_TOKEN, get_template


def parser() -> argparse.ArgumentParser:
    p = Parser(prog="python -m infer.chat", description="Talk with a model about images. /help lists the commands.")
    add_model_flags(p, default=f"the bundled model, trained on {TRAINED_ON}")
    chat = p.add_argument_group("conversation")
    about = "an image for the first question: a path, or an http(s), data: or file: URL; repeatable"
    chat.add_argument("--image", action="append", default=[], metavar="FILE", help=about)
    chat.add_argument("--system", metavar="TEXT", help="a system message instead of the template's")
    chat.add_argument("--no-history", action="store_true", help="neither read nor keep the lines that are typed")
    how = p.add_argument_group("answers")
    add_sampling_flags(how, logprobs=False)
    return p


def main() -> int:
    args = parser().parse_args()
    if args.template:
        get_template(args.template)  # fail on an unknown name before slow imports
    sampling = sampling_of(args)
    images = tuple(map(read_image, args.image))  # and on an invalid image
    if args.checkpoint is None:
        use_bundled(args)
        note(f"try: /image {shlex.quote(str(BUNDLED / 'example.png'))}, then: {QUESTION}")
    lines = LineInput(list(COMMANDS), TAKE_FILES, history=None if args.no_history else history_file())
    chat = Chat(load_engine(args), sampling, lines, args.system or None, images)
    if lines.interactive:
        note("/help lists the commands; Ctrl-D leaves")
    try:
        return converse(chat, lines)
    except KeyboardInterrupt:
        if not lines.interactive:
            raise
        return 0  # again, before the prompt was there


def converse(chat: "Chat", lines: LineInput) -> int:
    """Read and answer until the input ends. Returns the exit status: 1 if input that nobody typed failed."""
    failed = interrupted = False
    while not chat.left:
        try:
            text = lines.read(chat.prompt())
            interrupted = False
            chat.reply(text)
        except EOFError:
            if lines.interactive:
                print()
            break
        except InputError as error:
            failed = True
            note("error: " + shorten_words(str(error)))
        except KeyboardInterrupt:
            if not lines.interactive:
                raise
            print()
            if interrupted:
                break
            interrupted = True
            note("press Ctrl-C again to leave, or /exit")
    return int(failed and not lines.interactive)


class Chat:
    """A conversation with an engine, and what a person has set for its next question.

    Attributes:
      conversation: the questions that were answered.
      waiting: images for the next question.
      sampling: how answers are sampled.
      left: whether `/exit` was given.
    """

    def __init__(
        self, engine, sampling: Sampling, lines: LineInput, system: str | None = None, waiting: tuple[Image, ...] = ()
    ):
        self.engine, self.sampling, self.lines = engine, sampling, lines
        self.conversation, self.waiting = Conversation(system=system), waiting
        self.left = False
        self._retries = 0  # of the last question
        self._last: _Generated | None = None

    def prompt(self) -> str:
        images = f"[{plural(len(self.waiting), 'image')}] " if self.waiting else ""
        return bold(f"{images}> ")

    def reply(self, text: str) -> None:
        """Answer a question, or carry out a command.

        Raises:
          InputError: that is not possible; the conversation is unchanged.
        """
        if not text.strip():
            return
        if not text.startswith("/") or text.startswith("//"):
            self._retries = 0
            self._ask(text.removeprefix("/"), self.conversation, self.waiting)
            return
        name, _, argument = text.partition(" ")
        if name not in COMMANDS:
            raise InputError(
                f"unknown command {shorten(name, 40)}; /help lists them, and // begins a question with a slash"
            )
        COMMANDS[name].run(self, argument.strip())

    # ------------------------------------------------------------ questions

    def _ask(self, text: str, before: Conversation, images: tuple[Image, ...]) -> None:
        """Ask a question after a conversation, and keep both if there is an answer."""
        question = place_images(text, images)
        asked = before.add(Exchange(question, images))
        sampling = dataclasses.replace(self.sampling, seed=(self.sampling.seed + self._retries) % (MAX_INT32 + 1))
        generated = self._generate(asked, sampling)
        if generated.answer is None and not generated.text:
            note("stopped before the answer began")
            return
        if IMAGE_TOKEN in generated.text:
            note(f"warning: the answer's {IMAGE_TOKEN} is left out of the conversation: it stands for an image there")
        answer = generated.text.replace(IMAGE_TOKEN, "")
        self.conversation, self.waiting = before.add(Exchange(question, images, answer)), ()
        self._last = generated
        if generated.answer is None:
            note("stopped; the answer so far is kept, /retry asks again")
        elif generated.answer.stopped_by == "length":
            count = plural(len(generated.answer.token_ids), "token")
            note(f"the answer ends after {count}; /set max-new-tokens N allows more")

    def _generate(self, conversation: Conversation, sampling: Sampling) -> "_Generated":
        """Generate the answer to the last question, and print it as it comes. Ctrl-C stops it."""
        generated = _Generated(time.perf_counter())
        with interrupts(self.lines.interactive) as stopped:
            stream = self.engine.stream(
                conversation.turns[:-1],
                [image.file for image in conversation.images],
                system=conversation.system,
                **dataclasses.asdict(sampling),
            )
            with contextlib.closing(stream):
                for piece in stream:
                    generated.add(piece)
                    if isinstance(piece, str):
                        print(terminal_safe(piece), end="", flush=True)
                    if stopped():
                        break
        if generated.text or generated.answer is not None:
            print(flush=True)
        return generated

    # ------------------------------------------------------------ commands

    def add_images(self, argument: str) -> None:
        self.waiting += tuple(read_image(name) for name in split(argument, "/image FILE..."))

    def list_images(self, argument: str) -> None:
        for number, exchange in enumerate(self.conversation.exchanges, 1):
            for image in exchange.images:
                note(f"question {number}: {shorten(image.name)}")
        for image in self.waiting:
            note(f"next question: {shorten(image.name)}")
        if not self.waiting and not self.conversation.images:
            note("no images")

    def drop_images(self, argument: str) -> None:
        self.waiting = ()

    def clear(self, argument: str) -> None:
        self.conversation, self.waiting = Conversation(system=self.conversation.system), ()
        self._retries, self._last = 0, None

    def set_system(self, argument: str) -> None:
        if argument:
            system = None if argument in ('""', "''") else argument
            self.conversation = dataclasses.replace(self.conversation, system=system)
        note(f"system message: {self.conversation.system or 'the one of the template'}")

    def save(self, argument: str) -> None:
        path = one_file(argument, "/save FILE")
        if not self.conversation.exchanges:
            raise InputError("nothing to save: no question has been answered")
        if os.path.lexists(path):
            if not self.lines.interactive:
                raise InputError(f"{shorten(path)}: exists; give another file")
            if self.lines.read(f"{shorten(path)} exists. Replace it? [y/N] ").strip().lower() not in ("y", "yes"):
                raise InputError(f"{shorten(path)}: not replaced")
        save(self.conversation, path)
        note(f"saved {plural(len(self.conversation.exchanges), 'question')} to {shorten(path)}")

    def load(self, argument: str) -> None:
        self.conversation, self.waiting = load(one_file(argument, "/load FILE")), ()
        self._retries, self._last = 0, None
        questions, images = plural(len(self.conversation.exchanges), "question"), len(self.conversation.images)
        note(f"loaded {questions} with {plural(images, 'image')}")

    def retry(self, argument: str) -> None:
        if not self.conversation.exchanges:
            raise InputError("no question has been asked")
        if not self.sampling.temperature:
            note("greedy answers repeat; /set temperature 0.7 varies them")
        last = self.conversation.exchanges[-1]
        self._retries += 1
        waiting = self.waiting
        self._ask(last.question, self.conversation.without_last(), last.images)
        self.waiting = waiting

    def set_sampling(self, argument: str) -> None:
        name, _, value = argument.partition(" ")
        if value:
            self.sampling = changed(self.sampling, name, value.strip())
        elif name:
            raise InputError("usage: /set NAME VALUE, such as /set temperature 0.7; /set shows all")
        note(", ".join(f"{name} {getattr(self.sampling, name)}" for name in SETTABLE))

    def show_statistics(self, argument: str) -> None:
        if self._last is None:
            note("no answer yet")
            return
        for line in self._last.lines():
            note(line)
        questions, images = plural(len(self.conversation.exchanges), "question"), len(self.conversation.images)
        note(f"conversation: {questions}, {plural(images, 'image')}; the context has {self.engine.context:,} positions")

    def show_help(self, argument: str) -> None:
        for name, command in COMMANDS.items():
            note(f"{f'{name} {command.arguments}':<18} {command.about}")
        note("//text             ask a question that begins with a slash")
        note('A line that ends in a backslash goes on in the next; """ begins and ends a text of several lines.')
        note("Ctrl-C stops an answer; Ctrl-D leaves.")

    def leave(self, argument: str) -> None:
        self.left = True


@dataclasses.dataclass(frozen=True)
class Command:
    run: Callable[[Chat, str], None]  # is passed what follows the command's name
    arguments: str
    about: str


COMMANDS = {
    "/image": Command(Chat.add_images, "FILE...", "add images to the next question"),
    "/images": Command(Chat.list_images, "", "list the images"),
    "/drop": Command(Chat.drop_images, "", "drop the images of the next question"),
    "/clear": Command(Chat.clear, "", "begin a new conversation"),
    "/system": Command(Chat.set_system, "[TEXT]", 'replace the system message; "" restores the template\'s'),
    "/retry": Command(Chat.retry, "", "ask the last question again, with the next seed"),
    "/set": Command(Chat.set_sampling, "[NAME VALUE]", "change how answers are sampled"),
    "/stats": Command(Chat.show_statistics, "", "lengths and times of the last answer"),
    "/save": Command(Chat.save, "FILE", "write the conversation to a data file"),
    "/load": Command(Chat.load, "FILE", "continue the conversation of a data file"),
    "/help": Command(Chat.show_help, "", "list the commands"),
    "/exit": Command(Chat.leave, "", "leave"),
}
TAKE_FILES = {"/image", "/save", "/load"}
SETTABLE = [name for name in ranges(Sampling) if name != "top_logprobs"]  # which no command shows


def split(argument: str, usage: str) -> list[str]:
    """The words of a command line, quoted or escaped as in a shell.

    Raises:
      InputError: there are none, or a quote does not end.
    """
    try:
        words = shlex.split(argument)
    except ValueError as error:
        raise InputError(f"{str(error).lower()} in {shorten(argument)}; escape quotes with a backslash") from None
    if not words:
        raise InputError(f"usage: {usage}")
    return words


def one_file(argument: str, usage: str) -> str:
    words = split(argument, usage)
    if len(words) > 1:
        raise InputError(f"{len(words)} files; usage: {usage} (quote a name with spaces)")
    return os.path.expanduser(words[0])


def changed(sampling: Sampling, name: str, value: str) -> Sampling:
    """Sampling options with one changed, from its name as a field or a flag.

    Raises:
      InputError: the name is unknown, or the value is out of range.
    """
    field = name.replace("-", "_").strip("_")
    if field not in SETTABLE:
        raise InputError(f"unknown option {shorten(name, 40)!r}; known: {', '.join(SETTABLE)}")
    try:
        changes: dict[str, Any] = {field: ranges(Sampling)[field](value)}
        return dataclasses.replace(sampling, **changes)
    except argparse.ArgumentTypeError as error:
        raise InputError(f"{field} {error}") from None


# ---------------------------------------------------------------- an answer


@dataclasses.dataclass
class _Generated:
    """What has been generated of an answer, and when."""

    start: float
    text: str = ""
    answer: Any = None  # an `Answer`; None if it was stopped
    first: float | None = None  # seconds until the first text
    seconds: float = 0.0

    def add(self, piece: Any) -> None:
        self.seconds = time.perf_counter() - self.start
        if isinstance(piece, str):
            self.first = self.first or self.seconds
            self.text += piece
        else:
            self.answer = piece

    def lines(self) -> Iterator[str]:
        first = "" if self.first is None else f"first text after {self.first:.2f} s, "
        if self.answer is None:
            yield f"the answer was stopped: {first}all after {self.seconds:.2f} s"
            return
        answer = self.answer
        yield (
            f"prompt: {plural(answer.prompt_tokens, 'position')}, {answer.image_tokens:,} of images; "
            f"{answer.cached_tokens:,} were reused from an earlier prompt"
        )
        how = {"end": "its end token", "stop": "a stop string", "length": "the limit"}.get(answer.stopped_by, "")
        yield (
            f"answer: {plural(len(answer.token_ids), 'token')}, ended by {how}; {first}all after {self.seconds:.2f} s, "
            f"decoding {answer.decode_tokens_per_second:.1f} tokens/s"
        )


def run() -> None:
    """The command `llava-chat`."""
    run_main(main)


if __name__ == "__main__":
    run()
