"""Translate the names of tensors in foreign formats to our paths and layouts, and back.

A foreign name is a prefix, which depends on the dialect, and a name within a part of the model, which does not.
`read_name` accepts every known prefix, `write_name` writes those of one dialect. The tables of the families hold the
names within vision tower and decoder; no other code in the project contains a foreign name.

Layouts: our linear kernels are [in, out], foreign ones [out, in]; our patch convolution is HWIO, the foreign one
OIHW; all others are the same. We rotate halves as transformers does, so queries and keys are not permuted.
"""

import functools
import re
from collections.abc import Callable

import numpy as np

from llava_jax.checkpoints.families import DECODERS, TOWERS
from llava_jax.checkpoints.families.family import KEEP, LINEAR, Layout, linear
from llava_jax.config import LlavaConfig, projector_depth

# Names of the parts outside the families; {i} is a layer.
HEAD = ("lm_head.weight", "decoder/head/kernel", LINEAR)
PROJECTOR = linear("{i}", "projector/linear_{i}")
NEWLINE = ("image_newline", "newline", KEEP)

# Prefixes of each part; `write_name` uses the first two: the original's, transformers'.
TOWER_PREFIX = "model.vision_tower.vision_tower."
PREFIXES: dict[str, tuple[str, ...]] = {
    "decoder": ("model.", "language_model.model.", "model.language_model.", "language_model."),
    "head": ("", "language_model."),
    "vision": (TOWER_PREFIX, "vision_tower.", "model.vision_tower.", ""),
    "projector": ("model.mm_projector.", "multi_modal_projector.linear_", "model.multi_modal_projector.linear_",
                  "mm_projector."),
    "newline": ("model.", ""),
}  # fmt: skip
_DIALECT = {"original": 0, "transformers": 1}


def shape_after(layout: Callable[[np.ndarray], np.ndarray], shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape after one direction of a layout.

    Raises:
      ValueError: `shape` has too few or too many dimensions for the layout.
    """
    return layout(np.broadcast_to(np.False_, shape)).shape


class _Names:
    """Lookup tables of the names of a model with these families."""

    def __init__(self, decoder: str, tower: str):
        families = DECODERS[decoder], TOWERS[tower]
        inner = TOWERS[tower].inner
        tables = {"decoder": families[0].tensors, "head": (HEAD,), "vision": families[1].tensors,
                  "projector": PROJECTOR, "newline": (NEWLINE,)}  # fmt: skip
        rows = [(part, *row) for part, table in tables.items() for row in table]
        self.by_name = {(part, theirs): (ours, layout) for part, theirs, ours, layout in rows}
        self.by_path = {ours: (part, theirs, layout) for part, theirs, ours, layout in rows}
        self.prefixes = PREFIXES | {"vision": tuple(p + i for i in (inner, "") for p in PREFIXES["vision"])}
        ends = "|".join(re.escape(end) for family in families for end in family.computed)
        self.computed = re.compile(rf"(^|\.)({ends})$")


_names = functools.cache(_Names)


def _names_of(config: LlavaConfig) -> _Names:
    return _names(config.text.family, config.vision.family)


def is_computed(name: str, config: LlavaConfig) -> bool:
    """Whether a tensor is a table that older files hold and the model computes itself."""
    return bool(_names_of(config).computed.search(name))


def read_name(name: str, config: LlavaConfig) -> tuple[str, Layout] | None:
    """Path and layout of a tensor of any dialect; None for an unknown name.

    Layers that LLaVA does not use have paths too.
    """
    names = _names_of(config)
    for part, prefixes in names.prefixes.items():
        for prefix in prefixes:
            if not name.startswith(prefix):
                continue
            inner = name[len(prefix) :]
            number = None
            if part == "projector":
                number, inner = _read_projector(inner, prefix, config)
            elif match := re.match(r"(.*?\.)([0-9]{1,4})(\..+)", inner):
                number, inner = int(match[2]), f"{match[1]}{{i}}{match[3]}"
            if found := names.by_name.get((part, inner)):
                return found[0].replace("{i}", str(number)), found[1]
    return None


def _read_projector(inner: str, prefix: str, config: LlavaConfig) -> tuple[int | None, str]:
    """Linear layers are numbered 0, 2, 4 in the original (activations are numbered too), and 1, 2 in transformers."""
    if inner in ("weight", "bias") and prefix.endswith("mm_projector."):
        return 0, "{i}." + inner
    number, _, tail = inner.partition(".")
    if not re.fullmatch("[0-9]{1,3}", number):
        return None, inner
    if prefix.endswith("linear_"):
        return int(number) - 1, "{i}." + tail
    return (int(number) // 2, "{i}." + tail) if int(number) % 2 == 0 else (None, inner)


def write_name(path: str, dialect: str, config: LlavaConfig) -> tuple[str, Layout]:
    """Name of the parameter at `path` in the dialect `original` or `transformers`, and its layout."""
    number = re.search(r"(?<=layers/)\d+|(?<=linear_)\d+", path)
    names = _names_of(config)
    part, theirs, layout = names.by_path[path.replace(number[0], "{i}", 1) if number else path]
    prefix = names.prefixes[part][_DIALECT[dialect]]
    if part != "projector":
        return prefix + theirs.replace("{i}", number[0] if number else ""), layout
    assert number, path
    i, tail = int(number[0]), theirs.removeprefix("{i}.")
    if dialect == "transformers":
        return f"{prefix}{i + 1}.{tail}", layout
    single = projector_depth(config.projector) == 1 and config.projector == "linear"
    return f"{prefix}{tail}" if single else f"{prefix}{2 * i}.{tail}", layout
