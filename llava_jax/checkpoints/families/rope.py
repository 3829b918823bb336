"""Rotary positions in `config.json`: `rope_theta` and `rope_scaling` of transformers 4, `rope_parameters` of 5."""

from collections.abc import Callable
from typing import Any, TypedDict

from llava_jax.checkpoints.config_keys import Keys, check_keys
from llava_jax.config import Positions, Positive, RopeScaling
from llava_jax.console import InputError, shorten
from llava_jax.json_files import check_json


class Rope(TypedDict, total=False):
    """What stands under `rope_scaling` or `rope_parameters`."""

    factor: Positive | None
    high_freq_factor: Positive | None
    low_freq_factor: Positive | None
    original_max_position_embeddings: Positions | None
    rope_theta: Positive
    rope_type: str | None
    type: str | None


TYPES = {"rope_parameters": Rope | None, "rope_scaling": Rope | None}
KEYS = Keys(
    frozenset(Rope.__annotations__), only={"partial_rotary_factor": (None, 1, 1.0), "attention_factor": (None,)}
)
# Theirs and ours, of each kind of scaling.
SCALINGS = {
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor", "low_freq_factor": "low_freq_factor", "high_freq_factor": "high_freq_factor",
        "original_max_position_embeddings": "original_max_positions",
    },
}  # fmt: skip


def read_rope(get: Callable[[str], Any]) -> dict[str, Any]:
    """The fields of `TextConfig` that are about rotary positions.

    Raises:
      InputError: they are stretched in a way that is not supported, or that the file leaves open.
    """
    rope = get("rope_scaling") or get("rope_parameters") or {}  # of both, transformers 5 takes nothing from the latter
    check_keys(rope, KEYS)
    return {"rope_theta": float(rope.get("rope_theta", get("rope_theta"))), "rope_scaling": _scaling(rope)}


def _scaling(rope: dict[str, Any]) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        if (factor := rope.get("factor")) not in (None, 1):
            factor = shorten(repr(factor))
            raise InputError(f"config.json: rope scaling by {factor} without a rope_type that says how")
        return None
    if kind not in SCALINGS:
        only = " and ".join(SCALINGS)
        raise InputError(f"config.json: rope scaling {shorten(repr(kind))} is not supported, only {only}")
    if missing := [theirs for theirs in SCALINGS[kind] if rope.get(theirs) is None]:
        raise InputError(f"config.json: rope scaling {kind} needs {', '.join(missing)}")
    fields = {ours: rope[theirs] for theirs, ours in SCALINGS[kind].items()}
    return check_json({"kind": kind, **fields}, RopeScaling, "config.json: rope scaling")


def write_rope(scaling: RopeScaling | None) -> dict[str, Any]:
    """`rope_scaling` as version 4 writes it, which version 5 reads too; nothing if there is none."""
    if scaling is None:
        return {}
    fields = {theirs: getattr(scaling, ours) for theirs, ours in SCALINGS[scaling.kind].items()}
    return {"rope_scaling": {"rope_type": scaling.kind, "type": scaling.kind, **fields}}
