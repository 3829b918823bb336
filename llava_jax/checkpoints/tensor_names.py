"""What tensors are called elsewhere, and the path and layout they have here.

Names elsewhere are a prefix, which differs from dialect to dialect, and a name within a part of the model, which
does not. `read_name` takes every prefix known, `write_name` those of one dialect. The names within vision tower and
decoder stand in the tables of their families; nothing else in the project knows a foreign name.

Layouts: linear kernels are [in, out] here and [out, in] there; the patch convolution is HWIO here and OIHW
there; everything else is the same. Rotary halves are transformers' own, so queries and keys are not permuted.
"""

import functools
import re
from collections.abc import Callable

import numpy as np

from llava_jax.checkpoints.families import DECODERS, TOWERS
from llava_jax.checkpoints.families.family import KEEP, LINEAR, Layout, linear
from llava_jax.config import LlavaConfig, projector_depth

# Names of the parts that are no family's; {i} is a layer.
HEAD = ("lm_head.weight", "decoder/head/kernel", LINEAR)
PROJECTOR = linear("{i}", "projector/linear_{i}")
NEWLINE = ("image_newline", "newline", KEEP)

# Prefixes of each part, the ones that are written first: original, transformers.
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
    """The shape that one half of a layout makes of another.

    Raises:
      ValueError: it has too few or too many dimensions for the layout.
    """
    return layout(np.broadcast_to(np.False_, shape)).shape


class _Names:
    """The names of a model of two families, in tables for looking up."""

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
    """Whether a tensor is a table that is computed, which older files hold and nothing needs."""
    return bool(_names_of(config).computed.search(name))


def read_name(name: str, config: LlavaConfig) -> tuple[str, Layout] | None:
    """Path and layout of a tensor of any dialect; None for a name that nobody knows.

    Paths are those of a whole model: layers that LLaVA does not use have theirs too.
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
    """Linear layers count 0, 2, 4 in the original (activations between them count), 1, 2 in transformers."""
    if inner in ("weight", "bias") and prefix.endswith("mm_projector."):
        return 0, "{i}." + inner
    number, _, tail = inner.partition(".")
    if not re.fullmatch("[0-9]{1,3}", number):
        return None, inner
    if prefix.endswith("linear_"):
        return int(number) - 1, "{i}." + tail
    return (int(number) // 2, "{i}." + tail) if int(number) % 2 == 0 else (None, inner)


def write_name(path: str, dialect: str, config: LlavaConfig) -> tuple[str, Layout]:
    """What the parameter at `path` is called in the dialect `original` or `transformers`, and its layout."""
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
