"""Files of answers: appended to behind what is whole, and nothing else written over."""

import json
import os

import pytest

from helpers import files_of_at_most, put_file
from infer.answers import AnswersFile, key_of
from llava_jax.console import InputError

ANSWER = {"question_id": 1, "prompt": "a", "text": "b", "answer_id": "0", "model_id": "m", "metadata": {}}
LINE = json.dumps(ANSWER)


@pytest.mark.parametrize(
    ("before", "after"),
    {
        "nothing": ("", ""),
        "whole": (LINE + "\n", LINE + "\n"),
        "blank lines": (LINE + "\n\n", LINE + "\n\n"),
        "whole, without its end": (LINE, LINE + "\n"),
        "cut in a text": (LINE + "\n" + LINE[:40], LINE + "\n"),
        "cut in the first id": ('{"question_id": "1', ""),
        "cut before the prompt": ('{"question_id": 12, "pr', ""),
        "cut in a character": (
            (LINE + "\n" + LINE[:40] + "猫").encode()[:-1].decode(errors="surrogateescape"),
            LINE + "\n",
        ),
        "cut at once": (LINE + "\n{", LINE + "\n"),
        "cut, by another writer": (LINE + "\n" + '{"question_id": 1, "text": "a', LINE + "\n"),
    }.values(),
)
def test_answers_go_behind_what_is_whole(tmp_path, before, after):
    file = tmp_path / "a.jsonl"
    file.write_text(before, errors="surrogateescape")
    with AnswersFile(file, tmp_path / "q") as answers:
        assert answers.answered.total() == after.count("\n") - after.count("\n\n")
        assert not after or answers.answered[key_of(1, "a")] == 1
    assert file.read_text(errors="surrogateescape") == before  # nothing was answered
    with AnswersFile(file, tmp_path / "q") as answers:
        answers.append(ANSWER)
        answers.append(ANSWER)
    assert file.read_text() == after + 2 * (LINE + "\n")


@pytest.mark.parametrize(
    "text",
    [
        "one line, no newline",
        '{"question_id": 1, "text": "a"}\n{"question_id": 2, "text": "b"}',
        '{"question_id": 1, "text": "a"}',
        '{"question_id": 1, "text": "a',
        '{"question_id":1,"prompt":"a',
        LINE + "\n" + '{"question_id": 1, "text": "a"}',
        LINE + "\nmine",
        LINE[:40] + "\n" + LINE,
        "[" * 99_999,
        "[]\n",
        '{"question_id": 1, "prompt": "a", "text": null}\n{}',
        "\x00" * 50,
        "\udcff\udc80\udcfe",  # these bytes
        '\udc80{"question\udcff',
        '{"question_id": 1, "prompt": "\udcffa',
    ],
)
def test_what_is_no_answers_file_is_left_alone(tmp_path, text):
    file = tmp_path / "a.jsonl"
    file.write_text(text, errors="surrogateescape")
    with pytest.raises(InputError, match="not an answers file"), AnswersFile(file, tmp_path / "q"):
        pass
    assert file.read_text(errors="surrogateescape") == text


@pytest.mark.parametrize("link", [os.link, os.symlink])
def test_the_questions_are_not_the_answers_under_another_name(tmp_path, link):
    put_file(tmp_path / "q", LINE)
    link(tmp_path / "q", tmp_path / "a")
    with pytest.raises(InputError, match="is the questions file"), AnswersFile(tmp_path / "a", tmp_path / "q"):
        pass
    assert (tmp_path / "q").read_text() == LINE


def test_answers_go_into_regular_files_that_can_be_written(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    put_file(tmp_path / "huge")
    os.truncate(tmp_path / "huge", 2**40)
    for path, says in (
        (tmp_path / "pipe", "a pipe, not a file"),
        (tmp_path, "a directory, not a file"),
        (tmp_path / "huge", "has 1,099,511,627,776 bytes"),
        ("/dev/full", "a device, not a file"),
        (f"/proc/self/fd/{os.pipe()[1]}", "a pipe, not a file"),
        (tmp_path / "no" / "a", "cannot be written"),
        (tmp_path / ("x" * 300), "cannot be written"),
        ("a\0b", "cannot be written"),
    ):
        with pytest.raises(InputError, match=says), AnswersFile(path, tmp_path / "q"):
            pass
    assert sorted(os.listdir(tmp_path)) == ["huge", "pipe"]


def test_one_command_holds_an_answers_file(tmp_path):
    with AnswersFile(tmp_path / "a", tmp_path / "q") as answers:
        with pytest.raises(InputError, match="in use by another command"), AnswersFile(tmp_path / "a", tmp_path / "q"):
            pass
        answers.append(ANSWER)
    with AnswersFile(tmp_path / "a", tmp_path / "q") as answers:
        assert answers.answered.total() == 1
    with AnswersFile(tmp_path / "b", tmp_path / "q"):
        pass
    assert os.listdir(tmp_path) == ["a"]  # where nothing was answered nothing is left


def test_a_line_that_a_full_disk_has_no_room_for_is_not_begun(tmp_path):
    with AnswersFile(tmp_path / "a", tmp_path / "q") as answers:
        answers.append(ANSWER)
        with files_of_at_most(len(LINE) + 20), pytest.raises(InputError, match="/a: cannot be written .File too large"):
            answers.append(ANSWER)
        answers.append(ANSWER)
    assert (tmp_path / "a").read_text() == 2 * (LINE + "\n")
