"""The lengths of a mix's rows in positions, as a model sees them, and how many are truncated."""

import argparse
import dataclasses

import numpy as np

from llava_jax.config import LlavaConfig
from llava_jax.console import InputError, Progress, shorten
from llava_jax.data.conversations import read_conversation
from llava_jax.data.images import tile_layout
from llava_jax.data.prompts import encode_conversation, prepare_tokenizer
from llava_jax.data.splice import IGNORE, Row, positions_per_id
from llava_jax.data.templates import choose_template, get_template, is_jinja
from llava_jax.data.tokenizer import Tokenizer
from train.config import PRESETS, TrainConfig, check_preset
from train.datasets.mix.rows import Mix, hash_text

MAX_MEASURED = 10_000  # rows; of a larger mix, so many spread over it


@dataclasses.dataclass(frozen=True)
class Model:
    """What the lengths depend on."""

    config: LlavaConfig
    tokenizer: Tokenizer
    template: str
    max_length: int


@dataclasses.dataclass(frozen=True)
class Positions:
    """The lengths of measured rows.

    rows       int64 [m]: index into the mix
    positions  int64 [m]: images included, before truncation
    trained    int64 [m]: labels within `max_length`
    total      int64 [m]: labels, before truncation
    unfit      the number of rows that the template or the model does not allow
    """

    model: Model
    rows: np.ndarray
    positions: np.ndarray
    trained: np.ndarray
    total: np.ndarray
    unfit: int


def open_model(args: argparse.Namespace) -> Model:
    """The tokenizer and the settings of --checkpoint, --preset and --max-length.

    Raises:
      InputError: they cannot be used, or the layout of tiles needs --image-folder.
    """
    from llava_jax.checkpoints.checkpoint import open_checkpoint  # slow, and not needed for --help

    run = PRESETS[args.preset] if args.preset else TrainConfig()
    found = open_checkpoint(args.checkpoint)
    check_preset(run, found.config)
    config = found.config.replace(aspect_ratio=run.aspect_ratio) if run.aspect_ratio else found.config
    template = run.template or choose_template(config)
    if is_jinja(template):
        raise InputError(f"--checkpoint {shorten(args.checkpoint)}: has a chat template of its own; give a --preset")
    if config.aspect_ratio == "anyres" and args.image_folder is None:
        raise InputError("--checkpoint: the sizes of images determine their tiles; give --image-folder")
    prepare_tokenizer(found.tokenizer, config)
    return Model(config, found.tokenizer, template, args.max_length or run.max_length)


def measure_lengths(mix: Mix, model: Model) -> Positions:
    """Measure up to `MAX_MEASURED` rows of a mix."""
    rows = np.unique(np.linspace(0, len(mix) - 1, min(len(mix), MAX_MEASURED)).astype(np.int64))
    measured = []
    with Progress("measuring lengths", len(rows), "rows") as bar:
        for row in rows.tolist():
            bar.advance()
            try:
                measured.append((row, *_measure(mix, row, model)))
            except InputError:  # for example a conversation without an image, with the plain template
                continue
    columns = np.array(measured, np.int64).reshape(-1, 4)
    kept, positions, trained, total = columns.T
    return Positions(model, kept, positions, trained, total, unfit=len(rows) - len(columns))


def _measure(mix: Mix, row: int, model: Model) -> tuple[int, int, int]:
    """Positions, labels within `max_length`, and all labels of a row."""
    conversation = read_conversation(mix.files[mix.file[row]].rows[mix.row[row]])
    side = model.config.vision.image_size
    sizes: list[tuple[int, int]] = [(side, side)] * len(conversation.images)
    if mix.images is not None and conversation.images:
        hashes = np.array(list(map(hash_text, conversation.images)), np.uint64)
        sizes = [(width, height) for width, height in mix.images.size_of(hashes).tolist()]
    ids, labels = encode_conversation(
        conversation.turns,
        get_template(model.template),
        model.tokenizer,
        model.config,
        system=conversation.system,
        images=len(conversation.images),
    )
    layouts = tuple(tile_layout(size, model.config) for size in sizes)
    positions = positions_per_id(Row(ids, layouts, labels=labels), model.config)
    is_kept = np.cumsum(positions) - positions < model.max_length
    is_label = np.concatenate([[False], labels[1:] != IGNORE])
    return int(positions.sum()), int((is_label & is_kept).sum()), int(is_label.sum())
