"""The configuration of a LLaVA: frozen dataclasses, and presets of the released models and of a tiny one.

`checkpoints.config_json` reads them from files.
"""

import dataclasses
import functools
import re
import typing
from typing import Annotated, Any

from msgspec import Meta

from llava_jax.console import InputError, shorten
from llava_jax.json_files import check_json

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
BICUBIC = 3  # of Pillow's `Image.Resampling`

ASPECT_RATIOS = ("square", "pad", "anyres")
MERGE_TYPES = ("flat", "spatial", "spatial_unpad")
IMAGE_RULES = ("original", "transformers")
ACTIVATIONS = ("silu", "gelu", "quick_gelu", "gelu_pytorch_tanh")
ROPE_SCALINGS = ("linear", "llama3")
MAX_TILES = 1000  # of an image

# Ranges of numbers, well beyond those of all known models.
Layers = Annotated[int, Meta(ge=1, le=1000)]
Heads = Annotated[int, Meta(ge=1, le=2**12)]
Width = Annotated[int, Meta(ge=1, le=2**18)]
Vocabulary = Annotated[int, Meta(ge=1, le=2**24)]
Positions = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Window = Annotated[int, Meta(ge=0, le=2**31 - 1)]  # 0 for none
TokenId = Annotated[int, Meta(ge=-1, le=2**31 - 1)]  # -1 for none, as in LLaMA's first files
Pixels = Annotated[int, Meta(ge=1, le=10_000)]
FeatureLayer = Annotated[int, Meta(ge=-1001, le=1000)]
Epsilon = Annotated[float, Meta(ge=0, le=1)]
Positive = Annotated[float, Meta(gt=0, le=1e15)]


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are scaled: `linear` (all equally) or `llama3` (only low ones)."""

    kind: str
    factor: Positive
    low_freq_factor: Positive = 1.0
    high_freq_factor: Positive = 4.0
    original_max_positions: Positions = 8192


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """The decoder: LLaMA, Mistral, Vicuna, Yi, Qwen2 and related models."""

    vocab_size: Vocabulary = 32000
    width: Width = 4096
    ffn_width: Width = 11008
    layers: Layers = 32
    heads: Heads = 32
    kv_heads: Heads = 32
    head_width: Width = 128
    norm_eps: Epsilon = 1e-5
    activation: str = "silu"
    rope_theta: Positive = 10000.0
    rope_scaling: RopeScaling | None = None
    max_positions: Positions = 4096
    sliding_window: Window | None = None
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    tied_head: bool = False
    family: str = "llama"  # of `checkpoints.families`
    bos_id: TokenId | None = 1
    eos_ids: tuple[TokenId, ...] = (2,)
    pad_id: TokenId | None = None

    @property
    def query_scale(self) -> float:
        return self.head_width**-0.5


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """The vision tower. `feature_layers` index the hidden states: 0 is the embedding, -2 the last but one."""

    image_size: Pixels = 336
    patch_size: Pixels = 14
    width: Width = 1024
    ffn_width: Width = 4096
    layers: Layers = 24
    heads: Heads = 16
    norm_eps: Epsilon = 1e-5
    activation: str = "quick_gelu"
    feature_layers: tuple[FeatureLayer, ...] = (-2,)
    keep_class_token: bool = False  # `cls_patch` (original), `full` (transformers)
    family: str = "clip"  # of `checkpoints.families`
    # How the image processor resizes an image without a grid of tiles (`preprocessor_config.json`).
    resize: tuple[Pixels, ...] | None = None  # (shortest edge,) or (height, width); (): no resizing; None: `image_size`
    center_crop: bool = True
    resample: Annotated[int, Meta(ge=1, le=5)] = BICUBIC
    # All pixels become value * rescale_factor, and then (value - mean) / deviation if `normalize`.
    rescale_factor: Annotated[float, Meta(gt=0, le=1)] = 1 / 255
    normalize: bool = True
    image_mean: tuple[float, float, float] = CLIP_MEAN
    image_std: tuple[float, float, float] = CLIP_STD

    @property
    def patches_per_side(self) -> int:
        return self.image_size // self.patch_size

    @property
    def features_per_tile(self) -> int:
        """P: feature rows that one tile contributes."""
        return self.patches_per_side**2 + self.keep_class_token

    @property
    def hidden_states(self) -> tuple[int, ...]:
        """`feature_layers` counted from 0."""
        return tuple(i if i >= 0 else self.layers + 1 + i for i in self.feature_layers)

    @property
    def layers_used(self) -> int:
        """Layers that the features depend on; the ones after them are neither kept nor computed."""
        return max(self.hidden_states)


@dataclasses.dataclass(frozen=True)
class LlavaConfig:
    text: TextConfig = TextConfig()
    vision: VisionConfig = VisionConfig()
    projector: str = "mlp2x_gelu"  # linear | mlpNx_gelu | identity
    projector_bias: bool = True
    aspect_ratio: str = "pad"
    merge: str = "flat"
    grid_pinpoints: tuple[tuple[Pixels, Pixels], ...] = ()  # as in the file; `image_rules` decides which is the width
    image_rules: str = "original"
    pads_in_transformers: bool = True  # whether transformers' processor does, for `image_rules="transformers"`
    use_im_start_end: bool = False
    use_im_patch: bool = False
    max_length: Annotated[int, Meta(ge=1)] | None = None  # positions after splicing that the model was trained with
    padding_side: str = "right"
    # The conversation template: its name, or a chat template's Jinja program; None: chosen from the other fields.
    template: str | None = None
    template_from: str = ""  # the checkpoint's file that contains it
    name: str = ""  # the checkpoint's name, a hint for the template
    vision_tower: str | None = None  # the tower that the original's config names
    image_token_id: TokenId | None = None  # of `<image>` in the vocabulary of Hugging Face conversions; never embedded

    def __post_init__(self):
        parts: list[Any] = [self, self.text, self.vision, *filter(None, [self.text.rope_scaling])]
        for part in parts:
            for field, kind in field_types(type(part)).items():  # type: ignore[arg-type]  # classes are hashable
                check_json(getattr(part, field), kind, f"config: {field}")
        for field, value, known in (
            ("image_aspect_ratio", self.aspect_ratio, ASPECT_RATIOS),
            ("mm_patch_merge_type", self.merge, MERGE_TYPES),
            ("image_rules", self.image_rules, IMAGE_RULES),
            ("padding_side", self.padding_side, ("left", "right")),
            ("rope scaling", self.text.rope_scaling and self.text.rope_scaling.kind, (None, *ROPE_SCALINGS)),
            ("hidden_act of the decoder", self.text.activation, ACTIVATIONS),
            ("hidden_act of the vision tower", self.vision.activation, ACTIVATIONS),
        ):
            if value not in known:
                only = ", ".join(filter(None, known))
                raise InputError(f"config: {field} {shorten(repr(value))} is not supported, only {only}")
        projector_depth(self.projector)
        if self.vision.keep_class_token and self.merge != "flat":
            raise InputError(
                f"config: mm_patch_merge_type {self.merge} does not support a class token among the features"
            )
        if self.aspect_ratio == "anyres" and not self.grid_pinpoints:
            raise InputError("config: image_aspect_ratio anyres needs image_grid_pinpoints")
        if self.text.heads % self.text.kv_heads:
            raise InputError(
                f"config: {self.text.heads} attention heads are not a multiple of {self.text.kv_heads} key/value heads"
            )
        if self.vision.width % self.vision.heads:
            raise InputError(
                f"config: the vision tower's width {self.vision.width} must be a multiple of its number of heads, "
                f"{self.vision.heads}"
            )
        scaling = self.text.rope_scaling
        if scaling and scaling.low_freq_factor >= scaling.high_freq_factor:
            raise InputError(
                f"config: rope scaling's low_freq_factor {scaling.low_freq_factor:g} must be below its "
                f"high_freq_factor {scaling.high_freq_factor:g}"
            )
        if self.text.head_width % 2:
            raise InputError(
                f"config: the decoder's head width {self.text.head_width} must be even, for rotary positions"
            )
        if self.vision.patch_size > self.vision.image_size:
            raise InputError(
                f"config: the vision tower's patch size {self.vision.patch_size} is larger than its image size "
                f"{self.vision.image_size}"
            )
        side = self.vision.image_size
        for height, width in self.grid_pinpoints:
            if (tiles := -(-height // side) * -(-width // side)) > MAX_TILES:
                raise InputError(
                    f"config: image_grid_pinpoints: {height} x {width} has {tiles:,} tiles of {side} pixels; at most "
                    f"{MAX_TILES:,} are supported"
                )
        if not self.vision.feature_layers or any(not 0 <= i <= self.vision.layers for i in self.vision.hidden_states):
            raise InputError(
                f"config: vision feature layer {shorten(self.vision.feature_layers)} is not among the "
                f"{self.vision.layers + 1} hidden states of the tower"
            )

    @property
    def has_newline(self) -> bool:
        """Whether an image's rows end in a learned newline (`image_newline`)."""
        return self.merge == "spatial_unpad"

    @property
    def projector_in(self) -> int:
        return self.vision.width * len(self.vision.feature_layers)

    def replace(self, **changes) -> "LlavaConfig":
        return dataclasses.replace(self, **changes)

    def with_image_rules(self, rules: str) -> "LlavaConfig":
        """The model with images split as by the `original` or by `transformers`."""
        unpadded = rules == "transformers" and self.aspect_ratio == "pad" and not self.pads_in_transformers
        return self.replace(image_rules=rules, aspect_ratio="square" if unpadded else self.aspect_ratio)

    def to_json(self) -> dict[str, Any]:
        return {"format": "llava-jax", "version": 1} | dataclasses.asdict(self)


