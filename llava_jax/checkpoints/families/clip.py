"""CLIP's vision tower (Radford et al. 2021), as in transformers' `CLIPVisionModel` and its image processor."""

from llava_jax.checkpoints.config_keys import GENERAL, NEVER
from llava_jax.checkpoints.families.family import CONV, KEEP, Field, Tower, layer_norm, linear
from llava_jax.config import BICUBIC, CLIP_MEAN, CLIP_STD

LARGE = dict(
    hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, patch_size=14,
    image_size=336,
)  # fmt: skip

CLIP = Tower(
    name="clip",
    title="CLIP",
    model_type="clip_vision_model",
    classes=("CLIPVisionModel",),
    fields=(
        Field("hidden_size", "width", 768),
        Field("intermediate_size", "ffn_width", 3072),
        Field("num_hidden_layers", "layers", 12),
        Field("num_attention_heads", "heads", 12),
        Field("image_size", "image_size", 224),
        Field("patch_size", "patch_size", 32),
        Field("hidden_act", "activation", "quick_gelu"),
        Field("layer_norm_eps", "norm_eps", 1e-5),
    ),
    write=lambda vision: {"projection_dim": 768},
    ignored=frozenset(
        """bos_token_id dropout eos_token_id initializer_factor logit_scale_init_value pad_token_id projection_dim
        text_config text_config_dict tie_word_embeddings vision_config_dict vocab_size""".split()
        + GENERAL
    ),
    only=NEVER | {"num_channels": (None, 3)},
    tensors=(
        ("embeddings.class_embedding", "vision/embed/class", KEEP),
        ("embeddings.patch_embedding.weight", "vision/embed/patch", CONV),
        ("embeddings.position_embedding.weight", "vision/embed/position", KEEP),
        *layer_norm("pre_layrnorm", "vision/pre_norm"),
        *linear("encoder.layers.{i}.self_attn.q_proj", "vision/layers/{i}/attention/q"),
        *linear("encoder.layers.{i}.self_attn.k_proj", "vision/layers/{i}/attention/k"),
        *linear("encoder.layers.{i}.self_attn.v_proj", "vision/layers/{i}/attention/v"),
        *linear("encoder.layers.{i}.self_attn.out_proj", "vision/layers/{i}/attention/o"),
        *linear("encoder.layers.{i}.mlp.fc1", "vision/layers/{i}/mlp/up"),
        *linear("encoder.layers.{i}.mlp.fc2", "vision/layers/{i}/mlp/down"),
        *layer_norm("encoder.layers.{i}.layer_norm1", "vision/layers/{i}/attention_norm"),
        *layer_norm("encoder.layers.{i}.layer_norm2", "vision/layers/{i}/mlp_norm"),
        *layer_norm("post_layernorm", "vision/post_norm"),
    ),
    computed=("embeddings.position_ids",),
    inner="vision_model.",
    unused=lambda vision: {f"vision/post_norm/{name}": (vision.width,) for name in ("scale", "bias")},
    whole="clip",
    other_half=r"^(text_model\.|text_projection\.|visual_projection\.|logit_scale$)",
    published={
        "openai/clip-vit-large-patch14-336": LARGE,
        "openai/clip-vit-large-patch14": LARGE | dict(image_size=224),
        "openai/clip-vit-base-patch16": dict(patch_size=16),
        "openai/clip-vit-base-patch32": dict(),
    },
    processor="CLIPImageProcessor",
    pixels=dict(
        do_resize=True, do_center_crop=True, resample=BICUBIC, do_rescale=True, rescale_factor=1 / 255,
        do_normalize=True, image_mean=CLIP_MEAN, image_std=CLIP_STD,
    ),
)  # fmt: skip
