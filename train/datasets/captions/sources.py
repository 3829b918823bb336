"""Read images' captions from the formats in which they are published.

    .json, .jsonl   {"image": ..., "caption": ...} each; `captions`, a list, makes a pair of each of its captions
    .json           COCO's captions_*.json
    .csv, .tsv      with a header, or without one as CC3M's: caption TAB url
    .tar            WebDataset's: KEY.jpg, and KEY.txt or KEY.json with the caption

`read_captions` streams: memory does not grow with the number of captions, except that JSON is read as a whole. What
cannot be used is returned as a `Skipped`, with the reason.
"""

import csv
import dataclasses
import itertools
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple, NotRequired, TypedDict

from llava_jax.console import InputError, Progress, first_line, shorten
from llava_jax.data.data_files import MAX_LINE, read_rows
from llava_jax.data.templates import IMAGE_TOKEN
from llava_jax.files import open_regular
from llava_jax.json_files import BYTE_ORDER_MARK, check_json, parse_json, read_json

SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".tar")
CAPTION_FIELDS = ("caption", "captions", "text")  # the first that is there
IMAGE_FIELDS = ("image", "file_name", "filename", "image_path", "path")
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
MAX_CAPTION = 10_000  # characters; a longer text is no caption
MAX_COCO_BYTES = 2**30
MAX_NAME = 1024  # bytes of an image's name
MAX_TAR_READ = 2**24  # bytes read from a tar at once: headers, captions
SHARD_ROWS = 10_000  # of img2dataset, by default

_NAME_FIELD = re.compile(r"\{(row|line|shard)(?::0?([1-9]))?\}")


class Member(NamedTuple):
    """The bytes of an image in a tar."""

    tar: str
    offset: int
    size: int


class Pair(NamedTuple):
    """An image and its caption."""

    where: str  # in the source, for messages
    id: str
    image: str  # its name relative to the image folder
    caption: str
    member: Member | None = None


class Skipped(NamedTuple):
    """A row of a source that is left out."""

    where: str
    image: str | None
    reason: str


