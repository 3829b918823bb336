"""What a LLaVA is: frozen dataclasses, the released models' and a tiny one. `config_json` reads them from files."""

import dataclasses
from typing import Any

from llava_jax.console import InputError, shorten

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
BICUBIC = 3  # of Pillow's `Image.Resampling`

ASPECT_RATIOS = ("square", "pad", "anyres")
MERGE_TYPES = ("flat", "spatial", "spatial_unpad")
IMAGE_RULES = ("original", "transformers")
ACTIVATIONS = ("silu", "gelu", "quick_gelu", "gelu_pytorch_tanh")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched: `linear` (all alike) or `llama3` (low ones only)."""

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """The decoder: LLaMA, Mistral, Vicuna, Yi, Qwen2 and their kin."""

    vocab_size: int = 32000
    width: int = 4096
    ffn_width: int = 11008
    layers: int = 32
    heads: int = 32
    kv_heads: int = 32
    head_width: int = 128
    norm_eps: float = 1e-5
    activation: str = "silu"
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    max_positions: int = 4096
    sliding_window: int | None = None
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    tied_head: bool = False
    family: str = "llama"  # llama | mistral | qwen2: the class that holds it in transformers
    bos_id: int | None = 1
    eos_ids: tuple[int, ...] = (2,)
    pad_id: int | None = None

    @property
    def query_scale(self) -> float:
        return self.head_width**-0.5


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """The CLIP vision tower. `feature_layers` index the hidden states: 0 is the embedding, -2 the last but one."""

    image_size: int = 336
    patch_size: int = 14
    width: int = 1024
    ffn_width: int = 4096
    layers: int = 24
    heads: int = 16
    norm_eps: float = 1e-5
    activation: str = "quick_gelu"
    feature_layers: tuple[int, ...] = (-2,)
    keep_class_token: bool = False  # `cls_patch` (original), `full` (Hugging Face)
    # What the image processor does to a picture that is no grid of tiles (`preprocessor_config.json`).
    resize: tuple[int, ...] | None = None  # (shortest edge,), or (height, width); () not at all; None to `image_size`
    center_crop: bool = True
    resample: int = BICUBIC
    # And to the pixels of all: (value * rescale_factor - mean) / deviation, the latter two only if `normalize`.
    rescale_factor: float = 1 / 255
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
    grid_pinpoints: tuple[tuple[int, int], ...] = ()  # as the file has them; who reads them decides what is width
    image_rules: str = "original"
    pads_in_transformers: bool = True  # whether transformers' processor pads, for `image_rules="transformers"`
    use_im_start_end: bool = False
    use_im_patch: bool = False
    max_length: int | None = None  # positions after splicing that the model was trained with
    padding_side: str = "right"
    # The conversation template: its name, or a chat template's Jinja program; None: chosen from the rest.
    template: str | None = None
    template_from: str = ""  # the file of the checkpoint that says so
    name: str = ""  # what the checkpoint calls itself, a hint for the template
    vision_tower: str | None = None  # where the original's config says the tower is
    image_token_id: int | None = None  # of `<image>` in the vocabulary of Hugging Face conversions; never embedded

    def __post_init__(self):
        for field, value, known in (
            ("image_aspect_ratio", self.aspect_ratio, ASPECT_RATIOS),
            ("mm_patch_merge_type", self.merge, MERGE_TYPES),
            ("image_rules", self.image_rules, IMAGE_RULES),
            ("padding_side", self.padding_side, ("left", "right")),
            ("hidden_act of the decoder", self.text.activation, ACTIVATIONS),
            ("hidden_act of the vision tower", self.vision.activation, ACTIVATIONS),
        ):
            if value not in known:
                raise InputError(f"config: {field} {shorten(repr(value))} is not supported, only {', '.join(known)}")
        projector_depth(self.projector)
        for part in (self.text, self.vision):
            for field in dataclasses.fields(part):
                value = getattr(part, field.name)
                if field.type is int and (type(value) is not int or value <= 0):
                    raise InputError(f"config: {field.name} {shorten(repr(value))} must be a whole number above 0")
                if field.type is float and type(value) not in (int, float):
                    raise InputError(f"config: {field.name} {shorten(repr(value))} must be a number")
        if self.vision.keep_class_token and self.merge != "flat":
            raise InputError(
                f"config: a class token among the features does not go with mm_patch_merge_type {self.merge}"
            )
        if self.aspect_ratio == "anyres" and not self.grid_pinpoints:
            raise InputError("config: image_aspect_ratio anyres needs image_grid_pinpoints")
        if self.text.heads % self.text.kv_heads:
            raise InputError(
                f"config: {self.text.heads} attention heads are no multiple of {self.text.kv_heads} key/value heads"
            )
        if self.vision.width % self.vision.heads:
            raise InputError(
                f"config: the vision tower's width {self.vision.width} is no multiple of its {self.vision.heads} heads"
            )
        if any(not 0 <= i <= self.vision.layers for i in self.vision.hidden_states):
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
        """The model with pictures cut as the `original` or as `transformers` cuts them."""
        unpadded = rules == "transformers" and self.aspect_ratio == "pad" and not self.pads_in_transformers
        return self.replace(image_rules=rules, aspect_ratio="square" if unpadded else self.aspect_ratio)

    def to_json(self) -> dict[str, Any]:
        return {"format": "llava-jax", "version": 1} | dataclasses.asdict(self)


def projector_depth(projector: str) -> int:
    """Linear layers of a projector by the original's name for it (llava/model/multimodal_projector/builder.py).

    Raises:
      InputError: the name is none of `linear`, `mlpNx_gelu`, `identity`.
    """
    if projector == "identity":
        return 0
    if projector == "linear":
        return 1
    digits = projector.removeprefix("mlp").removesuffix("x_gelu")
    if projector == f"mlp{digits}x_gelu" and digits.isdigit() and int(digits) > 0:
        return int(digits)
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
    """A released model's configuration by name, with or without the `llava-` in front."""
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
