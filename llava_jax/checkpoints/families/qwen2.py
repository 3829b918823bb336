"""Qwen2, as in `Qwen2ForCausalLM`: LLaMA with biases on queries, keys and values, and optionally a window."""

from collections.abc import Callable
from typing import Any

from llava_jax.checkpoints.config_keys import GENERAL, refuse
from llava_jax.checkpoints.families import llama
from llava_jax.checkpoints.families.family import Decoder, Field, with_defaults
from llava_jax.checkpoints.families.rope import TYPES as ROPE_TYPES
from llava_jax.config import TextConfig, Window
from llava_jax.console import InputError

FULL, SLIDING = "full_attention", "sliding_attention"


def read_window(get: Callable[[str], Any]) -> int | None:
    """The sliding window of all layers; None for full attention.

    Raises:
      InputError: some layers have a window and others have none.
    """
    window, layers = get("sliding_window"), get("num_hidden_layers")
    if not window or not get("use_sliding_window"):
        return None
    kinds, first = get("layer_types"), get("max_window_layers")
    if kinds is None:  # a file of transformers 4: layers before `first` have full attention
        first = 28 if first is None else first
        kinds = [FULL] * min(first, layers) + [SLIDING] * (layers - first)
    if unknown := set(kinds) - {FULL, SLIDING}:
        raise refuse("layer_types", unknown.pop(), (FULL, SLIDING))
    if len(set(kinds)) > 1:
        raise InputError(
            "config.json: a sliding window in some layers only (layer_types, max_window_layers) is not supported"
        )
    return window if SLIDING in kinds else None


def _write(text: TextConfig) -> dict[str, Any]:
    return {**llama.write(text), "use_sliding_window": text.sliding_window is not None, "max_window_layers": 0}


QWEN2 = Decoder(
    name="qwen2",
    model_type="qwen2",
    originals=("llava_qwen", "qwen2"),
    classes=("LlavaQwenForCausalLM", "Qwen2ForCausalLM"),
    fields=(
        *with_defaults(
            llama.FIELDS, vocab_size=151936, intermediate_size=22016, num_key_value_heads=32,
            max_position_embeddings=32768, bos_token_id=None, eos_token_id=None,
        ),
        Field("sliding_window", "sliding_window", 4096),
    ),
    more=ROPE_TYPES
    | {"layer_types": list[str] | None, "max_window_layers": Window, "use_sliding_window": bool | None},
    read=lambda get: llama.read(get) | {"sliding_window": read_window(get), "qkv_bias": True},
    write=_write,
    ignored=frozenset([*llama.BIASES, *GENERAL]),
    only=llama.ONLY,
    tensors=llama.TENSORS,
    computed=llama.COMPUTED,
)  # fmt: skip