@functools.cache
def field_types(part: type) -> dict[str, Any]:
    """Name -> type of each field of a dataclass, including ranges."""
    return typing.get_type_hints(part, include_extras=True)


def projector_depth(projector: str) -> int:
    """Number of linear layers of a projector, by its name in llava/model/multimodal_projector/builder.py.

    Raises:
      InputError: the name is not `linear`, `mlpNx_gelu` or `identity`.
    """
    if projector == "identity":
        return 0
    if projector == "linear":
        return 1
    if layers := re.fullmatch(r"mlp([1-9][0-9]?)x_gelu", projector):
        return int(layers[1])
    raise InputError(f"config: projector {shorten(projector)!r} is not supported, only linear, mlpNx_gelu and identity")


# ---------------------------------------------------------------- presets

_L7B = TextConfig()
_L13B = TextConfig(width=5120, ffn_width=13824, layers=40, heads=40, kv_heads=40)
_MISTRAL = TextConfig(ffn_width=14336, kv_heads=8, rope_theta=1e6, max_positions=32768, norm_eps=1e-5, family="mistral")
_YI34B = TextConfig(
    vocab_size=64000,
    width=7168,
    ffn_width=20480,
    layers=60,
    heads=56,
    kv_heads=8,
    rope_theta=5e6,
    eos_ids=(7,),
)
_LLAMA3 = TextConfig(
    vocab_size=128256, ffn_width=14336, kv_heads=8, rope_theta=5e5, max_positions=8192, bos_id=128000,
    eos_ids=(128001, 128009),
)  # fmt: skip
PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))


