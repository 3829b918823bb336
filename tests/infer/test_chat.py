"""`python -m infer.chat`: a conversation from a pipe, its commands and files. `test_chat_terminal.py` types it."""

import io
import json
import signal
import types
from pathlib import Path

import pytest

from helpers import GOLDEN, golden_engine
from infer import chat, conversation
from infer.benchmarks.conversations import read_questions
from llava_jax.data import urls

A, B = GOLDEN / "images/0_64x48.png", GOLDEN / "images/3_90x30.png"
CHECKPOINT = "v1.6-mistral"


class Watched:
    """An engine that records what it is asked; a scripted one where no model is needed."""

    def __init__(self, answers=None):
        self.answers, self.asked, self.context = answers, [], 512

    def stream(self, turns, images, **options):
        self.asked.append((list(turns), [bytes(image) for image in images], options))
        if self.answers is None:
            yield from golden_engine(CHECKPOINT).stream(turns, images, **options)
            return
        for piece in self.answers.pop(0):
            if isinstance(piece, Exception):
                raise piece
            if piece is None:
                signal.raise_signal(signal.SIGINT)  # as Ctrl-C does
            else:
                yield piece
        yield types.SimpleNamespace(
            prompt_tokens=2000, image_tokens=1900, cached_tokens=1500, token_ids=[1, 2], decode_tokens_per_second=5.0,
            stopped_by="end",
        )  # fmt: skip


@pytest.fixture
def talk(run_cli, monkeypatch):
    """Run the command with lines on standard input: (engine, status, answers, notes)."""

    def run(*lines, flags=(), engine=None):
        engine = engine or Watched([[f"answer {n}"] for n in range(9)])
        monkeypatch.setattr(chat, "load_engine", lambda args: engine)
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        status, out, err = run_cli(chat.main, "--checkpoint", "DIR", *flags)
        return engine, status, out.splitlines(), err.splitlines()

    return run


def sent(engine):
    return [turns for turns, _, _ in engine.asked]


# ---------------------------------------------------------------- questions


def test_answers_are_those_of_the_engine(talk):
    """Standard output has the answers and nothing else; each image stays in the turn in which it was given."""
    flags = ("--image", A, "--max-new-tokens", "6", "--system", "Be brief.")
    engine, status, out, err = talk("What is it?", f"/image {B}", "And this?", "Why?", flags=flags, engine=Watched())
    assert status == 0 and err[:1] == ["the answer ends after 6 tokens; /set max-new-tokens N allows more"]
    turns, images = [], [A]
    model, options = golden_engine(CHECKPOINT), dict(system="Be brief.", max_new_tokens=6)
    for question in ("<image>\nWhat is it?", "<image>\nAnd this?", "Why?"):
        turns.append(question)
        turns.append(model.ask(turns, images, **options).text)
        images = [A, B]
    assert "\n".join(out) == "\n".join(turns[1::2])
    assert engine.asked[-1][0] == turns[:-1] and engine.asked[-1][1] == [A.read_bytes(), B.read_bytes()]


def test_images_go_where_the_question_has_them(talk):
    engine, status, _, err = talk(f"/image {A} {B}", "Is <image> like <image>?", "Or <image>?", "Thanks")
    assert sent(engine) == [["Is <image> like <image>?"], ["Is <image> like <image>?", "answer 0", "Thanks"]]
    assert err[-1] == "error: the question has 1 <image> for 0 images; give one for each image, or none"
    assert status == 1


@pytest.mark.parametrize(
    ("lines", "question"),
    [
        (["one\\", "two\\", "three"], "one\ntwo\nthree"),
        (["ends with two \\\\"], "ends with two \\\\"),
        (['"""', "one", "", "/help", '"""'], "one\n\n/help"),
        (['"""one', 'two"""'], "one\ntwo"),
        (['"""one"""'], "one"),
        (["", "  ", "//etc/hosts?"], "/etc/hosts?"),
        (["last\\"], "last\n"),
    ],
)
def test_texts_of_several_lines(talk, lines, question):
    engine, status, _, _ = talk(*lines)
    assert (sent(engine), status) == ([[question]], 0)


def test_errors_leave_the_conversation_usable(talk, tmp_path):
    """Each is one line; a failed question keeps its images."""
    (tmp_path / "no.png").write_text("none")
    lines = [
        f"/image {tmp_path / 'no.png'}", f"/image {A}", "hello " * 600, '/image "', "a\udcff", "What is it?", '"""', "x"
    ]  # fmt: skip
    engine, status, out, err = talk(*lines, flags=("--max-new-tokens", "2"), engine=Watched())
    errors = [line for line in err if line.startswith("error: ")]
    assert status == 1 and len(out) == 1
    for error, reason in zip(
        errors, ["not an image", "the prompt takes", "no closing quotation", "surrogate", "has no"], strict=True
    ):
        assert reason in error and len(error) < 250
    assert engine.asked[-1][:2] == (["<image>\nWhat is it?"], [A.read_bytes()])


