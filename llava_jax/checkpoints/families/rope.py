"""Rotary positions in `config.json`: `rope_theta` and `rope_scaling` in transformers 4, `rope_parameters` in 5."""

from collections.abc import Callable
from typing import Any, TypedDict

from llava_jax.checkpoints.config_keys import Keys, check_keys
from llava_jax.config import Positions, Positive, RopeScaling
from llava_jax.console import InputError, shorten
from llava_jax.json_files import check_json


class Rope(TypedDict, total=False):
    """The object under `rope_scaling` or `rope_parameters`."""

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
# Kind of scaling -> foreign field -> our field.
SCALINGS = {
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor", "low_freq_factor": "low_freq_factor", "high_freq_factor": "high_freq_factor",
        "original_max_position_embeddings": "original_max_positions",
    },
}  # fmt: skip


def read_rope(get: Callable[[str], Any]) -> dict[str, Any]:
    """The fields of `TextConfig` for rotary positions.

    Raises:
      InputError: the scaling is unsupported or incomplete.
    """
    rope = get("rope_scaling") or get("rope_parameters") or {}  # given both, transformers 5 ignores the latter
    check_keys(rope, KEYS)
    return {"rope_theta": float(rope.get("rope_theta", get("rope_theta"))), "rope_scaling": _scaling(rope)}


def _scaling(rope: dict[str, Any]) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        if (factor := rope.get("factor")) not in (None, 1):
            factor = shorten(repr(factor))
            raise InputError(f"config.json: rope scaling by {factor} needs a rope_type")
        return None
    if kind not in SCALINGS:
        only = " and ".join(SCALINGS)
        raise InputError(f"config.json: rope scaling {shorten(repr(kind))} is not supported, only {only}")
    if missing := [theirs for theirs in SCALINGS[kind] if rope.get(theirs) is None]:
        raise InputError(f"config.json: rope scaling {kind} needs {', '.join(missing)}")
    fields = {ours: rope[theirs] for theirs, ours in SCALINGS[kind].items()}
    return check_json({"kind": kind, **fields}, RopeScaling, "config.json: rope scaling")


def write_rope(scaling: RopeScaling | None) -> dict[str, Any]:
    """`rope_scaling` in the format of version 4, which version 5 reads too; no field without scaling."""
    if scaling is None:
        return {}
    fields = {theirs: getattr(scaling, ours) for theirs, ours in SCALINGS[scaling.kind].items()}
    return {"rope_scaling": {"rope_type": scaling.kind, "type": scaling.kind, **fields}}
