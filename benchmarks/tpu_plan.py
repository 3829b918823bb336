"""The table of docs/tpu-plan.md: what training and generation need of a chip, for models, stages and slices.

    python benchmarks/tpu_plan.py               # minutes for each row; goes on where it ended
    python benchmarks/tpu_plan.py --only 34b    # of what is missing, these rows

Each row is a run of `python -m train.plan` or `python -m infer.plan`. What they print is kept in docs/tpu-plan.json:
rows that are there are not compiled again. The page gets all of them.
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
FULL = {  # slices where everything is trained
    SMALL: ["v4:2x2x4", "v5e:4x4", "v5e:8x8", "v5p:2x2x2", "v6e:2x4"],
    NEXT: ["v4:2x2x4", "v5e:8x8", "v5p:2x2x4", "v6e:4x4"],
    MIDDLE: ["v4:2x2x4", "v5e:8x8", "v5p:2x2x4", "v6e:4x4"],
    LARGE: ["v4:4x4x4", "v5e:8x16", "v5p:4x4x4", "v6e:8x8"],
}
FEW = {  # where little is: a projector, or adapters
    SMALL: ["v4:2x2x1", "v5e:2x4", "v5p:2x2x1", "v6e:2x2"],
    MIDDLE: ["v4:2x2x2", "v5e:2x4", "v5p:2x2x1", "v6e:2x4"],
    LARGE: ["v4:2x2x4", "v5e:4x4", "v5p:2x2x2", "v6e:2x4"],
}
GENERATE = {
    NEXT: ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2"],
    MIDDLE: ["v4:2x2x1", "v5e:2x4", "v5p:2x2x1", "v6e:2x2"],
    LARGE: ["v4:2x2x2", "v5e:2x4", "v5p:2x2x1", "v6e:2x4"],
}
# A stage of v1.5 for a model of v1.6: its images, and its template where the stage has one.
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
    """Of a training step with one row a chip, unless it says otherwise: to compare slices, not to plan a batch."""
    rows = ["--rows-per-chip", "1"] if command.startswith("train.plan") and "--rows-per-chip" not in command else []
    done = subprocess.run(
        [sys.executable, "-m", *command.split(), *rows, "--json"], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    return json.loads(done.stdout) if done.stdout.strip() else None


def asked(command: str) -> list[str]:
    """The first cells of a row: model, what, slice, flags."""
    flags = command.split()[1:]
    of = dict(zip(flags[::2], flags[1::2], strict=True))
    what = of.pop("--preset", "") or f"batch {of.pop('--batch')}, context {of.pop('--context')}"
    model, topology = of.pop("--model").removeprefix("llava-"), of.pop("--topology")
    more = ", ".join(f"{flag.removeprefix('--').replace('-', ' ')} {value}" for flag, value in of.items())
    return [model, what, topology, more]


def found(plan: dict) -> list[str]:
    """The others."""
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
    rows = ["| " + " | ".join([*asked(command), *found(plan)]) + " |" for command, plan in plans.items()]
    return "\n".join([*head, *rows])


def write_page(plans: dict[str, dict]) -> None:
    """Put the table between the two marks in the page."""
    before, rest = PAGE.read_text().split("<!-- table -->\n")
    after = rest.split("<!-- end -->\n")[1]
    PAGE.write_text(f"{before}<!-- table -->\n{table(plans)}\n<!-- end -->\n{after}")


def main() -> None:
    p = argparse.ArgumentParser(description="The table of docs/tpu-plan.md.")
    p.add_argument("--only", default="", metavar="TEXT", help="only rows whose command has this in it")
    p.add_argument("--jobs", type=int, default=1, metavar="N", help="so many at a time, some GB each (default 1)")
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
