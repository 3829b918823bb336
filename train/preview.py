"""Preview a data file as the model will see it.

    python -m train.preview --data data.json --image-folder images --checkpoint DIR --preset v1.5-finetune -n 5

For each conversation: its decoded prompt, with the trained text in green (in [[ ]] if the output is not a terminal),
the tiles of its images, its length, and how much is truncated. Loads no weights.
"""

import argparse
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

from llava_jax.config import ASPECT_RATIOS
from llava_jax.console import (
    MAX_INT32,
    InputError,
    Parser,
    integer,
    note,
    print_json,
    printable,
    ranges,
    run_main,
    shorten,
    terminal_safe,
)
from llava_jax.data.splice import IGNORE, IMAGE, TEXT, Row, count_features, splice
from llava_jax.data.tokenizer import Tokenizer
from llava_jax.data.urls import display_name
from train.config import IMAGE_FIRST, PRESETS, TrainConfig, check_preset
from train.samples import BadSample, Sample, Samples


def parser() -> argparse.ArgumentParser:
    p = Parser(prog="python -m train.preview", description="Preview a data file as the model will see it.")
    p.add_argument(
        "--data", required=True, action="append", metavar="FILE", help="conversations, as for training; repeatable"
    )
    p.add_argument("--checkpoint", required=True, metavar="DIR", help="a checkpoint directory or a hub name")
    p.add_argument("--vision-tower", metavar="DIR", help="CLIP directory, for original checkpoints without it")
    p.add_argument("--image-folder", default="", metavar="DIR", help="default: the current directory")
    p.add_argument(
        "--preset", choices=PRESETS, help="take template, length, aspect ratio and image order from a preset"
    )
    p.add_argument("--follow-links", action="store_true", help="links in the image folder may point outside it")
    p.add_argument("--template", metavar="NAME", help="conversation template; default: the preset's or checkpoint's")
    limits = ranges(TrainConfig)
    p.add_argument(
        "--max-length", type=limits["max_length"], metavar="N", help="truncate conversations after this many positions"
    )
    p.add_argument("--aspect-ratio", choices=ASPECT_RATIOS, help="default: the preset's or checkpoint's")
    p.add_argument("--image-first", choices=IMAGE_FIRST, help="default: the preset's or as_is")
    p.add_argument(
        "--seed", type=limits["seed"], metavar="N", help="seed of --image-first random, as for training (default 0)"
    )
    p.add_argument(
        "--epoch", type=integer(0, MAX_INT32), default=0, metavar="N",
        help="epoch of --image-first random (default 0, the first)",
    )  # fmt: skip
    p.add_argument("-n", type=integer(1, MAX_INT32), default=5, metavar="N", help="conversations to show (default 5)")
    p.add_argument(
        "--start", type=integer(0, MAX_INT32), default=0, metavar="ROW", help="the first row to show (default 0)"
    )
    p.add_argument(
        "--json", action="store_true", help="one JSON object per conversation: ids, labels, positions after splicing"
    )
    return p


def main() -> int:
    args = parser().parse_args()
    config = PRESETS[args.preset] if args.preset else TrainConfig()
    given = {name: getattr(args, name) for name in ("template", "max_length", "aspect_ratio", "image_first", "seed")}
    config = config.replace(**{name: value for name, value in given.items() if value is not None})

    from llava_jax.checkpoints.checkpoint import open_checkpoint  # slow, and not needed for --help

    found = open_checkpoint(args.checkpoint, vision_tower=args.vision_tower)
    check_preset(config, found.config)
    model = found.config.replace(aspect_ratio=config.aspect_ratio) if config.aspect_ratio else found.config
    samples = Samples(
        args.data,
        args.image_folder,
        model,
        found.tokenizer,
        template=config.template,
        max_length=config.max_length,
        image_first=config.image_first,
        seed=config.seed,
        follow_links=args.follow_links,
    )
    indices = range(args.start, min(args.start + args.n, len(samples)))
    if not indices:
        raise InputError(f"{samples.path} has {len(samples)} rows, none from --start {args.start} on")
    bad = 0
    for index in indices:
        sample = samples.measure(index, args.epoch)
        row = samples.load(sample) if isinstance(sample, Sample) else sample
        if isinstance(row, BadSample):
            bad += 1
            if args.json:
                described = {"data": row.data, "index": row.index, "id": row.id, "file": row.file, "error": row.reason}
                print_json(described)
            note(f"error: {row.describe()}")
            continue
        assert isinstance(sample, Sample)
        described = describe(samples, sample, row, model, found.tokenizer)
        print_json(described) if args.json else print(render(samples, described))
    return 1 if bad else 0


def describe(samples: Samples, sample: Sample, row: Row, model, tokenizer: Tokenizer) -> dict[str, Any]:
    """The output of `--json` for a conversation. `ids` is -200 at image tokens."""
    batch = splice([row], model, max_length=sample.length)
    return {
        "data": sample.data,
        "index": sample.index,
        "id": sample.id,
        "template": samples.template,
        "length": sample.length,
        "cut": sample.truncated,
        "trained": int((batch.labels[0, 1:] != IGNORE).sum()),
        "images": [
            {
                "file": display_name(name),
                "grid": layout.grid,
                "tiles": layout.tiles,
                "features": count_features(layout, model),
            }
            for name, layout in zip(samples.encode(sample).names, row.layouts, strict=False)  # without truncated images
        ],
        "text": [{"text": text, "trained": trained} for text, trained in pieces(row, tokenizer)],
        "ids": np.where(batch.feature_rows[0] == TEXT, batch.ids[0], IMAGE).tolist(),
        "labels": batch.labels[0].tolist(),
        "positions": batch.positions[0].tolist(),
        "feature_rows": batch.feature_rows[0].tolist(),
    }


def pieces(row: Row, tokenizer: Tokenizer) -> Iterator[tuple[str, bool]]:
    """The text of a conversation's tokens, including special ones, in runs that are trained or not."""
    assert row.labels is not None
    trained = row.labels != IGNORE
    image = row.ids == IMAGE
    changes = np.flatnonzero((trained[1:] != trained[:-1]) | image[1:] | image[:-1]) + 1
    start, before = 0, ""  # since the last image: the text of a token depends on those before it
    for begin, end in zip([0, *changes], [*changes, len(row.ids)], strict=True):
        if image[begin]:
            start, before = end, ""
            yield "<image>", False
            continue
        text = tokenizer.decode(row.ids[start:end], special=True)
        yield text[len(before) :], bool(trained[begin])
        before = text


def render(samples: Samples, described: dict[str, Any]) -> str:
    """Format the description of a conversation."""
    begin, end = ("\x1b[32m", "\x1b[0m") if sys.stdout.isatty() else ("[[", "]]")
    lines = [
        f"row {described['index']} (id {shorten(described['id'], 40)}), template {described['template']}: "
        f"{described['length']} positions, {described['trained']} of them trained, "
        + (f"{described['cut']} truncated" if described["cut"] else "none truncated")
    ]
    for image in described["images"]:
        tiles = (
            "1 tile" if image["grid"] is None else f"{image['tiles']} tiles, grid {image['grid'][0]}x{image['grid'][1]}"
        )
        lines.append(f"  {image['file']}: {tiles}, {image['features']} features")
    text = "".join(
        f"{begin}{terminal_safe(run['text'])}{end}" if run["trained"] else terminal_safe(run["text"])
        for run in described["text"]
    )
    return "\n".join([*map(printable, lines), text, ""])


if __name__ == "__main__":
    run_main(main)
