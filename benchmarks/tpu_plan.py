"""Generate the tables of docs/tpu-plan.md: requirements of training by model, stage and slice, and how many slots of
generation fit, by model and slice.

    python benchmarks/tpu_plan.py               # takes minutes per row; resumes where it stopped
    python benchmarks/tpu_plan.py --only 34b    # only these of the missing rows
    python benchmarks/tpu_plan.py --slots       # compile nothing; print the table of slots

Each row is a run of `python -m train.plan` or `python -m infer.plan`. Their output is kept in docs/tpu-plan.json and
docs/serve-plan.json, and rows in those files are not compiled again. The page gets all rows.
"""

import argparse
import json
import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from llava_jax.aot import tpu
from llava_jax.aot.hlo import Work

ROOT = Path(__file__).parents[1]
PLANS, SERVE_PLANS = ROOT / "docs" / "tpu-plan.json", ROOT / "docs" / "serve-plan.json"
PAGE = ROOT / "docs" / "tpu-plan.md"

SMALL, NEXT, MIDDLE, LARGE = "llava-v1.5-7b", "llava-v1.6-mistral-7b", "llava-v1.5-13b", "llava-v1.6-34b"
FULL = {  # slices for full training
    SMALL: ["v4:2x2x4", "v5e:4x4", "v5e:8x8", "v5p:2x2x2", "v6e:2x4"],
    NEXT: ["v4:2x2x4", "v5e:8x8", "v5p:2x2x4", "v6e:4x4"],
    MIDDLE: ["v4:2x2x4", "v5e:8x8", "v5p:2x2x4", "v6e:4x4"],
    LARGE: ["v4:4x4x4", "v5e:8x16", "v5p:4x4x4", "v6e:8x8"],
}
FEW = {  # slices for training a projector or adapters
    SMALL: ["v4:2x2x1", "v5e:2x4", "v5p:2x2x1", "v6e:2x2"],
    MIDDLE: ["v4:2x2x2", "v5e:2x4", "v5p:2x2x1", "v6e:2x4"],
    LARGE: ["v4:2x2x4", "v5e:4x4", "v5p:2x2x2", "v6e:2x4"],
}
GENERATE = {
    NEXT: ["v5e:2x2", "v6e:2x2"],
    MIDDLE: ["v5e:2x2", "v6e:2x2"],
}
CACHES = {"bfloat16": "", "int8": " --int8-cache"}
# Flags that adapt a v1.5 stage to a v1.6 model: image mode, and template if the stage has one.
AS_STAGE = {"v1.5-pretrain": " --aspect-ratio square", "v1.5-finetune-lora": " --aspect-ratio pad --template v1"}
OTHERS = [
    f"{SMALL} --preset v1.5-finetune --topology v5e:4x4 --reduce-dtype float32",
    f"{SMALL} --preset v1.5-finetune --topology v5e:4x8 --rows-per-chip 4 --tiles-per-row 0",
] + [
    f"{SMALL} --preset v1.5-finetune --topology v5p:2x2x2 --rows-per-chip 4{remat}"
    for remat in ("", " --remat minimal", " --remat dots", " --remat none")
]


def commands() -> list[str]:
    """Of training."""
    trained = [
        f"{model} --preset {preset or f'{model[6:10]}-finetune'} --topology {topology}"
        + (AS_STAGE.get(preset, "") if "v1.6" in model else "")
        for preset, slices in (("v1.5-pretrain", FEW), ("", FULL), ("v1.5-finetune-lora", FEW))
        for model, topologies in slices.items()
        for topology in topologies
    ]
    return [f"train.plan --model {rest}" for rest in trained + OTHERS]


def serve_commands() -> list[str]:
    """Of generation."""
    return [
        f"infer.plan --model {model} --topology {topology} --mesh tensor={chips(topology)} --context 4096{cache}"
        for model, topologies in GENERATE.items()
        for topology in topologies
        for cache in CACHES.values()
    ]


def chips(topology: str) -> int:
    return math.prod(map(int, topology.partition(":")[2].split("x")))


