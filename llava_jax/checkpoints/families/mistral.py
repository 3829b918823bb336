"""Mistral (Jiang et al. 2023), as in `MistralForCausalLM`: LLaMA with a sliding window."""

from llava_jax.checkpoints.config_keys import GENERAL
from llava_jax.checkpoints.families import llama
from llava_jax.checkpoints.families.family import Decoder, Field, with_defaults
from llava_jax.checkpoints.families.rope import TYPES as ROPE_TYPES

MISTRAL = Decoder(
    name="mistral",
    model_type="mistral",
    originals=("llava_mistral", "mistral"),
    classes=("LlavaMistralForCausalLM", "MistralForCausalLM"),
    fields=(
        *with_defaults(llama.FIELDS, intermediate_size=14336, num_key_value_heads=8, max_position_embeddings=131072),
        Field("sliding_window", "sliding_window", 4096),
    ),
    more=ROPE_TYPES,
    read=lambda get: llama.read(get) | {"sliding_window": get("sliding_window") or None},
    write=llama.write,
    ignored=frozenset([*llama.BIASES, "layer_types", "max_window_layers", "use_sliding_window", *GENERAL]),
    only=llama.ONLY,
    tensors=llama.TENSORS,
    computed=llama.COMPUTED,
)
