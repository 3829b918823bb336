"""MMBench: rotations, protocols, and the workbook to submit."""

import base64
import dataclasses
import io
import json
import math
from pathlib import Path

import pytest
from choice_miniatures import (
    COLUMNS,
    DAMAGE,
    answers_of,
    assert_named,
    image_bytes,
    mmbench_rows,
    write_tsv,
)
from openpyxl import load_workbook

from infer.benchmarks.benchmark import LMMS_EVAL, REFERENCE, Answer
from infer.benchmarks.mmbench import CIRCULAR, MMBench, MMBenchCN
from llava_jax.console import InputError
from llava_jax.data.images import open_image

GOLDEN = Path(__file__).parents[2] / "golden/evaluation/metrics.json"
# What is said of the rows in `mmbench_rows`: of questions 10 (4 rows), 11 (3), 12 (2) and 13 (1).
TEXTS = ["A", "D.", "(C)", "a red circle", "B", "A", "C", "A", "A", "B"]
RIGHT = [1, 1, 1, 1, 1, 1, 1, 1, 0, 1]


@pytest.fixture
def directory(tmp_path):
    return write_tsv(tmp_path / "mmbench" / MMBench.table.path, mmbench_rows())


@pytest.fixture
def unrotated(tmp_path):
    return write_tsv(tmp_path / "unrotated" / MMBench.table.path, mmbench_rows(rotations=False))


def test_questions_are_asked_as_the_reference_asks_them(directory):
    first, second, *_ = questions = MMBench().questions(directory, REFERENCE)
    assert [question.id for question in questions] == [
        10, 1000010, 2000010, 3000010, 11, 1000011, 2000011, 12, 1000012, 13,
    ]  # fmt: skip
    options = "A. a red circle\nB. a blue square\nC. a green triangle\nD. a yellow star"
    prompt = f'Read "this"\tfirst\nWhat is in image 0?\n{options}'
    suffix = "Answer with the option's letter from the given choices directly."
    assert (first.prompt, first.turns) == (prompt, (f"<image>\n{prompt}\n{suffix}",))
    assert (first.images, first.kind, first.answer) == ((image_bytes(0),), "shape", "A. a red circle")
    assert first.extra["options"] == ["a red circle", "a blue square", "a green triangle", "a yellow star"]
    assert (first.extra["round_id"], first.extra["option_char"]) == (0, ["A", "B", "C", "D"])
    assert second.prompt.endswith("C. a yellow star\nD. a red circle")
    assert second.answer == "D. a red circle"
    assert questions[4].prompt.startswith("What is in image 1?\nA. ")  # no hint


def test_chinese_questions_end_in_chinese(tmp_path):
    directory = write_tsv(tmp_path / MMBenchCN.table.path, mmbench_rows())
    question = MMBenchCN().questions(directory, REFERENCE)[0]
    assert question.turns[0].endswith("D. a yellow star\n请直接回答选项字母。")
    assert MMBenchCN.directory == "mmbench_cn"


def test_a_question_is_right_if_all_its_rotations_are(directory):
    score = MMBench().score(directory, answers_of(MMBench(), directory, TEXTS), REFERENCE)
    assert [mark.score for mark in score.marks] == RIGHT
    assert (score.value, score.unanswered) == (0.75, 0)
    assert score.totals == {"accuracy": 0.75, "accuracy of single rotations": 0.9}
    assert score.parts == {
        "perception": {"accuracy": 0.75, "questions": 4},
        "color": {"accuracy": 1.0, "questions": 2},
        "shape": {"accuracy": 0.5, "questions": 2},
    }
    assert score.stderr == pytest.approx(math.sqrt(0.75 * 0.25 / 4), abs=1e-12)
    assert [mark.group for mark in score.marks] == ["10"] * 4 + ["11"] * 3 + ["12"] * 2 + ["13"]
    assert score.marks[3].read == "B" and score.marks[3].answer == "B. a red circle"


def test_an_unanswered_rotation_makes_its_question_wrong(directory):
    answers = answers_of(MMBench(), directory, TEXTS)
    score = MMBench().score(directory, answers[:3] + answers[4:], REFERENCE)
    assert (score.value, score.unanswered, len(score.marks)) == (0.5, 1, 10)


def test_the_most_likely_letter_counts_for_lmms_eval(directory):
    texts = ["The one I see is A", *TEXTS[1:8], "I think B it is", "B"]
    answers = answers_of(MMBench(), directory, texts)
    assert MMBench().score(directory, answers, REFERENCE).value == 0.75  # "A" is an article in more than three words
    score = MMBench().score(directory, answers, LMMS_EVAL)
    assert (score.protocol, score.value, score.marks[0].read) == (LMMS_EVAL, 1.0, "A")


