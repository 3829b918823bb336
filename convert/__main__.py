"""Convert checkpoints.

python -m convert to-orbax SRC DST [--vision-tower DIR] [--dtype bfloat16|float32]
"""

import argparse
from pathlib import Path

from llava_jax.console import note, run_main


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m convert", description="Convert LLaVA checkpoints.")
    commands = p.add_subparsers(dest="command", required=True, metavar="COMMAND")
    to_orbax = commands.add_parser("to-orbax", help="from safetensors, original or transformers, to our Orbax format")
    to_orbax.add_argument("source", metavar="SRC", help="directory with config.json and *.safetensors, or a hub name")
    to_orbax.add_argument("destination", metavar="DST", help="directory to write")
    to_orbax.add_argument("--vision-tower", metavar="DIR", help="CLIP directory, for originals without their tower")
    to_orbax.add_argument("--dtype", choices=["bfloat16", "float32"], help="what to store; default: as it is")
    to_orbax.add_argument("--overwrite", action="store_true", help="replace DST if it exists")
    to_orbax.set_defaults(run=run_to_orbax)
    return p


def run_to_orbax(args: argparse.Namespace) -> None:
    from convert.to_orbax import to_orbax

    to_orbax(args.source, args.destination, vision_tower=args.vision_tower, dtype=args.dtype, overwrite=args.overwrite)
    note(f"wrote {Path(args.destination)}")


def main() -> None:
    args = parser().parse_args()
    args.run(args)


if __name__ == "__main__":
    run_main(main)
