"""LLaMA (Touvron et al. 2023), including Vicuna and Yi, as in `LlamaForCausalLM`, and what related families share."""

from collections.abc import Callable
from typing import Any

from llava_jax.checkpoints.config_keys import GENERAL, NEVER, Ids, read_ids, write_ids
from llava_jax.checkpoints.families.family import KEEP, Decoder, Field, linear
from llava_jax.checkpoints.families.rope import TYPES as ROPE_TYPES
from llava_jax.checkpoints.families.rope import read_rope, write_rope
from llava_jax.config import Heads, TextConfig, Width
from llava_jax.console import InputError

FIELDS = (
    Field("vocab_size", "vocab_size", 32000),
    Field("hidden_size", "width", 4096),
    Field("intermediate_size", "ffn_width", 11008),
    Field("num_hidden_layers", "layers", 32),
    Field("num_attention_heads", "heads", 32),
    Field("num_key_value_heads", "kv_heads", kind=Heads | None),
    Field("head_dim", "head_width", kind=Width | None),
    Field("hidden_act", "activation", "silu"),
    Field("max_position_embeddings", "max_positions", 2048),
    Field("rms_norm_eps", "norm_eps", 1e-6),
    Field("rope_theta", "rope_theta", 10000.0),
    Field("tie_word_embeddings", "tied_head", kind=Any),  # in either of two objects: `config_parts.is_tied`
    Field("bos_token_id", "bos_id", 1),
    Field("eos_token_id", "eos_ids", 2, kind=Ids),
    Field("pad_token_id", "pad_id"),
)
BIASES = {"attention_bias": bool | None, "mlp_bias": bool | None}  # read by LLaMA alone, as in transformers
ONLY = NEVER | {"partial_rotary_factor": (None, 1, 1.0)}
WINDOW_KEYS = ["layer_types", "max_window_layers", "sliding_window", "use_sliding_window"]
TENSORS = (
    ("embed_tokens.weight", "decoder/embed/embedding", KEEP),
    *linear("layers.{i}.self_attn.q_proj", "decoder/layers/{i}/attention/q"),
    *linear("layers.{i}.self_attn.k_proj", "decoder/layers/{i}/attention/k"),
    *linear("layers.{i}.self_attn.v_proj", "decoder/layers/{i}/attention/v"),
    *linear("layers.{i}.self_attn.o_proj", "decoder/layers/{i}/attention/o"),
    *linear("layers.{i}.mlp.gate_proj", "decoder/layers/{i}/mlp/gate"),
    *linear("layers.{i}.mlp.up_proj", "decoder/layers/{i}/mlp/up"),
    *linear("layers.{i}.mlp.down_proj", "decoder/layers/{i}/mlp/down"),
    ("layers.{i}.input_layernorm.weight", "decoder/layers/{i}/attention_norm/scale", KEEP),
    ("layers.{i}.post_attention_layernorm.weight", "decoder/layers/{i}/mlp_norm/scale", KEEP),
    ("norm.weight", "decoder/norm/scale", KEEP),
)
COMPUTED = ("rotary_emb.inv_freq", "masked_bias", "attn.bias")


def read(get: Callable[[str], Any]) -> dict[str, Any]:
    """The fields of `TextConfig` that are not copies of one of LLaMA's."""
    heads = get("num_attention_heads")
    return {
        "kv_heads": get("num_key_value_heads") or heads,
        "head_width": get("head_dim") or get("hidden_size") // heads,
        "eos_ids": read_ids(get("eos_token_id")),
        **read_rope(get),
    }


def _read(get: Callable[[str], Any]) -> dict[str, Any]:
    attention, mlp = bool(get("attention_bias")), bool(get("mlp_bias"))
    return {**read(get), "qkv_bias": attention, "o_bias": attention, "mlp_bias": mlp}


def write(text: TextConfig) -> dict[str, Any]:
    """The fields of LLaMA and related families that are not copies of one of `TextConfig`'s."""
    return {"eos_token_id": write_ids(text.eos_ids), **write_rope(text.rope_scaling)}


def _write(text: TextConfig) -> dict[str, Any]:
    if text.qkv_bias != text.o_bias:
        raise InputError("no format supports a LLaMA decoder with biases on some projections of its attention only")
    return {**write(text), "attention_bias": text.o_bias, "mlp_bias": text.mlp_bias}


LLAMA = Decoder(
    name="llama",
    model_type="llama",
    originals=("llava_llama", "llama", "Yi"),
    classes=("LlavaLlamaForCausalLM", "LlamaForCausalLM", "LLaMAForCausalLM", "YiForCausalLM"),
    fields=FIELDS,
    more=BIASES | ROPE_TYPES,
    read=_read,
    write=_write,
    ignored=frozenset(WINDOW_KEYS + GENERAL),
    only=ONLY,
    tensors=TENSORS,
    computed=COMPUTED,
)
