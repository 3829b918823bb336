"""Generate the table of docs/tpu-plan.md: requirements of training and generation per chip, by model, stage and slice.

    python benchmarks/tpu_plan.py               # takes minutes per row; resumes where it stopped
    python benchmarks/tpu_plan.py --only 34b    # only these of the missing rows

Each row is a run of `python -m train.plan` or `python -m infer.plan`. Their output is kept in docs/tpu-plan.json, and
rows in that file are not compiled again. The page gets all rows.
"""

import argparse
import json
import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

ROOT = Path(__file__).parents[1]
PLANS, PAGE = ROOT / "docs" / "tpu-plan.json", ROOT / "docs" / "tpu-plan.md"

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
    NEXT: ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2"],
    MIDDLE: ["v4:2x2x1", "v5e:2x4", "v5p:2x2x1", "v6e:2x2"],
    LARGE: ["v4:2x2x2", "v5e:2x4", "v5p:2x2x1", "v6e:2x4"],
}
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
    trained = [
        f"{model} --preset {preset or f'{model[6:10]}-finetune'} --topology {topology}"
        + (AS_STAGE.get(preset, "") if "v1.6" in model else "")
        for preset, slices in (("v1.5-pretrain", FEW), ("", FULL), ("v1.5-finetune-lora", FEW))
        for model, topologies in slices.items()
        for topology in topologies
    ]
    generated = [
        f"{model} --topology {topology} --mesh tensor={chips(topology)} --batch 8 --context 4096"
        for model, topologies in GENERATE.items()
        for topology in topologies
    ]
    trained = [f"train.plan --model {rest}" for rest in trained + OTHERS]
    return trained + [f"infer.plan --model {rest}" for rest in generated]


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
    what = flags.pop("--preset", "") or f"batch {flags.pop('--batch')}, context {flags.pop('--context')}"
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


def table(plans: dict[str, dict]) -> str:
    head = [
        "| model | what | slice | flags | peak GB | of it parameters and optimizer | executed / model's FLOPs "
        "| sent GB (/ least) | compiled in s |",
        "|" + " --- |" * 9,
    ]
    rows = ["| " + " | ".join([*input_cells(command), *result_cells(plan)]) + " |" for command, plan in plans.items()]
    return "\n".join([*head, *rows])


def write_page(plans: dict[str, dict]) -> None:
    """Write the table between the two markers in the page."""
    before, rest = PAGE.read_text().split("<!-- table -->\n")
    after = rest.split("<!-- end -->\n")[1]
    PAGE.write_text(f"{before}<!-- table -->\n{table(plans)}\n<!-- end -->\n{after}")


def main() -> None:
    p = argparse.ArgumentParser(description="Generate the table of docs/tpu-plan.md.")
    p.add_argument("--only", default="", metavar="TEXT", help="only rows whose command contains this")
    p.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="number to compile at a time, some GB each (default 1)"
    )
    args = p.parse_args()
    plans = json.loads(PLANS.read_text()) if PLANS.exists() else {}

    missing = [command for command in commands() if command not in plans and args.only in command]
    with ThreadPoolExecutor(args.jobs) as pool:
        running = {pool.submit(run, command): command for command in missing}
        for done in as_completed(running):
            if plan := done.result():
                plans[running[done]] = plan
                plans = {command: plans[command] for command in commands() if command in plans}
                PLANS.write_text(json.dumps(plans, indent=1) + "\n")
    write_page(plans)


if __name__ == "__main__":
    main()
