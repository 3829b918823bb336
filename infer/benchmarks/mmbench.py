"""MMBench and MMBench-CN (dev), asked as the reference does (llava/eval/model_vqa_mmbench.py).

The TSV has each question several times, with its options rotated (`index` grows by a million), and a question is right
if all its rotations are. The official server has a language model read answers of which no option can be inferred. Here
three protocols do without:

    reference    each row once; an answer of which no option can be inferred counts as wrong
    circular     the same, but each row is asked with all rotations of its options, as the reference's `--all-rounds`
                 does: for a TSV without rotations
    lmms-eval    each row once; the most likely letter is searched for in such an answer (its "static" evaluation)
"""

import base64
import binascii
import io
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from infer.benchmarks.benchmark import (
    LMMS_EVAL,
    REFERENCE,
    Answer,
    Benchmark,
    File,
    Mark,
    Question,
    Score,
    Submission,
)
from infer.benchmarks.files import IMAGE_LINE, find, note_unanswered, published_numbers
from infer.benchmarks.mmbench_tsv import ROTATION, Row, read_table
from infer.benchmarks.options import CHOOSE, find_letter, infer_option
from llava_jax.console import InputError, plural, shorten

CIRCULAR = "circular"
DOWNLOADS = "https://download.openmmlab.com/mmclassification/datasets/mmbench"
NOT_SUBMITTED = ("hint", "category", "source", "image", "comment", "l2-category")
PREDICTION_COLUMN = 6

Key = tuple[int, int]  # index of the row, round


class MMBench(Benchmark):
    name = "mmbench"
    title = "MMBench (dev)"
    table = File("mmbench_dev_20230712.tsv", f"{DOWNLOADS}/mmbench_dev_20230712.tsv", "140 MB, images included")
    suffix = CHOOSE
    files: Sequence[File] = (table,)
    protocols = (REFERENCE, CIRCULAR, LMMS_EVAL)
    max_new_tokens = 1024
    published = published_numbers(64.3, 67.7, 66.1, 68.5, 67.4, 68.7, 70.0, 79.3)

    def questions(self, directory: Path, protocol: str) -> list[Question]:
        path = find(directory, self.table)
        questions = []
        for row in read_table(path).rows:
            name = f"{shorten(path)} line {row.line}"
            images, problem = _decode(row.image, name)
            for number in rounds_of(row, protocol):
                options, letters = _rotate(row, number)
                prompt = _prompt(row, options)
                extra = {"round_id": number, "options": options, "option_char": letters}
                turns = (IMAGE_LINE + prompt + self.suffix,)
                answer = _in_words(row, letters.index(row.answer), options) if row.answer else ""
                questions.append(
                    Question(
                        row.index, turns, prompt, images, row.category, answer, extra=extra, name=name, problem=problem
                    )
                )
        return questions

    def score(self, directory: Path, answers: Sequence[Answer], protocol: str) -> Score:
        path = find(directory, self.table)
        table = read_table(path)
        if not table.has_answers:
            raise InputError(f"{shorten(path)}: has no column answer; its evaluation server has the answers")
        rows = {row.index: row for row in table.rows}
        given = self._match(answers, rows, protocol)
        marks = [
            _mark(row, number, given.get((row.index, number)), protocol)
            for row in table.rows
            for number in rounds_of(row, protocol)
        ]
        by_group: dict[str, list[float]] = {}
        for mark in marks:
            by_group.setdefault(mark.group, []).append(mark.score)
        hits = {group: float(all(scores)) for group, scores in by_group.items()}
        share = statistics.fmean(hits.values())
        return Score(
            metric="accuracy",
            value=share,
            scale=100.0,
            protocol=protocol,
            totals={
                "accuracy": share,
                "accuracy of single rotations": statistics.fmean([mark.score for mark in marks]),
            },
            parts=_parts(rows, hits),
            marks=marks,
            unanswered=len(marks) - len(given),
            stderr=math.sqrt(share * (1 - share) / len(hits)),
            questions=len(hits),
        )

    def _match(self, answers: Sequence[Answer], rows: Mapping[int, Row], protocol: str) -> dict[Key, Answer]:
        """The answers by row and round.

        Raises:
          InputError: an answer belongs to no question, or to one that has an answer.
        """
        by_id = {str(index): row for index, row in rows.items()}
        found: dict[Key, Answer] = {}
        for answer in answers:
            where = f"answers line {answer.line}"
            row, number = by_id.get(str(answer.id)), answer.extra.get("round_id", 0)
            if row is None:
                raise InputError(f"{where}: the benchmark has no question {shorten(answer.id)}")
            if type(number) is not int or number not in rounds_of(row, CIRCULAR):
                n = plural(len(row.options), "option")
                raise InputError(f"{where}: question {answer.id} has {n}, and no round {shorten(repr(number))}")
            if number not in rounds_of(row, protocol):
                raise InputError(f"{where}: is of round {number}; answers of several rounds need --protocol {CIRCULAR}")
            for key, shown in zip(("options", "option_char"), _rotate(row, number), strict=True):
                there = answer.extra.get(key, shown)
                if not isinstance(there, list) or [*map(str, there)] != shown:
                    raise InputError(f"{where}: {key} are not those of question {answer.id} in round {number}")
            if (row.index, number) in found:
                first = found[row.index, number].line
                raise InputError(f"{where}: a second answer to question {answer.id}, which line {first} answers")
            found[row.index, number] = answer
        return found

    def submission(self, directory: Path, answers: Sequence[Answer]) -> Submission:
        """A workbook with the columns of scripts/convert_mmbench_for_submission.py; of several rounds, the first.

        Raises:
          InputError: openpyxl is not installed, or as `score`.
        """
        path = find(directory, self.table)
        table = read_table(path)
        given = self._match(answers, {row.index: row for row in table.rows}, CIRCULAR)
        note_unanswered(sum((row.index, 0) not in given for row in table.rows), len(table.rows))
        columns = [name for name in table.columns if name not in NOT_SUBMITTED]
        columns.insert(PREDICTION_COLUMN, "prediction")
        lines: list[list[Any]] = [columns]
        for row in table.rows:
            answer = given.get((row.index, 0))
            cells = row.cells | {"index": row.index, "prediction": answer.text if answer else None}
            lines.append([cells[name] for name in columns])
        return Submission(path.with_suffix(".xlsx").name, _workbook(lines))


