"""What the released LLaVAs say of themselves, at tiny sizes, and the ids that the reference gives their prompts.

    python zoo.py    with transformers==4.37.2 sentencepiece "numpy<2": zoo.json

Fields are those of the published files as docs/MODEL_ZOO.md, the training scripts and the releases' own config.json
have them; sizes are small, and tokenizers are those of `tokenizers/` that are of the same kind. Ids are made as
llava/mm_utils.py `tokenizer_image_token` makes them: text around images tokenized by itself, one BOS kept.
"""

import json
import shutil
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
CLIP = "openai/clip-vit-large-patch14"
COMMON = {
    "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1,
    "num_key_value_heads": 1, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "vocab_size": 32000,
    "mm_hidden_size": 1024, "mm_vision_select_layer": -2, "mm_use_im_start_end": False, "mm_use_im_patch_token": False,
    "tie_word_embeddings": False, "use_cache": True, "torch_dtype": "float16", "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LLAMA = COMMON | {"architectures": ["LlavaLlamaForCausalLM"], "model_type": "llava"}
V1 = LLAMA | {"mm_vision_tower": CLIP, "mm_projector_type": "linear", "max_position_embeddings": 2048}
V15 = LLAMA | {
    "mm_vision_tower": f"{CLIP}-336", "mm_projector_type": "mlp2x_gelu", "image_aspect_ratio": "pad",
    "mm_vision_select_feature": "patch", "freeze_mm_mlp_adapter": False, "tune_mm_mlp_adapter": False,
    "unfreeze_mm_vision_tower": False, "use_mm_proj": True, "pad_token_id": 0,
}  # fmt: skip
V16 = V15 | {
    "image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad", "image_crop_resolution": 224,
    "image_split_resolution": 224, "mm_vision_tower_lr": 2e-6, "unfreeze_mm_vision_tower": True,
    "tokenizer_padding_side": "right", "tokenizer_model_max_length": 4096,
    "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
}  # fmt: skip
TAGGED = {"mm_use_im_start_end": True, "vocab_size": 32003}
HUMAN = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
SEEING = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
QUESTION = "What is shown in this image?"
VICUNA = f"{HUMAN} USER: <image>\n{QUESTION} ASSISTANT:"
LLAMA_2 = f"[INST] <<SYS>>\n{SEEING}\n<</SYS>>\n\n<image>\n{QUESTION} [/INST]"
# The 34B's decoder is Yi's, whose end token is <|im_end|>.
YI = {"vocab_size": 64000, "eos_token_id": 7}

# name: config.json, kind of tokenizer, legacy, prompt
ZOO = {
    "LLaVA-13b-delta-v0": (
        V1 | TAGGED, "llama", True, f"{HUMAN}###Human: <im_start><image><im_end>\n{QUESTION}###Assistant:",
    ),
    "LLaVA-13b-delta-v1-1": (V1 | TAGGED, "llama", True, VICUNA.replace("<image>", "<im_start><image><im_end>")),
    "llava-llama-2-13b-chat-lightning-preview": (V1, "llama", False, LLAMA_2),
    "llava-llama-2-7b-chat-lightning-lora-preview": (V1, "llama", True, LLAMA_2),
    "llava-v1-0719-336px-lora-merge-vicuna-13b-v1.3": (V1 | {"mm_vision_tower": f"{CLIP}-336"}, "llama", True, VICUNA),
    "llava-lcs558k-scienceqa-vicuna-13b-v1.3": (V1, "llama", True, VICUNA),
    "llava-v1.5-7b": (V15 | {"model_type": "llava_llama"}, "llama", False, VICUNA),
    "llava-v1.5-13b": (V15, "llama", False, VICUNA),
    "llava-v1.6-vicuna-7b": (V16, "llama", False, VICUNA),
    "llava-v1.6-vicuna-13b": (V16 | {"model_type": "llava_llama"}, "llama", False, VICUNA),
    "llava-v1.6-mistral-7b": (
        V16 | {"architectures": ["LlavaMistralForCausalLM"], "model_type": "llava_mistral", "sliding_window": None},
        "mistral-v0.2", True, f"[INST] <image>\n{QUESTION} [/INST]",
    ),
    "llava-v1.6-34b": (
        V16 | YI, "yi", True,
        f"<|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\n<image>\n{QUESTION}<|im_end|>"
        "<|im_start|>assistant\n",
    ),
    "llama3-llava-next-8b": (
        V16 | {"model_type": "llava_llama", "vocab_size": 128256, "eos_token_id": 128001, "bos_token_id": 128000},
        "llama-3", None,
        f"<|start_header_id|>system<|end_header_id|>\n\n{SEEING}<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
        f"<image>\n{QUESTION}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "llava-next-72b": (
        V16 | {
            "architectures": ["LlavaQwenForCausalLM"], "model_type": "llava_qwen", "vocab_size": 152064,
            "max_window_layers": 70, "use_sliding_window": False, "sliding_window": 32768, "eos_token_id": 151645,
        },
        "qwen-2", None,
        f"<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<image>\n{QUESTION}<|im_end|>\n"
        "<|im_start|>assistant\n",
    ),
}  # fmt: skip
REFUSED = {
    "LLaVA-Lightning-MPT-7B-preview": COMMON | {"architectures": ["LlavaMPTForCausalLM"], "model_type": "llava_mpt"}
}
TAGS = ["<im_patch>", "<im_start>", "<im_end>"]


def write_tokenizer(directory: Path, name: str) -> None:
    """The tokenizer of a released model, as its files have it."""
    config, kind, legacy, _ = ZOO[name]
    source = HERE / "tokenizers" / ("llama" if kind == "mistral-v0.2" else kind)
    shutil.copytree(source, directory, dirs_exist_ok=True)
    path = directory / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    if legacy is not None:
        settings["legacy"] = legacy
    path.write_text(json.dumps(settings))
    if config["mm_use_im_start_end"]:
        added = {token: 500 + i for i, token in enumerate(TAGS)}
        (directory / "added_tokens.json").write_text(json.dumps(added))


def ids_of(name: str) -> list[int]:
    import transformers

    _, kind, legacy, prompt = ZOO[name]
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        write_tokenizer(directory, name)
        if legacy is not None:
            tokenizer = transformers.LlamaTokenizer.from_pretrained(directory)
        elif kind == "qwen-2":
            model = json.loads((directory / "tokenizer.json").read_text())
            (directory / "vocab.json").write_text(json.dumps(model["model"]["vocab"]))
            merges = [" ".join(pair) for pair in model["model"]["merges"]]
            (directory / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
            special = {token["content"]: token["id"] for token in model["added_tokens"]}
            settings = {"added_tokens_decoder": {str(i): {"content": t, "special": True} for t, i in special.items()}}
            (directory / "tokenizer_config.json").write_text(json.dumps(settings))
            tokenizer = transformers.Qwen2Tokenizer.from_pretrained(directory)
        else:  # of Llama 3 there is no slow one; this version wants its file in an older form
            fields = json.loads((directory / "tokenizer.json").read_text())
            fields["model"].pop("ignore_merges")
            fields["model"]["merges"] = [" ".join(pair) for pair in fields["model"]["merges"]]
            (directory / "tokenizer.json").write_text(json.dumps(fields))
            tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(directory)
        chunks = [tokenizer(chunk).input_ids for chunk in prompt.split("<image>")]
    bos = tokenizer.bos_token_id
    ids = chunks[0][:1] if chunks[0] and chunks[0][0] == bos else []
    offset = len(ids)
    for i, chunk in enumerate(chunks):
        ids = ids + [-200] * bool(i) + chunk[offset:]
    return ids


if __name__ == "__main__":
    (HERE / "zoo.json").write_text(json.dumps({name: ids_of(name) for name in ZOO}) + "\n")
