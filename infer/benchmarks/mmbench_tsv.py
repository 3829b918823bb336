"""MMBench's TSV files: a question a row, its image in base64, quoted and with missing values as pandas reads them."""

import csv
import dataclasses
import io
from collections.abc import Mapping
from pathlib import Path

from infer.benchmarks.files import MAX_BYTES
from llava_jax.console import InputError, first_line, shorten
from llava_jax.files import read_text

ROTATION = 1_000_000  # rotations of a question's options have its index, and so many more
OPTIONS = "ABCD"
NEEDED = ("index", "question", "A", "B")
# What pandas takes for a missing value, beside "nan" and "none" in any case, which the reference does.
MISSING = {
    "", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA",
    "NULL", "n/a", "null",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of the TSV.

    Attributes:
      line: on which it ends.
      options: letter -> text.
      answer: a letter of `options`; "" in a TSV without answers.
      image: in base64.
      cells: all columns but the image, None where a value is missing.
    """

    line: int
    index: int
    question: str
    hint: str | None
    options: dict[str, str]
    answer: str
    category: str
    l2_category: str
    image: str | None
    cells: dict[str, str | None]


@dataclasses.dataclass(frozen=True)
class Table:
    columns: list[str]
    rows: list[Row]

    @property
    def has_answers(self) -> bool:
        return "answer" in self.columns


def read_table(path: Path) -> Table:
    """Read a TSV.

    Raises:
      InputError: the file is missing, not a TSV of MMBench's, or a row is invalid.
    """
    name = shorten(path)
    lines = _split(read_text(path, MAX_BYTES), name)
    columns = lines[0][1] if lines else []
    if missing := [column for column in NEEDED if column not in columns]:
        raise InputError(f"{name}: has no column {missing[0]}; it should be a TSV of MMBench's")
    if len(set(columns)) < len(columns):
        raise InputError(f"{name}: has a column twice")
    rows: dict[int, Row] = {}
    for number, values in lines[1:]:
        where = f"{name} line {number}"
        if len(values) != len(columns):
            raise InputError(f"{where}: has {len(values)} columns, and the first line {len(columns)}")
        row = _row(dict(zip(columns, values, strict=True)), number, where)
        if row.index in rows:
            raise InputError(f"{where}: index {row.index} is that of line {rows[row.index].line} too")
        rows[row.index] = row
    if not rows:
        raise InputError(f"{name}: has no questions")
    for index, row in rows.items():
        if index % ROTATION not in rows:
            raise InputError(
                f"{name} line {row.line}: index {index} is a rotation of question {index % ROTATION}, which is missing"
            )
    return Table(columns, [*rows.values()])


def _split(text: str, name: str) -> list[tuple[int, list[str]]]:
    """The lines of a TSV that are not blank, and the number of their last line."""
    limit = csv.field_size_limit(MAX_BYTES)  # of the whole process; an image is longer than its default
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter="\t", strict=True)
        return [(reader.line_num, values) for values in reader if values]
    except csv.Error as error:
        raise InputError(f"{name} line {reader.line_num}: not a TSV ({first_line(error)})") from None
    finally:
        csv.field_size_limit(limit)


def _row(values: Mapping[str, str], line: int, where: str) -> Row:
    cells = {column: None if _is_missing(value) else value for column, value in values.items() if column != "image"}
    index, question = cells["index"] or "", cells["question"]
    if not (index.isascii() and index.isdigit() and len(index) <= 18):
        raise InputError(f"{where}: index {shorten(index)!r} is not a number")
    if question is None:
        raise InputError(f"{where}: has no question")
    options = {letter: text for letter in OPTIONS if (text := cells.get(letter)) is not None}
    if not options or [*options] != [*OPTIONS[: len(options)]]:
        missing = next(letter for letter in OPTIONS if letter not in options)
        has = f"has options {', '.join(options)}, but no {missing}" if options else "has no options"
        raise InputError(f"{where}: {has}")
    answer = cells.get("answer") or ""
    if "answer" in cells and answer not in options:
        raise InputError(f"{where}: answer {shorten(answer)!r} is not one of its options {', '.join(options)}")
    return Row(
        line=line,
        index=int(index),
        question=question,
        hint=cells.get("hint"),
        options=options,
        answer=answer,
        category=cells.get("category") or "all",
        l2_category=cells.get("l2-category") or cells.get("L2-category") or "",
        image=values.get("image"),
        cells=cells,
    )


def _is_missing(value: str) -> bool:
    return value in MISSING or value.lower() in ("nan", "none")