def test_all_rounds_ask_each_rotation(unrotated):
    questions = MMBench().questions(unrotated, CIRCULAR)
    assert [(question.id, question.extra["round_id"]) for question in questions] == [
        (10, 0), (10, 1), (10, 2), (10, 3), (11, 0), (11, 1), (11, 2), (12, 0), (12, 1), (13, 0), (13, 1),
    ]  # fmt: skip
    assert len({question.prompt for question in questions}) == 11
    second = questions[1]
    assert second.prompt.endswith("A. a blue square\nB. a green triangle\nC. a yellow star\nD. a red circle")
    assert second.extra["options"] == ["a blue square", "a green triangle", "a yellow star", "a red circle"]
    assert (second.extra["option_char"], second.answer) == (["B", "C", "D", "A"], "D. a red circle")
    right = [question.answer[0] for question in questions]
    assert right == ["A", "D", "C", "B", "B", "A", "C", "A", "B", "B", "A"]
    assert MMBench().score(unrotated, answers_of(MMBench(), unrotated, right, CIRCULAR), CIRCULAR).value == 1.0
    always = answers_of(MMBench(), unrotated, ["A"] * 11, CIRCULAR)
    score = MMBench().score(unrotated, always, CIRCULAR)
    assert (score.value, score.totals["accuracy of single rotations"]) == (0.0, 4 / 11)


def test_the_first_round_alone(unrotated):
    assert MMBench().score(unrotated, answers_of(MMBench(), unrotated, "ABAB"), REFERENCE).value == 1.0
    score = MMBench().score(unrotated, answers_of(MMBench(), unrotated, "ABAB"), CIRCULAR)
    assert (score.value, score.unanswered) == (0.0, 7)


def test_answers_of_all_rounds_need_their_protocol(unrotated):
    answers = answers_of(MMBench(), unrotated, ["A"] * 11, CIRCULAR)
    with pytest.raises(InputError, match="answers line 2: is of round 1; .* need --protocol circular"):
        MMBench().score(unrotated, answers, REFERENCE)


def test_golden_answers_mean_what_lmms_eval_reads(tmp_path):
    """Through the files of a user: the TSV without images, and answers with the keys of the reference."""
    golden = json.loads(GOLDEN.read_text())["mmbench"]
    rows = []
    for number, row in enumerate(golden):
        answer = row["option"] if row["option"] in row["choices"] else "A"
        rows.append(dict.fromkeys(COLUMNS, "") | row["choices"] | {"index": str(number), "question": "?"})
        rows[-1]["answer"] = answer
    columns = [name for name in COLUMNS if name not in ("image", "category", "l2-category", "hint")]
    directory = write_tsv(tmp_path / MMBench.table.path, rows, columns)
    answers = [Answer(number, "", row["answer"]) for number, row in enumerate(golden)]
    score = MMBench().score(directory, answers, REFERENCE)
    assert [mark.read for mark in score.marks] == [row["option"] or "" for row in golden]
    right = sum(row["option"] in row["choices"] for row in golden)
    assert (score.value, score.parts) == (right / 300, {"all": {"accuracy": right / 300, "questions": 300}})


# ---------------------------------------------------------------- the file to submit


def test_the_workbook_has_the_columns_of_the_reference(directory):
    texts = ["=A1", "it\x07 is D", *TEXTS[2:]]
    submission = MMBench().submission(directory, answers_of(MMBench(), directory, texts)[:-1])
    assert submission.name == "mmbench_dev_20230712.xlsx"
    book = load_workbook(io.BytesIO(submission.data))
    lines = [[cell.value for cell in line] for line in book["Sheet1"].iter_rows()]
    assert lines[0] == ["index", "question", "A", "B", "C", "D", "prediction", "answer", "split"]
    options = ["a red circle", "a blue square", "a green triangle", "a yellow star"]
    assert lines[1] == [10, "What is in image 0?", *options, "=A1", "A", "dev"]
    assert book["Sheet1"]["G2"].data_type == "s"  # not a formula
    assert lines[2][6] == "it is D"
    assert lines[9] == [1000012, "What is in image 2?", *options[1::-1], None, None, "A", "B", "dev"]
    assert lines[10][6] is None  # unanswered
    assert [line[0] for line in lines[1:]] == [int(row["index"]) for row in mmbench_rows()]


def test_of_several_rounds_the_first_is_submitted(unrotated):
    answers = answers_of(MMBench(), unrotated, "ABCDABCDABC", CIRCULAR)
    sheet = load_workbook(io.BytesIO(MMBench().submission(unrotated, answers).data))["Sheet1"]
    assert [cell.value for cell in sheet["G"]] == ["prediction", "A", "A", "D", "B"]


def test_without_right_answers_only_the_workbook_is_made(tmp_path):
    columns = [name for name in COLUMNS if name != "answer"]
    directory = write_tsv(tmp_path / MMBench.table.path, mmbench_rows(), columns)
    answers = answers_of(MMBench(), directory, TEXTS)
    with pytest.raises(InputError, match="tsv: has no column answer; its evaluation server has the answers"):
        MMBench().score(directory, answers, REFERENCE)
    assert MMBench().submission(directory, answers).data.startswith(b"PK")