@dataclasses.dataclass(frozen=True)
class Fields:
    """Where a source has images and captions.

    image, caption   a column or key; a number, counted from 0, for tables without a header; None for the usual ones
    image_name       the images' names, if the source does not have them: with {row}, counted from 0, {line}, counted
                     from 1, or {shard}, row // 10,000; {row:9} has nine digits
    """

    image: str | None = None
    caption: str | None = None
    image_name: str | None = None

    def __post_init__(self):
        """Raises:
        InputError: `image_name` has no or other fields, or the image is given twice.
        """
        if self.image_name is None:
            return
        if self.image is not None:
            raise InputError("--image-field and --image-name both say how images are called; give one")
        rest = _NAME_FIELD.sub("", self.image_name)
        if rest == self.image_name or "{" in rest or "}" in rest:
            raise InputError(
                f"--image-name {shorten(self.image_name)!r}: must have {{row}}, {{line}} or {{shard}}, and no other "
                "braces; {row:9} has nine digits"
            )

    def name_of(self, row: int) -> str:
        """The name of the image of a row, counted from 0, by `image_name`."""
        numbers = {"row": row, "line": row + 1, "shard": row // SHARD_ROWS}
        assert self.image_name is not None
        return _NAME_FIELD.sub(lambda found: f"{numbers[found[1]]:0{found[2] or 1}}", self.image_name)


def read_captions(path: str, fields: Fields, task: str = "reading") -> Iterator[Pair | Skipped]:
    """Read a source, with a progress bar whose name is `task` and the file's.

    Raises:
      InputError: the file cannot be read, has another format, or lacks a column.
    """
    suffix = os.path.splitext(path)[1].lower()
    if suffix not in SUFFIXES:
        raise InputError(f"{shorten(path)}: must end in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}")
    read = {".tar": _read_tar, ".csv": _read_table, ".tsv": _read_table}.get(suffix, _read_json)
    try:
        yield from read(path, fields, f"{task} {shorten(os.path.basename(path), 40)}")
    except (OSError, ValueError) as error:  # ValueError: an invalid file name
        raise InputError(f"{shorten(path)}: cannot be read ({first_line(error)})") from None


def _check_unused(path: str, kind: str, *given: str | None) -> None:
    if any(value is not None for value in given):
        raise InputError(f"{shorten(path)}: {kind} need no fields or names of images; convert it alone")


def _pair(where: str, image: Any, caption: Any, *, id: Any = None, member: Member | None = None) -> Pair | Skipped:
    """A pair, if an image's name and a caption are fit for training."""
    if not isinstance(image, str) or not image:
        return Skipped(where, None, "has no image")
    if not isinstance(caption, str) or not (caption := caption.strip()):
        return Skipped(where, image, "has no caption")
    if len(caption) > MAX_CAPTION:
        return Skipped(where, image, f"its caption has {len(caption):,} characters, more than {MAX_CAPTION:,}")
    if IMAGE_TOKEN in caption:
        return Skipped(where, image, f"its caption has an {IMAGE_TOKEN} token")
    id = str(id) if isinstance(id, str | int) and id != "" else os.path.splitext(image)[0]
    try:
        f"{id}{image}{caption}".encode()
    except UnicodeEncodeError:
        return Skipped(where, None, "its text is not valid Unicode")
    return Pair(where, id, image, caption, member)


# ---------------------------------------------------------------- JSON


def _read_json(path: str, fields: Fields, task: str) -> Iterator[Pair | Skipped]:
    if (coco := _read_coco(path)) is not None:
        _check_unused(path, "COCO's files", fields.image, fields.image_name, fields.caption)
        yield from _coco_pairs(path, coco, task)
        return
    rows = read_rows(path)
    with Progress(task, len(rows), "rows") as bar:
        for number, row in enumerate(rows):
            bar.advance()
            where = f"{shorten(path)} row {number}"
            if not isinstance(row, dict):
                yield Skipped(where, None, str(row) if isinstance(row, InputError) else "not a JSON object")
                continue
            image = fields.name_of(number) if fields.image_name else _get(row, fields.image, IMAGE_FIELDS)
            caption = _get(row, fields.caption, CAPTION_FIELDS)
            yield from _pairs_of(where, image, caption, row.get("id"))


def _get(row: dict[str, Any], field: str | None, usual: Sequence[str]) -> Any:
    if field is not None:
        return row.get(field)
    return next((row[name] for name in usual if name in row), None)


def _pairs_of(where: str, image: Any, caption: Any, id: Any) -> Iterator[Pair | Skipped]:
    """The pair of a caption, or the pairs of a list of captions, whose ids then end in their number."""
    if not isinstance(caption, list):
        yield _pair(where, image, caption, id=id)
        return
    for number, one in enumerate(caption or [None]):
        found = _pair(where, image, one, id=id)
        yield found._replace(id=f"{found.id}-{number}") if isinstance(found, Pair) else found


class CocoImage(TypedDict):
    id: int | str
    file_name: str


class CocoCaption(TypedDict):
    id: NotRequired[int | str]
    image_id: int | str
    caption: str


class Coco(TypedDict):
    """COCO's captions_*.json."""

    images: list[CocoImage]
    annotations: list[CocoCaption]


def _read_coco(path: str) -> dict[str, Any] | None:
    """The contents of one of COCO's files; None if it has rows."""
    with open_regular(path) as file:
        head = file.read(2**16).removeprefix(BYTE_ORDER_MARK).lstrip()
        if not head.startswith(b"{"):
            return None
        file.seek(0)
        line = file.readline(MAX_LINE + 1).removeprefix(BYTE_ORDER_MARK)
        if line.endswith(b"\n") and len(line) < os.fstat(file.fileno()).st_size and _is_json(line):
            return None
    value = read_json(Path(path), max_bytes=MAX_COCO_BYTES)
    if "annotations" not in value:
        return None
    return check_json(value, Coco, shorten(path))


def _is_json(line: bytes) -> bool:
    try:
        parse_json(line)
        return True
    except InputError:
        return False


def _coco_pairs(path: str, coco: dict[str, Any], task: str) -> Iterator[Pair | Skipped]:
    names = {image["id"]: image["file_name"] for image in coco["images"]}
    with Progress(task, len(coco["annotations"]), "captions") as bar:
        for number, annotation in enumerate(coco["annotations"]):
            bar.advance()
            where = f"{shorten(path)} annotation {number}"
            image = names.get(annotation["image_id"])
            if image is None:
                yield Skipped(where, None, f"images has no id {shorten(annotation['image_id'], 40)}")
                continue
            id = f"{os.path.splitext(image)[0]}-{annotation.get('id', number)}"
            yield _pair(where, image, annotation["caption"], id=id)


# ---------------------------------------------------------------- tables


def _read_table(path: str, fields: Fields, task: str) -> Iterator[Pair | Skipped]:
    """Tabs separate columns and nothing is quoted in .tsv, as in CC3M; .csv has commas and quotes."""
    with open_regular(path) as file, Progress(task, os.fstat(file.fileno()).st_size, "B") as bar:
        lines = _read_lines(file, path, bar)
        is_csv = path.lower().endswith(".csv")
        table = csv.reader(lines)
        records = iter(table) if is_csv else (line.rstrip("\r\n").split("\t") for line in lines)
        try:
            first = next(records, None)
            if first is None:
                raise InputError(f"{shorten(path)}: is empty")
            has_header, caption, image = _columns(first, fields, path)
            for row, record in enumerate(filter(None, itertools.chain([first] * (not has_header), records))):
                where = f"{shorten(path)} row {row}"
                if len(record) <= max(caption, image):
                    missing = f"has {len(record)} columns, too few for column {max(caption, image)} (counted from 0)"
                    yield Skipped(where, None, missing)
                    continue
                yield _pair(where, record[image] if image >= 0 else fields.name_of(row), record[caption])
        except csv.Error as error:
            raise InputError(f"{shorten(path)} line {table.line_num}: not CSV ({shorten(error)})") from None


def _read_lines(file: BinaryIO, path: str, bar: Progress) -> Iterator[str]:
    """The lines of a file; bytes that are not UTF-8 become lone surrogates, which `_pair` rejects."""
    number = 0
    while line := file.readline(MAX_LINE + 1):
        number += 1
        if len(line) > MAX_LINE:
            raise InputError(f"{shorten(path)}: line {number} has more than {MAX_LINE:,} bytes")
        bar.advance(len(line))
        yield (line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line).decode(errors="surrogateescape")


def _columns(first: list[str], fields: Fields, path: str) -> tuple[bool, int, int]:
    """Whether the first record is a header, and the columns of captions and images; -1 for images of `image_name`."""
    names = [name.strip().lower() for name in first]
    given = [field for field in (fields.caption, fields.image) if field is not None]
    numbers = [field for field in given if re.fullmatch("[0-9]{1,3}", field) and field not in names]
    has_header = len(numbers) < len(given) or (not given and any(name in names for name in CAPTION_FIELDS))
    if has_header and numbers:
        raise InputError("--caption-field and --image-field must be two names of a header, or two numbers")
    if not has_header:
        if fields.image is None and fields.image_name is None:
            raise InputError(
                f"{shorten(path)}: has no header, so that its images are unknown; --image-field gives the number of "
                "their column, or --image-name their names, such as GCC_train_{row:9}.jpg"
            )
        return False, int(fields.caption or 0), -1 if fields.image is None else int(fields.image)

    def column(field: str | None, usual: Sequence[str], flag: str) -> int:
        for name in usual if field is None else [field.strip().lower()]:
            if name in names:
                return names.index(name)
        wanted = shorten(field) if field is not None else " or ".join(usual)
        raise InputError(f"{shorten(path)}: its header has no {wanted}, but {shorten(', '.join(first))}; give {flag}")

    image = -1 if fields.image_name else column(fields.image, IMAGE_FIELDS, "--image-field or --image-name")
    return True, column(fields.caption, CAPTION_FIELDS, "--caption-field"), image


# ---------------------------------------------------------------- tars


class _BoundedFile:
    """A file for tarfile, which would read headers of any size into memory."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= MAX_TAR_READ:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        return self._file.read(size)


def _read_tar(path: str, fields: Fields, task: str) -> Iterator[Pair | Skipped]:
    _check_unused(path, "tars", fields.image, fields.image_name)
    with open_regular(path) as file, Progress(task, os.fstat(file.fileno()).st_size, "B") as bar:
        try:
            with tarfile.open(fileobj=_BoundedFile(file), mode="r:") as tar:  # type: ignore[call-overload]
                for key, group in itertools.groupby(_members(tar, bar), key=lambda member: _split(member.name)[0]):
                    yield _tar_pair(path, tar, key, {_split(one.name)[1]: one for one in group}, fields)
        except (tarfile.TarError, EOFError, OverflowError, UnicodeError) as error:
            raise InputError(f"{shorten(path)}: a damaged tar, or none ({first_line(error)})") from None


def _members(tar: tarfile.TarFile, bar: Progress) -> Iterator[tarfile.TarInfo]:
    """The regular files of a tar; it keeps none of them in memory."""
    while member := tar.next():
        tar.members.clear()  # type: ignore[attr-defined]
        bar.advance(tar.offset - int(bar.n))
        if member.isreg() and not member.issparse():
            yield member
    tar.fileobj.seek(tar.offset)  # tarfile takes any damaged header after the first for the end
    if tar.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):
        raise tarfile.ReadError(f"no header at byte {tar.offset:,}")


def _split(name: str) -> tuple[str, str]:
    """WebDataset's key of a file, up to the first dot of its name, and its extension in lower case."""
    folder, slash, file = name.rpartition("/")
    stem, _, extension = file.partition(".")
    return folder + slash + stem, extension.lower()


def _tar_pair(
    path: str, tar: tarfile.TarFile, key: str, files: dict[str, tarfile.TarInfo], fields: Fields
) -> Pair | Skipped:
    where = f"{shorten(path)} {shorten(key)}"
    image = next((files[suffix] for suffix in IMAGE_SUFFIXES if suffix in files), None)
    if image is None:
        return Skipped(where, None, f"has no image ({', '.join(IMAGE_SUFFIXES)})")
    name = f"{PurePosixPath(path).stem}/{key.removeprefix('./')}.{_split(image.name)[1]}"
    parts = name.split("/")
    is_long = len(os.fsencode(name)) > MAX_NAME or any(len(os.fsencode(part)) > 255 for part in parts)
    if is_long or any(part in ("", "..") for part in parts) or "\0" in name:
        return Skipped(where, None, "its name is not one of a file in the image folder")
    caption: Any = None
    if "txt" in files and fields.caption is None:
        caption = _read_member(tar, files["txt"]).decode(errors="surrogateescape")
    elif "json" in files:
        try:
            caption = _get(
                check_json(parse_json(_read_member(tar, files["json"])), dict, "a"), fields.caption, CAPTION_FIELDS
            )
        except InputError as error:
            return Skipped(where, name, f"{shorten(files['json'].name)}: {error}")
    return _pair(where, name, caption, member=Member(path, image.offset_data, image.size))


def _read_member(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    """A small file of a tar."""
    if member.size > MAX_TAR_READ:
        raise tarfile.ReadError(f"{shorten(member.name)} has {member.size:,} bytes")
    file = tar.extractfile(member)
    assert file is not None
    with file:
        return file.read()
