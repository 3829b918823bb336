"""JSON files that are read."""

import json
from pathlib import Path
from typing import Any

from llava_jax.console import InputError


def read_json(path: Path) -> dict[str, Any] | None:
    """The contents of a JSON file, None where there is no such file.

    Raises:
      InputError: the file is no JSON object.
    """
    if not path.exists():
        return None
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: no JSON object")
    return value
