"""Convert, inspect and compare checkpoints.

python -m convert to-orbax SRC DST      convert any supported LLaVA weights to our Orbax format
python -m convert to-hf SRC DST         convert any checkpoint to transformers' format or the original's
python -m convert inspect DIR           list tensors and configuration
python -m convert verify A B            compare two checkpoints
"""

import argparse
import json
from pathlib import Path

from llava_jax.config import ASPECT_RATIOS
from llava_jax.console import SEED, InputError, Parser, note, run_main, terminal_safe
from llava_jax.sizes import parse_size

TYPES = ["bfloat16", "float16", "float32"]


def parser() -> argparse.ArgumentParser:
    p = Parser(prog="python -m convert", description="Convert, inspect and compare checkpoints.")
    commands = p.add_subparsers(dest="command", required=True, metavar="COMMAND")

    c = commands.add_parser(
        "to-orbax",
        help="convert any supported LLaVA weights to our Orbax format",
        usage="python -m convert to-orbax SRC DST [options]",
        epilog="SRC is a directory or a hub name: a whole LLaVA (original or transformers; .safetensors or .bin), a "
        "plain language model (with --vision-tower), a LoRA adapter (with --base), a stage 1 mm_projector.bin (with "
        "--base), or absent, with --base DIR --delta DIR.",
    )
    c.add_argument("paths", nargs="+", metavar="SRC DST", help="the checkpoint to convert, and the directory to write")
    c.add_argument("--vision-tower", metavar="DIR", help="CLIP directory or hub name, for weights without a tower")
    c.add_argument("--base", metavar="DIR", help="the model that an adapter, a delta or a projector was trained on")
    c.add_argument("--delta", metavar="DIR", help="weights to add to those of --base")
    c.add_argument("--projector", metavar="FILE", help="mm_projector.bin or .safetensors to use")
    c.add_argument(
        "--projector-type", metavar="TYPE", help="type of a new projector: linear, mlp2x_gelu (default), ..."
    )
    c.add_argument("--aspect-ratio", choices=ASPECT_RATIOS, help="for language models; default: pad")
    c.add_argument("--seed", type=SEED, default=0, metavar="N", help="random seed of a new projector (default 0)")
    c.add_argument("--dtype", choices=TYPES, help="dtype to store; default: unchanged")
    c.add_argument("--allow-nonfinite", action="store_true", help="also convert tensors with NaN or infinity")
    c.add_argument("--overwrite", action="store_true", help="replace DST if it exists")
    c.set_defaults(run=run_to_orbax)

    c = commands.add_parser("to-hf", help="convert to transformers' format or the original's")
    c.add_argument("source", metavar="SRC", help="an Orbax directory, or any complete LLaVA checkpoint")
    c.add_argument("destination", metavar="DST", help="directory to write")
    c.add_argument(
        "--format", choices=["transformers", "original"], default="transformers", help="(default: transformers)"
    )
    c.add_argument("--part", choices=["model", "projector"], default="model", help="(default: model)")
    c.add_argument("--vision-tower", metavar="DIR", help="CLIP directory, for original checkpoints without it")
    c.add_argument("--dtype", choices=TYPES, help="dtype to store; default: unchanged")
    c.add_argument("--allow-nonfinite", action="store_true", help="also write tensors with NaN or infinity")
    c.add_argument(
        "--max-shard-size",
        type=parse_size,
        default="5GB",
        metavar="SIZE",
        help="largest file size, for example 500MB (default 5GB)",
    )
    c.add_argument("--overwrite", action="store_true", help="replace DST if it exists")
    c.set_defaults(run=run_to_hf)

    c = commands.add_parser("inspect", help="list every tensor, totals per component, and the configuration")
    c.add_argument(
        "directory", metavar="DIR", help="any checkpoint, complete or not, or one file; only headers are read"
    )
    c.add_argument("--json", action="store_true", help="print one JSON object")
    c.set_defaults(run=run_inspect)

    c = commands.add_parser("verify", help="compare two checkpoints in any formats, tensor by tensor")
    c.add_argument("a", metavar="A")
    c.add_argument("b", metavar="B")
    c.add_argument("--vision-tower", metavar="DIR", help="CLIP directory, for original checkpoints without it")
    c.add_argument("--json", action="store_true", help="print one JSON object per tensor")
    c.set_defaults(run=run_verify)
    return p


def run_to_orbax(args: argparse.Namespace) -> None:
    *source, destination = args.paths
    if len(source) > 1:
        raise InputError(f"to-orbax takes SRC and DST, got {len(args.paths)} paths")
    if args.delta and not args.base:
        raise InputError("--delta needs --base, the model that the delta applies to")
    if args.delta and source and Path(source[0]) not in (Path(args.base), Path(args.delta)):
        raise InputError("--base and --delta replace SRC; give only DST")
    if not source and not args.delta:
        raise InputError("to-orbax needs SRC and DST")
    from convert.to_orbax import to_orbax

    to_orbax(
        source[0] if source else args.delta,
        destination,
        base=args.base,
        delta=args.delta,
        vision_tower=args.vision_tower,
        projector=args.projector,
        projector_type=args.projector_type,
        aspect_ratio=args.aspect_ratio,
        seed=args.seed,
        dtype=args.dtype,
        allow_nonfinite=args.allow_nonfinite,
        overwrite=args.overwrite,
    )
    note(f"wrote {destination}")


def run_to_hf(args: argparse.Namespace) -> None:
    from convert.to_hf import to_hf

    to_hf(
        args.source,
        args.destination,
        form=args.format,
        part=args.part,
        dtype=args.dtype,
        shard_bytes=args.max_shard_size,
        vision_tower=args.vision_tower,
        allow_nonfinite=args.allow_nonfinite,
        overwrite=args.overwrite,
    )
    note(f"wrote {args.destination}")


def run_inspect(args: argparse.Namespace) -> None:
    from convert.inspect import inspect, table

    found = inspect(args.directory)
    print(json.dumps(found) if args.json else terminal_safe(table(found)))


def run_verify(args: argparse.Namespace) -> int:
    from convert.verify import verify

    counts: dict[str, int] = {}
    for row in list(
        verify(args.a, args.b, vision_tower=args.vision_tower)
    ):  # a list, so that the progress bar is finished first
        counts[row.result] = counts.get(row.result, 0) + 1
        if args.json:
            print(json.dumps(row._asdict()))
        elif row.result.startswith("only"):
            print(terminal_safe(f"{row.path}: {row.result}"))
        else:
            gap = f", at most {row.absolute:.3g}, relative {row.relative:.3g}" if row.absolute else ""
            print(terminal_safe(f"{row.path}: {row.result}{gap}" + (f" ({row.note})" if row.note else "")))
    note("; ".join(f"{n} {result}" for result, n in counts.items()))
    return 1 if counts.get("different") else 0


def main() -> int | None:
    args = parser().parse_args()
    return args.run(args)


def run() -> None:
    """The command `llava-convert`."""
    run_main(main)


if __name__ == "__main__":
    run()
