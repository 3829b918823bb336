"""The small model of shapes: configuration, tokenizer, and random initialization."""

import io
import json
import math
from collections.abc import Iterable
from pathlib import Path

import jax
import jax.numpy as jnp
import sentencepiece
from flax.traverse_util import flatten_dict, unflatten_dict

from llava_jax.checkpoints import orbax_files
from llava_jax.config import LlavaConfig, TextConfig, VisionConfig
from llava_jax.data.prompts import IMAGE_TOKEN
from llava_jax.models.llava import Params, init_params

TILE, PATCH = 60, 12
CONFIG = LlavaConfig(
    text=TextConfig(
        vocab_size=640, width=128, ffn_width=384, layers=4, heads=4, kv_heads=2, head_width=32, max_positions=2048,
        rope_theta=1e6, family="mistral",
    ),
    vision=VisionConfig(
        image_size=TILE, patch_size=PATCH, width=128, ffn_width=512, layers=3, heads=4, feature_layers=(-1,)
    ),
    aspect_ratio="anyres",
    merge="spatial_unpad",
    grid_pinpoints=tuple((TILE * w, TILE * h) for w, h in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))),
    template="mistral_instruct",
    name="shapes",
)  # fmt: skip


def make_tokenizer(texts: Iterable[str], vocab_size: int) -> bytes:
    """Train a SentencePiece model with LLaMA's conventions: BPE, byte fallback, single digits, and a dummy prefix."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, model_type="bpe", vocab_size=vocab_size,
        byte_fallback=True, split_digits=True, split_by_unicode_script=False, normalization_rule_name="identity",
        remove_extra_whitespaces=False, character_coverage=1.0, minloglevel=2, num_threads=1,
    )  # fmt: skip
    return model.getvalue()


def texts_of(path: Path) -> list[str]:
    """The texts of a data file, with questions as the template renders them."""
    turns = [turn for row in json.loads(path.read_text()) for turn in row["conversations"]]
    return [
        f"[INST] {turn['value'].replace(IMAGE_TOKEN, '').strip()} [/INST]" if turn["from"] == "human" else turn["value"]
        for turn in turns
    ]


def initialize(config: LlavaConfig, seed: int, tokenizer: bytes) -> Params:
    """Random parameters that give activations of about unit variance.

    The published models' standard deviation of 0.02 suits widths of thousands. Here kernels have 1 / sqrt(fan-in), less
    if they feed a residual, and tokens have 1, like the activations added to them. The tower's position embeddings
    start as sinusoids over the tile (He et al. 2021, "Masked Autoencoders"), so that neighbours are similar. So are
    pieces of one word ("circle", "Circles?"), and the head starts as the transposed token table.
    """
    flat = flatten_dict(init_params(config, jax.random.key(seed)), sep="/")
    depth = {"vision": config.vision.layers, "decoder": config.text.layers}
    for path, x in flat.items():
        part, owner, name = path.split("/")[0], *("", *path.split("/"))[-2:]
        if name in ("kernel", "patch"):
            flat[path] = x / (0.02 * math.sqrt(x[..., 0].size))
        if owner in ("o", "down"):
            flat[path] = flat[path] / math.sqrt(2 * depth[part])
        if name == "class":
            flat[path] = x / 0.02
    flat["vision/embed/position"] = _sinusoids(config.vision)
    for i in range(config.text.layers):
        _align_queries(flat, f"decoder/layers/{i}/attention", config.text, jax.random.key(seed + i))
    flat["decoder/embed/embedding"] = table_VD = _word_vectors(tokenizer, config.text.width, seed)
    flat["decoder/head/kernel"] = table_VD.T / math.sqrt(config.text.width)
    return unflatten_dict(flat, sep="/")


def to_visual(words: jax.Array) -> jax.Array:
    """[..., D] the encoding of words in image features: orthogonal to the word vectors, so that words attend to image
    features and not only to words."""
    return words * (-1.0) ** jnp.arange(words.shape[-1])


def _align_queries(flat: dict[str, jax.Array], attention: str, config: TextConfig, key: jax.Array) -> None:
    """Initialize queries close to keys, so that attention starts between similar tokens (Trockman and Kolter 2023,
    "Mimetic Initialization"): in the first half of the heads between words and the image features that they name, in
    the others between words."""
    shape = config.width, config.kv_heads, 1, config.head_width
    k, half = flat[f"{attention}/k/kernel"], config.kv_heads // 2 * config.head_width
    k = jnp.concatenate([to_visual(k.T).T[:, :half], k[:, half:]], axis=1).reshape(shape)
    k = jnp.broadcast_to(k, (*shape[:2], config.heads // config.kv_heads, shape[3])).reshape(config.width, -1)
    noise = jax.random.normal(key, k.shape) / math.sqrt(config.width)
    flat[f"{attention}/q/kernel"] = math.sqrt(0.75) * k + math.sqrt(0.25) * noise


def _word_vectors(tokenizer: bytes, width: int, seed: int) -> jax.Array:
    """[V, D] with standard deviation 1; pieces of the same word share nine tenths of their variance."""
    pieces = sentencepiece.SentencePieceProcessor(model_proto=tokenizer)
    stems = [_stem(pieces.id_to_piece(i)) for i in range(len(pieces))]
    number = {stem: i for i, stem in enumerate(stems)}
    common, own = jax.random.normal(jax.random.key(seed), (2, len(stems), width))
    return math.sqrt(0.9) * common[jnp.array([number[stem] for stem in stems])] + math.sqrt(0.1) * own


def _stem(piece: str) -> str:
    """ "▁Circles?" to "circle" """
    word = piece.strip("▁?.,:").lower() or piece
    return word.removesuffix("es") if word.endswith("sses") else word if word.endswith("ss") else word.removesuffix("s")


def ids_of(words: Iterable[str], tokenizer: bytes) -> list[int]:
    """The id of each word: the last piece that is a form of it. Raises KeyError if there is none."""
    pieces = sentencepiece.SentencePieceProcessor(model_proto=tokenizer)
    known = {_stem(pieces.id_to_piece(i)): i for i in range(len(pieces))}
    return [known[word] for word in words]


def _sinusoids(config: VisionConfig) -> jax.Array:
    """[1 + patches, C]: sines and cosines of a patch's row and column; zero for the class token."""
    side, quarter = config.patches_per_side, config.width // 4
    angles = jnp.arange(side)[:, None] * jnp.pi / (2 * side) ** (jnp.arange(quarter) / quarter)
    waves = math.sqrt(2) * jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=1)
    rows, columns = jnp.repeat(waves, side, axis=0), jnp.tile(waves, (side, 1))
    return jnp.pad(jnp.concatenate([rows, columns], axis=1), ((1, 0), (0, 0)))


def save(directory: Path, config: LlavaConfig, params: Params, tokenizer: bytes) -> None:
    settings = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True, "legacy": True}
    files = {"tokenizer.model": tokenizer, "tokenizer_config.json": json.dumps(settings, indent=2).encode()}
    orbax_files.save(directory, params, config, files, overwrite=True)
