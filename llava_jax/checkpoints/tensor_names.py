"""One table, read both ways: what tensors are called elsewhere, and the path and layout they have here.

Names elsewhere are a prefix, which differs from dialect to dialect, and a name within a part of the model, which
does not. `read_name` takes every prefix known, `write_name` those of one dialect. Nothing else in the project
knows a foreign name.

Layouts: linear kernels are [in, out] here and [out, in] there; the patch convolution is HWIO here and OIHW
there; everything else is the same. Rotary halves are transformers' own, so queries and keys are not permuted.
"""

import re
from collections.abc import Callable

import numpy as np

from llava_jax.config import LlavaConfig, projector_depth

# ---------------------------------------------------------------- layouts


def _keep(x: np.ndarray) -> np.ndarray:
    return x


def _transpose(x: np.ndarray) -> np.ndarray:
    return x.T


def _to_hwio(x: np.ndarray) -> np.ndarray:
    return x.transpose(2, 3, 1, 0)


def _to_oihw(x: np.ndarray) -> np.ndarray:
    return x.transpose(3, 2, 0, 1)


Layout = tuple[Callable[[np.ndarray], np.ndarray], Callable[[np.ndarray], np.ndarray]]  # to ours, to theirs
KEEP: Layout = (_keep, _keep)
LINEAR: Layout = (_transpose, _transpose)
CONV: Layout = (_to_hwio, _to_oihw)


def shape_after(layout: Callable[[np.ndarray], np.ndarray], shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that one half of a layout makes of another.

    Raises:
      ValueError: it has too few or too many dimensions for the layout.
    """
    return layout(np.broadcast_to(np.False_, shape)).shape


# ---------------------------------------------------------------- the table


def _linear(theirs: str, ours: str) -> list[tuple[str, str, Layout]]:
    return [(f"{theirs}.weight", f"{ours}/kernel", LINEAR), (f"{theirs}.bias", f"{ours}/bias", KEEP)]


def _layer_norm(theirs: str, ours: str) -> list[tuple[str, str, Layout]]:
    return [(f"{theirs}.weight", f"{ours}/scale", KEEP), (f"{theirs}.bias", f"{ours}/bias", KEEP)]


# (part, name within it, path here, layout); {i} is a layer
TABLE: list[tuple[str, str, str, Layout]] = [
    *(
        ("decoder", *row)
        for row in [
            ("embed_tokens.weight", "decoder/embed/embedding", KEEP),
            *(
                row
                for theirs, ours in [
                    ("self_attn.q_proj", "attention/q"),
                    ("self_attn.k_proj", "attention/k"),
                    ("self_attn.v_proj", "attention/v"),
                    ("self_attn.o_proj", "attention/o"),
                    ("mlp.gate_proj", "mlp/gate"),
                    ("mlp.up_proj", "mlp/up"),
                    ("mlp.down_proj", "mlp/down"),
                ]
                for row in _linear("layers.{i}." + theirs, "decoder/layers/{i}/" + ours)
            ),
            ("layers.{i}.input_layernorm.weight", "decoder/layers/{i}/attention_norm/scale", KEEP),
            ("layers.{i}.post_attention_layernorm.weight", "decoder/layers/{i}/mlp_norm/scale", KEEP),
            ("norm.weight", "decoder/norm/scale", KEEP),
        ]
    ),
    ("head", "lm_head.weight", "decoder/head/kernel", LINEAR),
    *(
        ("vision", *row)
        for row in [
            ("embeddings.class_embedding", "vision/embed/class", KEEP),
            ("embeddings.patch_embedding.weight", "vision/embed/patch", CONV),
            ("embeddings.position_embedding.weight", "vision/embed/position", KEEP),
            *_layer_norm("pre_layrnorm", "vision/pre_norm"),
            *(
                row
                for theirs, ours in [
                    ("self_attn.q_proj", "attention/q"),
                    ("self_attn.k_proj", "attention/k"),
                    ("self_attn.v_proj", "attention/v"),
                    ("self_attn.out_proj", "attention/o"),
                    ("mlp.fc1", "mlp/up"),
                    ("mlp.fc2", "mlp/down"),
                ]
                for row in _linear("encoder.layers.{i}." + theirs, "vision/layers/{i}/" + ours)
            ),
            *_layer_norm("encoder.layers.{i}.layer_norm1", "vision/layers/{i}/attention_norm"),
            *_layer_norm("encoder.layers.{i}.layer_norm2", "vision/layers/{i}/mlp_norm"),
            *_layer_norm("post_layernorm", "vision/post_norm"),
        ]
    ),
    *(("projector", *row) for row in _linear("{i}", "projector/linear_{i}")),
    ("newline", "image_newline", "newline", KEEP),
]

# Prefixes of each part, the ones that are written first: original, transformers.
PREFIXES: dict[str, tuple[str, ...]] = {
    "decoder": ("model.", "language_model.model.", "model.language_model.", "language_model."),
    "head": ("", "language_model."),
    "vision": (
        "model.vision_tower.vision_tower.vision_model.",
        "vision_tower.vision_model.",
        "vision_tower.",
        "model.vision_tower.vision_model.",
        "model.vision_tower.vision_tower.",
        "model.vision_tower.",
        "vision_model.",
        "",
    ),
    "projector": ("model.mm_projector.", "multi_modal_projector.linear_", "model.multi_modal_projector.linear_",
                  "mm_projector."),
    "newline": ("model.", ""),
}  # fmt: skip

# Tensors that older files hold and nothing needs: tables that are computed.
COMPUTED = re.compile(r"(^|\.)(rotary_emb\.inv_freq|embeddings\.position_ids|masked_bias|attn\.bias)$")
# The other half of a whole CLIP model, where a vision tower directory holds one.
CLIP_TEXT = re.compile(r"^(text_model\.|text_projection\.|visual_projection\.|logit_scale$)")

_DIALECT = {"original": 0, "transformers": 1}
_BY_NAME = {(part, theirs): (ours, layout) for part, theirs, ours, layout in TABLE}
_BY_PATH = {ours: (part, theirs, layout) for part, theirs, ours, layout in TABLE}


def read_name(name: str, config: LlavaConfig) -> tuple[str, Layout] | None:
    """Path and layout of a tensor of any dialect; None for a name that nobody knows.

    Paths are those of a whole model: layers that LLaVA does not use have theirs too.
    """
    for part, prefixes in PREFIXES.items():
        for prefix in prefixes:
            if not name.startswith(prefix):
                continue
            inner = name[len(prefix) :]
            number = None
            if part == "projector":
                number, inner = _read_projector(inner, prefix, config)
            elif match := re.match(r"((?:encoder\.)?layers\.)([0-9]{1,4})(\..+)", inner):
                number, inner = int(match[2]), f"{match[1]}{{i}}{match[3]}"
            if found := _BY_NAME.get((part, inner)):
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
    part, theirs, layout = _BY_PATH[path.replace(number[0], "{i}", 1) if number else path]
    prefix = PREFIXES[part][_DIALECT[dialect]]
    if part != "projector":
        return prefix + theirs.replace("{i}", number[0] if number else ""), layout
    i, tail = int(number[0]), theirs.removeprefix("{i}.")
    if dialect == "transformers":
        return f"{prefix}{i + 1}.{tail}", layout
    single = projector_depth(config.projector) == 1 and config.projector == "linear"
    return f"{prefix}{tail}" if single else f"{prefix}{2 * i}.{tail}", layout
