"""JSON that is read: parsed with bounds, and checked against a declared type before anything else looks at it.

A type is a dataclass, a `TypedDict` or whatever else `msgspec` converts to, with `Annotated[int, Meta(ge=..., le=...)]`
for ranges. Keys that a `TypedDict` does not declare are allowed: files of others have many that are not read here.
"""

import json
import os
import re
import typing
from pathlib import Path
from typing import Any

import msgspec

from llava_jax.console import InputError, printable, shorten
from llava_jax.files import read_bytes

CONFIG_BYTES = 32 * 2**20  # of a file of settings, or of one that names every tensor
PARTS = 2**21  # objects and lists of a value, each of which takes 50 to 500 bytes of memory for 2 of the text
DEPTH = 100  # of them within one another
DIGITS = 100  # of an integer: real files have 10**30 for "no limit"

_HALF = re.compile(r"\\u[dD][89a-fA-F]")  # what half of a pair of \u escapes begins with, and a whole pair too
_NAMES = {
    "int": "an integer", "float": "a number", "str": "a string", "bool": "a boolean", "array": "a list",
    "object": "an object", "null": "null",
}  # fmt: skip


def read_json(path: Path, schema: Any = dict[str, Any], *, most: int = CONFIG_BYTES) -> Any:
    """The contents of a JSON file, as they stand there, once they are known to be of a type; None without such a file.

    Args:
      schema: a type whose objects are dictionaries: a `TypedDict`, or `dict[str, ...]`.
      most: bytes that a file of its kind can have.

    Raises:
      InputError: it cannot be read, is no JSON, or has something else than it should. Names the file and the key.
    """
    if not (path.exists() if "://" in os.fspath(path) else os.path.exists(path)):
        return None
    data = read_bytes(path, most)
    try:
        value = parse_json(data)
        if _HALF.search(data.decode()):
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise InputError(f"{shorten(path)}: text that is no Unicode: half a character in it") from None
    except InputError as error:
        raise InputError(f"{shorten(path)}: {error}") from None
    check_json(value, schema, shorten(path))
    return value


def parse_lines(data: bytes, schema: Any, where: str) -> list[Any]:
    """The values of a type that stand on a line each; empty lines are passed over.

    Args:
      where: what errors call the file.

    Raises:
      InputError: a line is no JSON, or something else. Names it.
    """
    values = []
    for number, line in enumerate(data.split(b"\n"), 1):
        if line.strip():
            try:
                values.append(parse_json(line))
            except InputError as error:
                raise InputError(f"{where} line {number}: {error}") from None
            check_json(values[-1], schema, f"{where} line {number}")
    return values


def parse_appended(data: bytes, schema: Any, where: str, start: str) -> tuple[list[Any], bytes]:
    """The values of a file that lines are appended to, and its lines without a last one that a killed process has left
    incomplete.

    Args:
      start: what each line starts with; by it an incomplete line is told from one of another file.

    Raises:
      InputError: as `parse_lines`.
    """
    last = data[data.rfind(b"\n") + 1 :]
    if last and (last.startswith(start.encode()) or start.encode().startswith(last)):
        try:
            parse_json(last)
        except InputError:
            data = data[: -len(last)]
    return parse_lines(data, schema, where), data + b"\n" * (data[-1:] not in (b"", b"\n"))


def parse_json(data: bytes | str, *, bounded: bool = True, unique: bool = False) -> Any:
    """The value that a text in JSON stands for. Numbers are finite; strings may have halves of characters in them.

    Args:
      bounded: refuse more than `PARTS` objects and lists, and `DEPTH` of them within one another.
      unique: refuse an object that has a key twice; else the last one counts.

    Raises:
      InputError: it is none. Says why, not where it comes from.
    """
    try:
        text = data if isinstance(data, str) else data.decode("utf-8-sig")
        if bounded and text.count("[") + text.count("{") > PARTS:
            raise InputError(f"more than {PARTS:,} objects and lists")
        value = (_UNIQUE if unique else _DECODER).decode(text)
    except UnicodeDecodeError as error:
        raise InputError(f"not UTF-8 (byte {error.start})") from None
    except RecursionError:
        raise InputError("not JSON (nested too deeply)") from None
    except ValueError as error:
        raise InputError(f"not JSON ({shorten(error)})") from None
    if bounded:
        _check_depth(value)
    return value


def check_json(value: Any, schema: Any, where: str) -> Any:
    """The parsed value converted to the type: `msgspec.convert` with errors for people.

    Args:
      where: what errors call it.

    Raises:
      InputError: it is something else. Names the key.
    """
    if typing.get_origin(schema) is dict and isinstance(value, dict):  # whose keys msgspec's errors leave out
        inner = typing.get_args(schema)[1]
        return value if inner is Any else {k: check_json(v, inner, f"{where}: {_shown(k)}") for k, v in value.items()}
    try:
        return msgspec.convert(value, schema)
    except msgspec.ValidationError as error:
        raise InputError(f"{where}: {_in_words(str(error))}") from None
    except UnicodeEncodeError:
        raise InputError(f"{where}: text that is no Unicode: half a character in it") from None


def _in_words(error: str) -> str:
    """Of "Expected `int | null`, got `str` - at `$.a[0].b`": "a[0].b: expected an integer or null, got a string"."""
    what, _, place = error.rpartition(" - at ") if " - at `" in error else (error, "", "")
    key = re.sub(r"`|^key in |\$\.?", "", place)
    if missing := re.fullmatch("Object missing required field `(.*)`", what):
        return f"{_shown(f'{key}.{missing[1]}'.strip('.'))} is missing"
    what = re.sub(r"`([a-z |]+)`", lambda found: _or([_NAMES.get(n, n) for n in found[1].split(" | ")]), what)
    what = re.sub(r"(?<=[<>]= )\d{5,}", lambda found: f"{int(found[0]):,}", what.replace("`", ""))
    return (f"{_shown(key)}: " if key else "") + what[:1].lower() + shorten(what[1:])


def _or(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"


def _shown(key: str) -> str:
    return printable(shorten(key, 80))


def _check_depth(value: Any) -> None:
    inner = [value]
    for _ in range(DEPTH):
        inner = [
            part
            for outer in inner
            for part in (outer.values() if isinstance(outer, dict) else outer if isinstance(outer, list) else ())
            if isinstance(part, dict | list)
        ]
        if not inner:
            return
    raise InputError(f"objects and lists nested more than {DEPTH} deep")


def _integer(digits: str) -> int:
    if len(digits) > DIGITS:
        raise ValueError(f"a number of {len(digits):,} digits")
    return int(digits)


def _number(digits: str) -> float:
    if abs(number := float(digits)) == float("inf"):
        raise ValueError(f"{shorten(digits, 20)} is too large a number")
    return number


def _no_number(name: str) -> float:
    raise ValueError(f"{name}, which JSON does not have")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError("a key twice")
    return found


_NUMBERS = dict(parse_constant=_no_number, parse_float=_number, parse_int=_integer)
_DECODER, _UNIQUE = json.JSONDecoder(**_NUMBERS), json.JSONDecoder(**_NUMBERS, object_pairs_hook=_object)
