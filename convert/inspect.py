"""Describe a checkpoint in any format, complete or not, from headers alone."""

import os
from pathlib import Path
from typing import Any

import numpy as np

from llava_jax.checkpoints import tensor_names
from llava_jax.checkpoints.config_json import has_vision_fields, is_original, read_config
from llava_jax.checkpoints.config_parts import read_tower
from llava_jax.checkpoints.directories import find_directory
from llava_jax.checkpoints.families import TOWERS
from llava_jax.checkpoints.orbax_files import open_ours
from llava_jax.checkpoints.sources import open_file, tensor_files
from llava_jax.config import LlavaConfig, tiny
from llava_jax.console import InputError, note, printable, shorten
from llava_jax.json_files import read_json

PARTS = ("vision", "projector", "newline", "decoder", "adapter", "other")
STANDALONE = ("adapter_model", "mm_projector", "non_lora_trainables")  # files beside a model, or by themselves


def inspect(where: str | os.PathLike) -> dict[str, Any]:
    """Describe a checkpoint from its headers.

    Returns:
      `dialect`, `config` (a description, or None if it is not a LLaVA configuration), `tensors` (list of `name`,
      `path`, `file`, `shape`, `dtype`, `bytes`, `part`), `parts` (part -> `tensors`, `parameters`, `bytes`).

    Raises:
      InputError: there is no checkpoint, or a file is invalid.
    """
    path = Path(where)
    if path.is_file():
        directory, fields, files = path.parent, None, [path]
    else:
        directory = find_directory(where)
        fields, files = read_json(directory / "config.json"), []
    if fields and fields.get("format") == "llava-jax":
        source = open_ours(directory)
        config: LlavaConfig | None
        dialect, config = "llava-jax", source.config
        rows = [
            _row(p, p, f"{t.file}/", t.shape, t.dtype)
            for tree in (source.tensors, source.unused)
            for p, t in tree.items()
        ]
    else:
        dialect, config = _read_fields(fields, directory)
        rows = []
        for file in files or _files(directory):
            opened = open_file(file)
            for name, (dtype, shape, *_) in opened.tensors.items():
                known = tensor_names.read_name(name, config or tiny())
                rows.append(_row(name, known and known[0], file.name, shape, dtype))
    parts: dict[str, dict[str, int]] = {}
    for row in rows:
        total = parts.setdefault(row["part"], {"tensors": 0, "parameters": 0, "bytes": 0})
        total["tensors"] += 1
        total["parameters"] += int(np.prod(row["shape"]))
        total["bytes"] += row["bytes"]
    return {
        "dialect": dialect,
        "config": config and describe(config),
        "tensors": rows,
        "parts": {part: parts[part] for part in PARTS if part in parts},
    }


def _files(directory: Path) -> list[Path]:
    standalone = sorted(
        file for file in directory.iterdir() if file.stem in STANDALONE and file.suffix in (".bin", ".safetensors")
    )
    try:
        return [*tensor_files(directory)[0], *standalone]
    except InputError:
        if standalone:
            return standalone
        raise


def _read_fields(fields: dict | None, directory: Path) -> tuple[str, LlavaConfig | None]:
    """Dialect and configuration; None if the configuration is not LLaVA's or is incomplete."""
    if fields is None:
        return "none", None
    if not is_original(fields):
        dialect = "transformers"
    elif has_vision_fields(fields):
        dialect = "original"
    else:
        return f"none ({shorten(fields.get('model_type', 'unknown model'))})", None
    tower = fields.get("mm_vision_tower") if dialect == "original" else None
    try:
        vision = read_tower(directory / tower) if isinstance(tower, str) and tower else None
        return dialect, read_config(fields, vision=vision, name=directory.name, file=directory / "config.json")
    except InputError as error:
        note(f"warning: {str(error).partition(': give ')[0]}")
        return dialect, None


def _row(name: str, path: str | None, file: str, shape: tuple[int, ...], dtype: np.dtype) -> dict[str, Any]:
    part = (path or "").split("/")[0]
    if part not in PARTS:
        part = "adapter" if ".lora_" in name else "other"
    nbytes = int(np.prod(shape)) * dtype.itemsize
    return {
        "name": name, "path": path, "file": file, "shape": list(shape), "dtype": str(dtype), "bytes": nbytes,
        "part": part,
    }  # fmt: skip


def describe(config: LlavaConfig) -> str:
    """Describe a configuration in one line."""
    text, vision = config.text, config.vision
    heads = f"{text.heads} heads" + (f" ({text.kv_heads} key/value heads)" if text.kv_heads != text.heads else "")
    grids = f", {len(config.grid_pinpoints)} grids" if config.grid_pinpoints else ""
    return (
        f"{text.family} decoder: {text.layers} layers, width {text.width}, feed-forward {text.ffn_width}, {heads}, "
        f"vocabulary {text.vocab_size}, context {text.max_positions}; "
        f"{TOWERS[vision.family].title} tower: {vision.layers} layers ({vision.layers_used} used), "
        f"width {vision.width}, {vision.image_size} px in patches of {vision.patch_size}; "
        f"projector {config.projector}; images {config.aspect_ratio}, merge {config.merge}{grids}"
    )


def table(found: dict[str, Any]) -> str:
    """Format the description."""
    rows = [
        (
            printable(row["path"] or row["name"]),
            "x".join(map(str, row["shape"])) or "()",
            row["dtype"],
            _size(row["bytes"]),
        )
        for row in found["tensors"]
    ]
    lines = _columns([("tensor", "shape", "dtype", "size"), *rows])
    parts = [
        (part, str(total["tensors"]), f"{total['parameters']:,}", _size(total["bytes"]))
        for part, total in found["parts"].items()
    ]
    whole = found["parts"].values()
    parts.append(
        ("all", str(sum(t["tensors"] for t in whole)), f"{sum(t['parameters'] for t in whole):,}",
         _size(sum(t["bytes"] for t in whole)))
    )  # fmt: skip
    lines += ["", *_columns([("part", "tensors", "parameters", "size"), *parts]), "", f"dialect: {found['dialect']}"]
    if found["config"]:
        lines += [part.strip() for part in found["config"].split(";")]
    return "\n".join(lines)


def _columns(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(n) for cell, n in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]


def _size(nbytes: float) -> str:
    for unit in ("B", "kB", "MB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} GB"