def run(command: str) -> dict | None:
    """Run a plan. Training uses one row per chip unless specified, which compares slices rather than plans a batch."""
    rows = ["--rows-per-chip", "1"] if command.startswith("train.plan") and "--rows-per-chip" not in command else []
    done = subprocess.run(
        [sys.executable, "-m", *command.split(), *rows, "--json"], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    return json.loads(done.stdout) if done.stdout.strip() else None


def input_cells(command: str) -> list[str]:
    """The first cells of a row: model, what, slice, flags."""
    words = command.split()[1:]
    flags = dict(zip(words[::2], words[1::2], strict=True))
    what = flags.pop("--preset")
    model, topology = flags.pop("--model").removeprefix("llava-"), flags.pop("--topology")
    others = ", ".join(f"{flag.removeprefix('--').replace('-', ' ')} {value}" for flag, value in flags.items())
    return [model, what, topology, others]


def result_cells(plan: dict) -> list[str]:
    """The other cells of a row."""
    gb = lambda n: f"{n / 1e9:.1f}"  # noqa: E731
    cells = [
        f"{gb(plan['peak_bytes_per_chip'])} of {gb(plan['hbm_bytes_per_chip'])}",
        gb(plan["parameter_bytes_per_chip"] + plan["optimizer_bytes_per_chip"]),
    ]
    if plan["executed_flops_per_chip"]:
        sent, least = sum(plan["collective_bytes_per_chip"].values()), plan["least_collective_bytes_per_chip"]
        cells.append(f"{plan['executed_flops_per_chip'] / plan['model_flops_per_chip']:.2f}")
        cells.append(f"{sent / 1e9:.3g}" + (f" ({sent / least:.2f})" if least else ""))
    else:
        cells += ["not known" if plan["fits"] else "does not fit", ""]
    return [*cells, f"{plan['compile_seconds']:.0f}"]


def rows_of(heads: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [heads, ["---"] * len(heads), *rows])


def table(plans: dict[str, dict]) -> str:
    heads = [
        *("model", "what", "slice", "flags", "peak GB", "of it parameters and optimizer"),
        *("executed / model's FLOPs", "sent GB (/ least)", "compiled in s"),
    ]
    return rows_of(heads, [[*input_cells(command), *result_cells(plan)] for command, plan in plans.items()])


def serve_table(plans: dict[str, dict]) -> str:
    """A row for each model and slice: the slots that fit with each kind of cache, and what a decode step of so many
    moves and sends."""
    heads = [
        *("model", "slice", *(f"slots, {cache}" for cache in CACHES), *(f"MB a slot, {cache}" for cache in CACHES)),
        *("peak GB", "HBM / least", "sent / least", "a decode step at least, ms"),
    ]
    rows = []
    for command, plan in plans.items():
        if CACHES["int8"] in command:
            continue
        words = command.split()
        pair = [plan, plans.get(command + CACHES["int8"])]
        decode, topology = plan["functions"]["decode"], words[4]
        sent = sum(decode["collective_bytes_per_chip"].values())
        work = Work(decode["executed_flops_per_chip"], decode["moved_bytes_per_chip"], {"": sent})
        rows.append([
            words[2].removeprefix("llava-"), topology,
            *(str(one["slots_that_fit"]) if one else "" for one in pair),
            *(f"{one['bytes_per_slot'] / 1e6:.0f}" if one else "" for one in pair),
            f"{plan['peak_bytes_per_chip'] / 1e9:.1f} of {plan['hbm_bytes_per_chip'] / 1e9:.1f}",
            f"{decode['moved_bytes_per_chip'] / decode['least_moved_bytes_per_chip']:.2f}",
            f"{sent / decode['least_collective_bytes_per_chip']:.2f}",
            f"{1000 * max(tpu.roofline(work, topology).values()):.1f}",
        ])  # fmt: skip
    return rows_of(heads, rows)


def write_page(plans: dict[str, dict], serve_plans: dict[str, dict]) -> None:
    """Write the tables between their markers in the page."""
    text = PAGE.read_text()
    for name, rows in (("table", table(plans)), ("slots", serve_table(serve_plans))):
        before, rest = text.split(f"<!-- {name} -->\n")
        after = rest.split(f"<!-- end of {name} -->\n")[1]
        text = f"{before}<!-- {name} -->\n{rows}\n<!-- end of {name} -->\n{after}"
    PAGE.write_text(text)


def compile_missing(file: Path, wanted: list[str], only: str, jobs: int) -> dict[str, dict]:
    """The plans of a file, with those that it lacks."""
    plans = json.loads(file.read_text()) if file.exists() else {}
    missing = [command for command in wanted if command not in plans and only in command]
    with ThreadPoolExecutor(jobs) as pool:
        running = {pool.submit(run, command): command for command in missing}
        for done in as_completed(running):
            if plan := done.result():
                plans[running[done]] = plan
                plans = {command: plans[command] for command in wanted if command in plans}
                file.write_text(json.dumps(plans, indent=1) + "\n")
    return plans


def main() -> None:
    p = argparse.ArgumentParser(description="Generate the tables of docs/tpu-plan.md.")
    p.add_argument("--only", default="", metavar="TEXT", help="only rows whose command contains this")
    p.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="number to compile at a time, some GB each (default 1)"
    )
    p.add_argument("--slots", action="store_true", help="compile nothing, and print the table of slots")
    args = p.parse_args()
    if args.slots:
        print(serve_table(json.loads(SERVE_PLANS.read_text())))
        return
    serve_plans = compile_missing(SERVE_PLANS, serve_commands(), args.only, args.jobs)
    write_page(compile_missing(PLANS, commands(), args.only, args.jobs), serve_plans)


if __name__ == "__main__":
    main()
