"""Read JSON: parse it within limits, and check it against a declared type before it is used.

A type is a dataclass, a `TypedDict` or anything else that `msgspec` converts to, with `Annotated[int, Meta(ge=...,
le=...)]` for ranges. Keys that a `TypedDict` does not declare are allowed, since foreign files have many that are
ignored here.
"""

import functools
import json
import os
import re
import typing
from pathlib import Path
from typing import Any

import msgspec

from llava_jax.console import InputError, printable, shorten
from llava_jax.files import read_bytes

MAX_CONFIG_BYTES = 32 * 2**20  # for settings, or a file that names every tensor
MAX_CONTAINERS = 2**21  # objects and lists; each takes 50 to 500 bytes of memory for 2 bytes of text
MAX_DEPTH = 100  # of nested objects and lists
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
MAX_DIFFERENCES = 140  # characters of a line that names differences
MAX_DIGITS = 100  # of an integer: real files have 10**30 for "no limit"

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # a \u escape of a surrogate, paired or not
_NAMES = {
    "int": "an integer", "float": "a number", "str": "a string", "bool": "a boolean", "array": "a list",
    "object": "an object", "null": "null",
}  # fmt: skip


def read_json(path: Path, schema: Any = dict[str, Any], *, max_bytes: int = MAX_CONFIG_BYTES) -> Any:
    """Read a JSON file and check its type; returns its contents unconverted, or None if the file is missing.

    Args:
      schema: a type whose objects are dictionaries: a `TypedDict`, or `dict[str, ...]`.
      max_bytes: the largest size of a file of this type.

    Raises:
      InputError: the file cannot be read, is not JSON, or has another type. Names the file and the key.
    """
    if not (path.exists() if "://" in os.fspath(path) else os.path.exists(path)):
        return None
    data = read_bytes(path, max_bytes)
    try:
        value = parse_json(data)
        if _SURROGATE.search(data.decode()):
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise InputError(f"{shorten(path)}: text with an unpaired Unicode surrogate") from None
    except InputError as error:
        raise InputError(f"{shorten(path)}: {error}") from None
    check_json(value, schema, shorten(path))
    return value


def parse_lines(data: bytes, schema: Any, where: str) -> list[Any]:
    """Parse JSON lines of a type, skipping empty lines.

    Args:
      where: the name of the file in errors.

    Raises:
      InputError: a line is not JSON, or has another type. Names the line.
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
    """Parse a file to which processes append JSON lines. Also returns its bytes without the incomplete last line of a
    killed process.

    Args:
      start: the beginning of each line, which distinguishes an incomplete line from another type of file.

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
    """Parse JSON. Numbers are finite; strings may have unpaired surrogates.

    Args:
      bounded: reject more than `MAX_CONTAINERS` objects and lists, or more than `MAX_DEPTH` nested ones.
      unique: reject duplicate keys of an object; otherwise the last one wins.

    Raises:
      InputError: the text is not valid JSON. Gives the reason, not the file.
    """
    try:
        text = data if isinstance(data, str) else data.decode("utf-8-sig")
        if bounded and text.count("[") + text.count("{") > MAX_CONTAINERS:
            raise InputError(f"more than {MAX_CONTAINERS:,} objects and lists")
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
    """Convert a parsed value to a type: `msgspec.convert` with readable errors.

    Args:
      where: the name of the value in errors.

    Raises:
      InputError: the value has another type. Names the key.
    """
    if typing.get_origin(schema) is dict and isinstance(value, dict):  # msgspec's errors omit these keys
        inner = typing.get_args(schema)[1]
        return value if inner is Any else {k: check_json(v, inner, f"{where}: {_shown(k)}") for k, v in value.items()}
    try:
        return msgspec.convert(value, schema)
    except msgspec.ValidationError as error:
        raise InputError(f"{where}: {_in_words(str(error))}") from None
    except UnicodeEncodeError:
        raise InputError(f"{where}: text with an unpaired Unicode surrogate") from None


def decode_json(data: bytes | memoryview, schema: Any, where: str) -> Any:
    """Parse JSON straight into a type, without values of undeclared keys: `msgspec.json.decode` with readable errors.

    For large files of known structure: it takes a fraction of the time and memory of `parse_json` and `check_json`.

    Args:
      schema: a `msgspec.Struct`, a list of them or the like.
      where: the name of the data in errors.

    Raises:
      InputError: the data is not JSON, or has another type. Names the key.
    """
    view = memoryview(data)
    try:
        return msgspec.json.decode(view[3:] if view[:3] == BYTE_ORDER_MARK else view, type=schema)
    except msgspec.ValidationError as error:
        raise InputError(f"{where}: {_in_words(str(error))}") from None
    except msgspec.DecodeError as error:
        raise InputError(f"{where}: not JSON ({shorten(error)})") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not UTF-8 (byte {error.start})") from None
    except RecursionError:
        raise InputError(f"{where}: not JSON (nested too deeply)") from None


def _in_words(error: str) -> str:
    """For "Expected `int | null`, got `str` - at `$.a[0].b`": "a[0].b: expected an integer or null, got a string"."""
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
    for _ in range(MAX_DEPTH):
        inner = [
            part
            for outer in inner
            for part in (outer.values() if isinstance(outer, dict) else outer if isinstance(outer, list) else ())
            if isinstance(part, dict | list)
        ]
        if not inner:
            return
    raise InputError(f"objects and lists nested more than {MAX_DEPTH} deep")


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
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


_decoder = functools.partial(json.JSONDecoder, parse_constant=_no_number, parse_float=_number, parse_int=_integer)
_DECODER, _UNIQUE = _decoder(), _decoder(object_pairs_hook=_object)


# ---------------------------------------------------------------- differences


def differences(there: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """Describe the values that differ, in JSON: "steps is 3 there and 4 here"."""
    return [
        f"{name} is {_format(there.get(name))} there and {_format(value)} here"
        for name, value in wanted.items()
        if there.get(name) != value
    ]


def difference(there: dict[str, Any], wanted: dict[str, Any]) -> str:
    """The same as a line that names some, and says how many more there are; "" if none differ."""
    named = found = differences(there, wanted)
    while len(named) > 1 and sum(map(len, named)) > MAX_DIFFERENCES:
        named = named[:-1]
    more = [f"{len(found) - len(named)} more"] * (len(found) > len(named))
    return "; ".join([*named, *more])


def _format(value: Any) -> str:
    if isinstance(value, str):
        return value[:12] + "..." if len(value) == 64 else shorten(json.dumps(value), 40)
    return shorten(json.dumps(value), 40)
