"""The tables of docs/tpu-plan.md: what training and generation need of a chip, for models, stages and slices.

    python benchmarks/tpu_plan.py --json plans.json                 # minutes for each row; goes on where it ended
    python benchmarks/tpu_plan.py --json plans.json --write docs/tpu-plan.md

Each row is a run of `python -m train.plan` or `python -m infer.plan`; rows that are in the file are not compiled again.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

V15, NEXT = "llava-v1.5-7b", "llava-v1.6-mistral-7b"
TRAIN = [  # model, preset, topology, further flags
    (V15, "v1.5-finetune", "v5e:4x4", ""),
    (V15, "v1.5-pretrain", "v5e:2x4", ""),
    (V15, "v1.5-finetune-lora", "v5e:2x4", ""),
    (V15, "v1.5-finetune", "v6e:2x4", ""),
    (V15, "v1.5-finetune", "v5e:8x8", ""),
    (V15, "v1.5-finetune", "v5e:4x8", "--rows-per-chip 4 --tiles-per-row 0"),
    ("llava-v1.5-13b", "v1.5-finetune", "v5e:8x8", ""),
    ("llava-v1.5-13b", "v1.5-finetune", "v5p:2x2x4", ""),
    ("llava-v1.6-34b", "v1.6-finetune", "v5p:4x4x4", ""),
    ("llava-v1.6-34b", "v1.6-finetune", "v6e:8x8", ""),
    (NEXT, "v1.6-finetune", "v5e:8x8", ""),
    (NEXT, "v1.6-finetune", "v4:2x2x4", ""),
    (V15, "v1.5-finetune", "v4:2x2x4", ""),
    (V15, "v1.5-finetune", "v5p:2x2x2", "--rows-per-chip 4"),
    (V15, "v1.5-finetune", "v5p:2x2x2", "--rows-per-chip 4 --remat minimal"),
    (V15, "v1.5-finetune", "v5p:2x2x2", "--rows-per-chip 4 --remat dots"),
    (V15, "v1.5-finetune", "v5p:2x2x2", "--rows-per-chip 4 --remat none"),
]
INFER = [  # model, topology, mesh, batch, context
    (NEXT, "v5e:2x2", "tensor=4", 8, 4096),
    ("llava-v1.5-13b", "v5e:2x4", "tensor=8", 8, 4096),
    ("llava-v1.6-34b", "v6e:2x4", "tensor=8", 8, 4096),
]


def commands() -> list[str]:
    train = [f"train.plan --model {m} --preset {p} --topology {t} {more}".strip() for m, p, t, more in TRAIN]
    return train + [
        f"infer.plan --model {m} --topology {t} --mesh {mesh} --batch {b} --context {c}" for m, t, mesh, b, c in INFER
    ]


def run(command: str) -> dict:
    done = subprocess.run(
        [sys.executable, "-m", *command.split(), "--json"], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    return json.loads(done.stdout) if done.stdout.strip() else {"error": done.returncode}


def row(command: str, plan: dict) -> str:
    gb = lambda n: f"{n / 1e9:.1f}"  # noqa: E731
    flags = command.split()[1:]
    of = dict(zip(flags[::2], flags[1::2], strict=True))
    what = of.pop("--preset", "") or f"batch {of.pop('--batch')}, context {of.pop('--context')}"
    model, topology = of.pop("--model").removeprefix("llava-"), of.pop("--topology")
    more = ", ".join(f"{flag.removeprefix('--').replace('-', ' ')} {value}" for flag, value in of.items())
    cells = [model, what, topology, more, f"{gb(plan['peak_bytes_per_chip'])} of {gb(plan['hbm_bytes_per_chip'])}"]
    cells.append(gb(plan["parameter_bytes_per_chip"] + plan["optimizer_bytes_per_chip"]))
    if plan["executed_flops_per_chip"]:
        sent, least = sum(plan["collective_bytes_per_chip"].values()), plan["least_collective_bytes_per_chip"]
        cells.append(f"{plan['executed_flops_per_chip'] / plan['model_flops_per_chip']:.2f}")
        cells.append(f"{sent / 1e9:.3g}" + (f" ({sent / least:.2f})" if least else ""))
    else:
        cells += ["not known" if plan["fits"] else "does not fit", ""]
    return "| " + " | ".join([*cells, f"{plan['compile_seconds']:.0f}"]) + " |"


def table(plans: dict[str, dict]) -> str:
    head = [
        "| model | what | slice | flags | peak GB | of it parameters and optimizer | executed / model's FLOPs "
        "| sent GB (/ least) | compiled in s |",
        "|" + " --- |" * 9,
    ]
    rows = [row(command, plans[command]) for command in commands() if "fits" in plans.get(command, {})]
    return "\n".join(head + rows)


def main() -> None:
    p = argparse.ArgumentParser(description="The tables of docs/tpu-plan.md.")
    p.add_argument("--json", required=True, metavar="FILE", help="plans so far, and where new ones go")
    p.add_argument("--only", default="", metavar="TEXT", help="only rows whose command has this in it")
    p.add_argument(
        "--write", metavar="FILE", help="put the table between the two marks in this page, compiling nothing"
    )
    args = p.parse_args()
    path = Path(args.json)
    plans = json.loads(path.read_text()) if path.exists() else {}
    if args.write:
        page = Path(args.write)
        before, rest = page.read_text().split("<!-- table -->\n")
        after = rest.split("<!-- end -->\n")[1]
        page.write_text(f"{before}<!-- table -->\n{table(plans)}\n<!-- end -->\n{after}")
        return
    for command in commands():
        if command not in plans and args.only in command:
            print(command, file=sys.stderr)
            plans[command] = run(command)
            path.write_text(json.dumps(plans, indent=1) + "\n")
    print(table(plans))


if __name__ == "__main__":
    main()
