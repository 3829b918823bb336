"""What parity tests share: tiny random models of transformers, tensors compared bit for bit."""

import json
import shutil
from pathlib import Path

import torch
import transformers as tf
from safetensors.torch import load_file

from helpers import GOLDEN

MARK = 1000  # `<image>` in the vocabulary
LLAMA_3 = dict(
    rope_type="llama3", rope_theta=10000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=64,
)  # fmt: skip
PLAIN = dict(rope_type="default", rope_theta=10000.0)

# name -> (decoder class, what differs from the base)
DECODERS = {
    "llama": (tf.LlamaConfig, dict(num_key_value_heads=4)),
    "grouped": (tf.LlamaConfig, dict(num_key_value_heads=2)),
    "one key head, wide heads": (tf.LlamaConfig, dict(num_key_value_heads=1, head_dim=24)),
    "llama 3": (tf.LlamaConfig, dict(num_key_value_heads=2, rope_parameters=LLAMA_3)),
    "linear scaling": (tf.LlamaConfig, dict(rope_parameters=PLAIN | dict(rope_type="linear", factor=4.0))),
    "biases": (tf.LlamaConfig, dict(attention_bias=True, mlp_bias=True)),
    "tied": (tf.LlamaConfig, dict(tie_word_embeddings=True)),
    "mistral": (tf.MistralConfig, dict(num_key_value_heads=2, sliding_window=None)),
    "sliding window": (tf.MistralConfig, dict(num_key_value_heads=2, sliding_window=40)),
    "qwen2": (tf.Qwen2Config, dict(num_key_value_heads=2)),
}


def make_model(kind: str, decoder: str, directory):
    """A random model, its weights large enough to disagree about, saved as transformers saves."""
    cls, changes = DECODERS[decoder]
    text = cls(**dict(
        vocab_size=1064, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=1024, rms_norm_eps=1e-5, rope_parameters=PLAIN, bos_token_id=1, eos_token_id=2,
    ) | changes)  # fmt: skip
    vision = dict(
        model_type="clip_vision_model", hidden_size=32, intermediate_size=64, num_hidden_layers=3,
        num_attention_heads=4, image_size=28, patch_size=7,
    )  # fmt: skip
    common = dict(
        text_config=text.to_dict(), vision_config=vision, image_token_index=MARK,
        tie_word_embeddings=changes.get("tie_word_embeddings", False),
    )  # fmt: skip
    torch.manual_seed(0)
    if kind == "llava":
        model = tf.LlavaForConditionalGeneration(tf.LlavaConfig(**common)).eval()
    else:
        pinpoints = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]
        model = tf.LlavaNextForConditionalGeneration(
            tf.LlavaNextConfig(**common, image_grid_pinpoints=pinpoints)
        ).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:
                p.add_(0.2 * torch.randn_like(p))
            elif p.ndim > 1:
                p.mul_(4)
            else:
                p.add_(0.1 * torch.randn_like(p))
    model.save_pretrained(directory)
    if kind == "llava":  # whose processor pads only where its settings say so
        (directory / "preprocessor_config.json").write_text(json.dumps({"do_pad": True}))
    for file in (GOLDEN / "tokenizer").iterdir():
        shutil.copy(file, directory)
    return model


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in sorted(directory.glob("*.safetensors")) for k, v in load_file(file).items()}


def assert_same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() <= b.keys()
    for name, x in a.items():
        assert x.dtype == b[name].dtype, name
        assert torch.equal(x.contiguous().view(torch.uint8), b[name].contiguous().view(torch.uint8)), name