# ---------------------------------------------------------------- malformed files


@pytest.mark.parametrize("damage", [name for name in DAMAGE if name != "an empty object"])
def test_damaged_files(directory, damage):
    reads = [lambda: MMBench().questions(directory, REFERENCE), lambda: MMBench().score(directory, [], REFERENCE)]
    assert_named(directory / MMBench.table.path, damage, *reads)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"index": "x"}, "line 3: index 'x' is not a number"),
        ({"index": "10"}, "line 3: index 10 is that of line 2 too"),
        ({"index": "-1"}, "line 3: index '-1' is not a number"),
        ({"index": "1000077"}, "line 3: index 1000077 is a rotation of question 77, which is missing"),
        ({"question": "nan"}, "line 3: has no question"),
        ({"answer": "E"}, "line 3: answer 'E' is not one of its options A, B, C, D"),
        ({"answer": ""}, "line 3: answer '' is not one of its options"),
        ({"B": "NA"}, "line 3: has options A, C, D, but no B"),
        ({"A": "", "B": "None", "C": "<NA>", "D": "NaN"}, "line 3: has no options"),
    ],
)
def test_rows_that_are_none(tmp_path, change, says):
    rows = mmbench_rows()
    rows[1] |= change
    directory = write_tsv(tmp_path / MMBench.table.path, rows)
    with pytest.raises(InputError, match=f"{MMBench.table.path} {says}"):
        MMBench().score(directory, [], REFERENCE)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("index\tquestion\tA\n", "has no column B; it should be a TSV of MMBench's"),
        ("index\tquestion\tA\tB\n", "has no questions"),
        ("index\tquestion\tA\tB\tA\n1\t?\ta\tb\tc\n", "has a column twice"),
        ("index\tquestion\tA\tB\n1\t?\ta\n", "line 2: has 3 columns, and the first line 4"),
        ('index\tquestion\tA\tB\n1\t?\ta\t"b\n', "line 2: not a TSV"),
        ('index\tquestion\tA\tB\n1\t"?"x\ta\tb\n', "line 2: not a TSV"),
    ],
)
def test_tables_that_are_none(tmp_path, text, says):
    (tmp_path / MMBench.table.path).write_text(text)
    with pytest.raises(InputError, match=f"{MMBench.table.path}:? {says}"):
        MMBench().questions(tmp_path, REFERENCE)


def test_an_image_that_is_none_is_a_problem_of_its_question(tmp_path):
    rows = mmbench_rows()
    rows[0]["image"], rows[1]["image"] = "", "%%%abcde"
    directory = write_tsv(tmp_path / MMBench.table.path, rows)
    first, second, *others = MMBench().questions(directory, REFERENCE)
    assert first.problem.endswith(f"{MMBench.table.path} line 2: has no image")
    assert f"{MMBench.table.path} line 3: image is not base64" in second.problem
    assert not any(question.problem for question in others)


def test_an_image_that_cannot_be_decoded_is_named_once(tmp_path):
    """The engine puts the name of the question before the error."""
    rows = mmbench_rows()
    rows[0]["image"] = base64.b64encode(b"hello").decode()
    first = MMBench().questions(write_tsv(tmp_path / MMBench.table.path, rows), REFERENCE)[0]
    with pytest.raises(InputError, match="^image: not an image in a supported format"):
        open_image(first.images[0])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"id": 77}, "answers line 1: the benchmark has no question 77"),
        ({"id": 11}, "answers line 1: options are not those of question 11 in round 0"),
        ({"extra": {"option_char": ["B", "A"]}}, "answers line 1: option_char are not those of question 10 in round 0"),
        ({"extra": {"options": 7}}, "answers line 1: options are not those"),
        ({"extra": {"round_id": 4}}, "answers line 1: question 10 has 4 options, and no round 4"),
        ({"extra": {"round_id": "0"}}, "answers line 1: question 10 has 4 options, and no round '0'"),
        ({"extra": {"round_id": True}}, "answers line 1: question 10 has 4 options, and no round True"),
    ],
)
def test_answers_that_belong_to_no_question(unrotated, change, says):
    answers = answers_of(MMBench(), unrotated, "ABAB")
    with pytest.raises(InputError) as error:
        MMBench().score(unrotated, [dataclasses.replace(answers[0], **change)], CIRCULAR)
    assert str(error.value).startswith(says)
    with pytest.raises(InputError, match="answers line 1: a second answer to question 10, which line 1 answers"):
        MMBench().score(unrotated, [answers[0], answers[0]], REFERENCE)


def test_a_file_with_a_byte_order_mark_and_crlf(directory):
    path = directory / MMBench.table.path
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    score = MMBench().score(directory, answers_of(MMBench(), directory, TEXTS), REFERENCE)
    assert score.value == 0.75
