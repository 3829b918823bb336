"""Train LLaVA, both stages.

    python -m train --preset v1.5-pretrain --checkpoint DIR --data FILE.json --image-folder DIR --output DIR
    python -m train --list-presets

The same command resumes a run that was interrupted. Every field of `TrainConfig` is a flag.
"""

import argparse
import dataclasses
import difflib
import os
import sys
import types
import typing

from llava_jax.console import (
    InputError,
    Parser,
    enable_compilation_cache,
    flag_of,
    integer,
    note,
    run_main,
    shorten,
    silence_notes,
)
from llava_jax.processes import are_several, connect, watched

if typing.TYPE_CHECKING:
    from train.config import TrainConfig

REPEATABLE = ("data", "eval_data")  # flags that may be repeated, once per file
MAX_PROCESSES = 2**16
PATHS = ("checkpoint", "vision_tower", "data", "image_folder", "eval_data", "eval_data_dir", "output")


def parser() -> argparse.ArgumentParser:
    from train.config import PRESETS

    p = Parser(prog="python -m train", description="Train LLaVA, both stages.", allow_abbrev=False)
    p.add_argument("--preset", metavar="NAME", help=f"start from these values: {', '.join(PRESETS)}")
    p.add_argument("--list-presets", action="store_true", help="print the presets, and exit")
    group = p.add_argument_group("several processes (on Cloud TPUs they find each other without these)")
    group.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0, and a free port there")
    group.add_argument(
        "--process-id", type=integer(0, MAX_PROCESSES - 1), metavar="N", help="number of this process, from 0"
    )
    group.add_argument("--processes", type=integer(1, MAX_PROCESSES), metavar="N", help="number of processes")
    group.add_argument(
        "--heartbeat",
        type=integer(1, 86400),
        default=40,
        metavar="SECONDS",
        help="silence after which a process counts as dead (default 40)",
    )
    add_fields(p.add_argument_group("the run"))
    return p


def add_fields(p, known: tuple[str, ...] = ()) -> None:
    """Add a flag for each field of `TrainConfig` that is not in `known`."""
    from train.config import TrainConfig

    for field in dataclasses.fields(TrainConfig):
        flag = flag_of(field.name)
        text = f"{field.metadata['help']} (default {show(field.default)})".replace("%", "%%")
        if field.name in known:
            continue
        if field.type is bool:
            p.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
        else:
            action = "append" if field.name in REPEATABLE else "store"
            p.add_argument(flag, metavar=field.name.upper(), action=action, help=text)


def show(value) -> str:
    """Format a value as its flag takes it."""
    return "none" if value in (None, "") else ",".join(value) if isinstance(value, tuple) else str(value)


def parse(field: dataclasses.Field, text: str):
    """Parse the value of a field from its flag.

    Raises:
      InputError: the value has the wrong type, or is out of range.
    """
    kinds = field.type.__args__ if isinstance(field.type, types.UnionType) else (field.type,)
    if type(None) in kinds and text.lower() == "none":
        return None
    if allowed := field.metadata.get("range"):
        try:
            return allowed(text)
        except argparse.ArgumentTypeError as error:
            raise InputError(f"{flag_of(field.name)} {error}") from None
    return text if str in kinds else tuple(filter(None, text.split(",")))


def read_config(arguments: list[str]) -> tuple[argparse.Namespace, "TrainConfig"]:
    """Parse the flags, and the configuration from them and the preset.

    Raises:
      InputError: a preset, flag or value is invalid, or a required flag is missing.
    """
    from train.config import TrainConfig

    p = parser()
    args, unknown = p.parse_known_args(arguments)
    for argument in unknown:
        if not argument.startswith("--"):
            raise InputError(f"{shorten(argument)!r}: belongs to no flag (--help lists all flags)")
        known = [flag for action in p._actions for flag in action.option_strings]
        raise InputError(f"unknown field {shorten(argument.split('=')[0])}{nearest(argument.split('=')[0], known)}")
    if args.list_presets:
        return args, TrainConfig()
    config = config_of(args)
    for name in ("checkpoint", "data", "output"):
        if not getattr(config, name):
            raise InputError(f"--{name} is needed")
    return args, config


def config_of(args: argparse.Namespace) -> "TrainConfig":
    """The configuration from the flags of `add_fields` and `--preset`.

    Raises:
      InputError: the preset or a value is invalid.
    """
    from train.config import PRESETS, TrainConfig

    if args.preset is not None and args.preset not in PRESETS:
        raise InputError(
            f"unknown preset {shorten(args.preset)!r}{nearest(args.preset, PRESETS)}; `python -m train --list-presets` "
            "lists all"
        )
    given = {}
    for field in dataclasses.fields(TrainConfig):
        value = getattr(args, field.name)
        if isinstance(value, list):
            value = tuple(value) if len(value) > 1 else value[0]
        if value is not None:
            given[field.name] = parse(field, value) if isinstance(value, str) else value
    for name in PATHS:  # absolute, so that a run can resume from another working directory
        value = given.get(name)
        if isinstance(value, tuple):
            given[name] = tuple(map(_absolute, value))
        elif value and not (name in ("checkpoint", "vision_tower") and not os.path.exists(value)):  # a hub name
            given[name] = _absolute(value)
    return (PRESETS[args.preset] if args.preset else TrainConfig()).replace(**given)


def _absolute(path: str) -> str:
    return path if "://" in path else os.path.abspath(path)


def describe(preset: str | None, config: "TrainConfig") -> str:
    """The values in which a configuration differs from its preset, or without one from the defaults."""
    from train.config import PRESETS, TrainConfig

    start = PRESETS[preset] if preset else TrainConfig()
    names = [field.name for field in dataclasses.fields(config)]
    own = [f"{name} {show(getattr(config, name))}" for name in names if getattr(config, name) != getattr(start, name)]
    return f"{f'preset {preset}' if preset else 'defaults'} with " + ", ".join(own)


def nearest(name: str, known) -> str:
    found = difflib.get_close_matches(name, list(known), 1)
    return f"; did you mean {found[0]}?" if found else ""


def list_presets() -> None:
    """Print the presets as a table, one column each, with the fields in which they differ; then the common values."""
    from train.config import PRESETS

    fields = [field.name for field in dataclasses.fields(PRESETS["v1.5-pretrain"])]
    rows = {name: [show(getattr(preset, name)) for preset in PRESETS.values()] for name in fields}
    differing = {name: row for name, row in rows.items() if len(set(row)) > 1}
    widths = [max(map(len, column)) for column in zip(PRESETS, *differing.values(), strict=True)]
    first = max(map(len, differing))
    for name, row in ({"": list(PRESETS)} | differing).items():
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print(f"{name:{first}}  {'  '.join(cells)}".rstrip())
    alike = {name: row[0] for name, row in rows.items() if len(set(row)) == 1}
    print("\nall presets have " + ", ".join(f"{name} {value}" for name, value in alike.items() if value != "none"))


def main() -> int:
    args, config = read_config(sys.argv[1:])
    if args.list_presets:
        list_presets()
        return 0
    connect(args.coordinator, args.process_id, args.processes, args.heartbeat)
    import jax

    if jax.process_index():
        silence_notes()
    enable_compilation_cache()
    from train.loop import train
    from train.run import prepare

    run = prepare(config)
    note(f"{describe(args.preset, config)}; the full configuration is in {run.output.root / 'config.json'}")
    for line in run.data.describe().splitlines():
        note(line)
    return train(run)


def run() -> None:
    """The command `llava-train`."""
    run_main(lambda: watched(main) if are_several(sys.argv[1:]) else main())


if __name__ == "__main__":
    run()