def test_an_image_token_in_an_answer_is_left_out_of_what_follows(talk):
    engine, status, out, err = talk("a", "b", engine=Watched([["an <image> here"], ["x"]]))
    assert sent(engine)[-1] == ["a", "an  here", "b"] and out[0] == "an <image> here"
    assert "<image> is left out" in err[0] and status == 0


def test_images_are_read_once(talk, tmp_path, monkeypatch):
    """A file may change or vanish, and a URL is downloaded once."""
    file = tmp_path / "a b.png"
    file.write_bytes(A.read_bytes())
    downloads = []
    monkeypatch.setattr(urls, "_download", lambda url, guard: downloads.append(url) or B.read_bytes())
    image = chat.read_image(str(file))
    file.unlink()
    assert image.file == A.read_bytes() and image.name == str(file)
    engine, _, _, _ = talk("/image http://x/b.png", "a", "b", "c")
    assert downloads == ["http://x/b.png"] and [images for _, images, _ in engine.asked] == [[B.read_bytes()]] * 3


# ---------------------------------------------------------------- stopping


def watched_chat(monkeypatch, answers):
    """A conversation as at a terminal, without one."""
    lines = types.SimpleNamespace(interactive=True)
    return chat.Chat(Watched(answers), chat.Sampling(), lines)


def test_ctrl_c_keeps_the_answer_so_far(monkeypatch, capsys):
    talk = watched_chat(monkeypatch, [["one ", None, "two ", "three"], ["x"]])
    before = signal.getsignal(signal.SIGINT)
    talk.reply("Count")
    assert signal.getsignal(signal.SIGINT) is before
    assert talk.conversation.turns == ["Count", "one two "]
    out, err = capsys.readouterr()
    assert out == "one two \n" and err.splitlines()[-1] == "stopped; the answer so far is kept, /retry asks again"
    talk.reply("/stats")
    assert capsys.readouterr().err.startswith("the answer was stopped: first text after ")
    talk.reply("/retry")
    assert talk.conversation.turns == ["Count", "x"]


def test_ctrl_c_before_the_answer_keeps_the_question_out(monkeypatch, capsys):
    talk = watched_chat(monkeypatch, [[None, "", "x"], [None, None]])
    talk.reply(f"/image {A}")
    talk.reply("Count")
    assert talk.conversation.turns == [] and len(talk.waiting) == 1
    with pytest.raises(SystemExit) as left:  # twice: the program ends
        talk.reply("Count")
    assert left.value.code == 130


# ---------------------------------------------------------------- commands


def test_unknown_commands_are_not_asked(talk):
    engine, status, out, err = talk("/imag a.png", "/home/me/a.png what is this?", "/")
    assert (engine.asked, status, out) == ([], 1, [])
    assert err[0] == "error: unknown command /imag; /help lists them, and // begins a question with a slash"
    assert len(err) == 3


def test_help_lists_every_command(talk):
    _, status, out, err = talk("/help", "/exit", "not asked")
    assert (status, out) == (0, [])
    assert {line.split()[0] for line in err if line.startswith("/")} == {*chat.COMMANDS, "//text"}


def test_system_clear_and_images(talk):
    lines = ["/system", "/system Be brief.", f"/image {A}", "/images", "/drop", "/images", "a", "/clear", "b"]
    engine, _, _, err = talk(*lines, '/system ""', "/stats", "c")
    assert err[:5] == [
        "system message: the one of the template", "system message: Be brief.", f"next question: {A}", "no images",
        "system message: the one of the template",
    ]  # fmt: skip
    assert [(turns, options["system"]) for turns, _, options in engine.asked] == [
        (["a"], "Be brief."), (["b"], "Be brief."), (["b", "answer 1", "c"], None),
    ]  # fmt: skip


def test_sampling_is_changed_by_name(talk):
    lines = [
        "/set temperature 0.7",
        "a",
        "/set top-k 5",
        "b",
        "/set temperature 9999",
        "/set colour 1",
        "/set seed",
        "c",
    ]
    engine, status, _, err = talk(*lines, flags=("--seed", "3"))
    assert [(o["temperature"], o["top_k"], o["seed"]) for _, _, o in engine.asked] == [
        (0.7, 0, 3), (0.7, 5, 3), (0.7, 5, 3)
    ]  # fmt: skip
    errors = [line for line in err if line.startswith("error")]
    assert [("0 to 1000" in e, "unknown option" in e, "usage" in e).index(True) for e in errors] == [0, 1, 2]
    assert status == 1