def _v15(text: TextConfig, **kw) -> LlavaConfig:
    return LlavaConfig(text=text, max_length=2048, template="llava_v1", **kw)


def _v16(text: TextConfig, template: str) -> LlavaConfig:
    return LlavaConfig(
        text=text, aspect_ratio="anyres", merge="spatial_unpad", grid_pinpoints=PINPOINTS, max_length=4096,
        template=template,
    )  # fmt: skip


PRESETS: dict[str, LlavaConfig] = {
    "v1.5-7b": _v15(_L7B),
    "v1.5-13b": _v15(_L13B),
    "v1.6-vicuna-7b": _v16(_L7B, "llava_v1"),
    "v1.6-vicuna-13b": _v16(_L13B, "llava_v1"),
    "v1.6-mistral-7b": _v16(_MISTRAL, "mistral_instruct"),
    "v1.6-34b": _v16(_YI34B, "chatml_direct"),
    "llama3-8b-next": _v16(_LLAMA3, "llava_llama_3"),
}


def preset(name: str) -> LlavaConfig:
    """A released model's configuration by name, with or without the prefix `llava-`."""
    key = name.removeprefix("llava-")
    if key not in PRESETS:
        raise InputError(f"unknown model {shorten(name)!r}; known: {', '.join(PRESETS)}")
    return PRESETS[key]


def tiny(**changes) -> LlavaConfig:
    """A v1.6 model of about 60,000 parameters, for tests and dry runs."""
    text = TextConfig(
        vocab_size=512,
        width=32,
        ffn_width=64,
        layers=2,
        heads=4,
        kv_heads=2,
        head_width=8,
        max_positions=1024,
    )
    vision = VisionConfig(image_size=28, patch_size=7, width=16, ffn_width=32, layers=3, heads=2)
    base = LlavaConfig(
        text=text, vision=vision, aspect_ratio="anyres", merge="spatial_unpad",
        grid_pinpoints=((28, 56), (56, 28), (56, 56), (84, 28), (28, 84)), template="llava_v1",
    )  # fmt: skip
    return base.replace(**changes)