class MMBenchCN(MMBench):
    name = "mmbench-cn"
    title = "MMBench-CN (dev)"
    directory = "mmbench_cn"
    table = File("mmbench_dev_cn_20231003.tsv", f"{DOWNLOADS}/mmbench_dev_cn_20231003.tsv", "140 MB, images included")
    suffix = "\n请直接回答选项字母。"
    files = (table,)
    published = published_numbers(58.3, 63.6, 58.9, 61.5, 60.6, 61.2, 64.4, 79.0)


# ---------------------------------------------------------------- a row


def rounds_of(row: Row, protocol: str) -> range:
    """The rounds in which a row is asked, each with its options rotated by one more."""
    return range(len(row.options) if protocol == CIRCULAR else 1)


def _rotate(row: Row, number: int) -> tuple[list[str], list[str]]:
    """The options in the order of a round, and their letters in the TSV."""
    options, letters = list(row.options.values()), list(row.options)
    return options[number:] + options[:number], letters[number:] + letters[:number]


def _prompt(row: Row, options: list[str]) -> str:
    lines = [row.hint, row.question] if row.hint else [row.question]
    return "\n".join(lines + [f"{letter}. {option}" for letter, option in zip(row.options, options, strict=True)])


def _in_words(row: Row, at: int, options: list[str]) -> str:
    """A displayed option."""
    return f"{[*row.options][at]}. {options[at]}"


def _decode(image: str | None, name: str) -> tuple[tuple[bytes, ...], str]:
    """The image of a row, and the `problem` of its questions if there is none."""
    try:
        data = base64.b64decode(image or "")
    except (binascii.Error, ValueError) as error:
        return (), f"{name}: image is not base64 ({error})"
    if not data:
        return (), f"{name}: has no image"
    return (data,), ""


def _mark(row: Row, number: int, answer: Answer | None, protocol: str) -> Mark:
    """The letter of an answer is one of those displayed, and stands for the option that the round shows there."""
    text = answer.text if answer else ""
    options, letters = _rotate(row, number)
    shown = dict(zip(row.options, options, strict=True))
    read = infer_option(text, shown)
    if protocol == LMMS_EVAL:
        read = read or find_letter(text, shown)
    right = letters.index(row.answer)
    return Mark(
        question=row.index,
        prompt=answer.prompt if answer else _prompt(row, options),
        text=text,
        score=float(read == [*row.options][right]),
        read=read or "",
        answer=_in_words(row, right, options),
        kind=row.category,
        group=str(row.index % ROTATION),
    )


def _parts(rows: Mapping[int, Row], hits: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Accuracies by l2-category, then by category."""
    parts: dict[str, dict[str, float]] = {}
    categories = {row.category for row in rows.values()}
    for column in ("l2_category", "category"):
        scores: dict[str, list[float]] = {}
        for group, hit in hits.items():
            name = getattr(rows[int(group)], column)
            if column == "l2_category" and name in categories:
                name += " (l2-category)"
            scores.setdefault(name, []).append(hit)
        parts |= {
            name: {"accuracy": statistics.fmean(some), "questions": len(some)} for name, some in sorted(scores.items())
        }
    parts.pop("", None)  # a TSV without the column
    return parts


# ---------------------------------------------------------------- the file to submit


def _workbook(lines: list[list[Any]]) -> bytes:
    """An .xlsx with one sheet. Text that begins with "=" stays text; control characters, which the format lacks, are
    left out."""
    try:
        from openpyxl import Workbook
        from openpyxl.cell import WriteOnlyCell
        from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE
    except ImportError:
        raise InputError("MMBench's file to submit needs openpyxl: pip install 'llava-jax[eval]'") from None
    book = Workbook(write_only=True)
    sheet = book.create_sheet("Sheet1")
    for line in lines:
        cells = []
        for value in line:
            cell = WriteOnlyCell(sheet, re.sub(ILLEGAL_CHARACTERS_RE, "", value) if isinstance(value, str) else value)
            if isinstance(value, str):
                cell.data_type = "s"
            cells.append(cell)
        sheet.append(cells)
    data = io.BytesIO()
    book.save(data)
    return data.getvalue()