def test_retry_asks_again_with_the_next_seed(talk):
    lines = ["a", "b", "/set temperature 1", "/retry", "/retry", "c", "/retry"]
    engine, _, _, err = talk("/retry", *lines)
    assert [options["seed"] for _, _, options in engine.asked] == [0, 0, 1, 2, 0, 1]
    assert sent(engine)[3] == ["a", "answer 0", "b"]
    assert sent(engine)[-1] == ["a", "answer 0", "b", "answer 3", "c"]
    assert err[0] == "error: no question has been asked"
    failing = Watched([["one"], [chat.InputError("broken")], ["two"]])
    engine, _, _, err = talk("a", f"/image {A}", "/retry", "b", engine=failing)
    assert sent(engine)[-1] == ["a", "one", "<image>\nb"]  # the first answer, and the image that waited
    assert "greedy answers repeat" in err[0]


def test_statistics(talk):
    _, _, _, err = talk("/stats", "a", f"/image {A}", "/stats")
    assert err[0] == "no answer yet"
    assert err[1] == "prompt: 2,000 positions, 1,900 of images; 1,500 were reused from an earlier prompt"
    assert err[2].startswith("answer: 2 tokens, ended by its end token; first text after ")
    assert err[3] == "conversation: 1 question, 0 images; the context has 512 positions"


# ---------------------------------------------------------------- files


def test_a_saved_conversation_can_be_evaluated_and_continued(talk, tmp_path):
    """It is a data file: what `infer.evaluate` would ask is what was asked."""
    file = tmp_path / "a chat.json"
    lines = [
        "/system Be brief.",
        f"/image {A}",
        "a",
        "b",
        f"/image {A} {B}",
        "1: <image> 2: <image>",
        f'/save "{file}"',
    ]
    engine, status, _, err = talk(*lines)
    assert (status, err[-1]) == (0, f"saved 3 questions to {file}")
    *_, last = read_questions(file, Path("/"))
    assert (list(last.turns), last.answer, last.system) == (engine.asked[-1][0], "answer 2", "Be brief.")
    assert last.images == (str(A), str(A), str(B))

    again, status, _, err = talk(f"/load {json.dumps(str(file))}", "/retry", "c")
    assert again.asked[0][:2] == engine.asked[-1][:2] and status == 0
    assert again.asked[1][0] == [*engine.asked[-1][0], "answer 0", "c"]
    assert err[0] == "loaded 3 questions with 3 images"


def test_nothing_is_overwritten_unasked(talk, tmp_path, monkeypatch, capsys):
    file = tmp_path / "a.json"
    file.write_text("precious")
    _, status, _, err = talk("/save", f"/save {file}", "a", f"/save {file}", f"/save {file} b")
    assert status == 1 and file.read_text() == "precious"
    assert [line.partition(": ")[2] for line in err] == [
        "usage: /save FILE", "nothing to save: no question has been answered", f"{file}: exists; give another file",
        "2 files; usage: /save FILE (quote a name with spaces)",
    ]  # fmt: skip
    there = watched_chat(monkeypatch, [["x"]])
    there.reply("a")
    for typed, kept in (("", True), ("n", True), ("y", False)):
        there.lines.read = lambda prompt, typed=typed: typed
        try:
            there.reply(f"/save {file}")
        except chat.InputError as error:
            assert kept and str(error).endswith("not replaced")
        assert (file.read_text() == "precious") is kept


def test_a_downloaded_image_is_saved_with_the_conversation(tmp_path):
    image = conversation.Image("https://x/a.png", urls.NamedBytes(A.read_bytes()))
    talk = conversation.Conversation((conversation.Exchange("<image>\na", (image,), "b"),))
    conversation.save(talk, tmp_path / "a.json")
    [loaded] = conversation.load(tmp_path / "a.json").images
    assert loaded.name.startswith("data:image/png;base64,") and loaded.file == A.read_bytes()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "not JSON"),
        ("[{}, {}]", "has 2 conversations; give a file with one"),
        ('{"conversations": [{"from": "human", "value": "a"}]}', "no answer"),
        ('{"image": "https://x/a.png", "conversations": [{"from": "human", "value": "<image>"}, '
         '{"from": "gpt", "value": "a"}]}', "images in data files are not downloaded"),
        ('{"image": "no.png", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "a"}]}',
         "no.png: cannot be read"),
    ],
)  # fmt: skip
def test_files_that_are_no_conversation(talk, tmp_path, text, reason):
    file = tmp_path / "a.json"
    file.write_text(text)
    engine, status, _, err = talk("a", f"/load {file}", "b")
    assert status == 1 and len(err) == 1 and reason in err[0] and str(file) in err[0]
    assert sent(engine)[-1] == ["a", "answer 0", "b"]


def test_files_without_image_tokens_have_their_images_in_front(tmp_path):
    file = tmp_path / "a.jsonl"
    row = {"images": [str(A), str(B)], "messages": [{"role": r, "content": c} for r, c in
                                                    [("user", "a"), ("assistant", "b"), ("user", "c")]]}  # fmt: skip
    file.write_text(json.dumps(row))
    loaded = conversation.load(file)
    assert loaded.turns == ["<image>\n<image>\na", "b"] and [i.name for i in loaded.images] == [str(A), str(B)]
