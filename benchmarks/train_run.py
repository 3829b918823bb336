"""Training speed of a small v1.5 model on this machine's CPU, with `python -m train`.

    python benchmarks/train_run.py --json train.json

Conversations have lengths drawn like mix665k's, and images of COCO's sizes. Reports for packed and bucketed batches:
tokens per second, padding, and the share of time that the device waited for data. `train_data.py` runs first: padding
over thousands of conversations, and waiting with steps as short as on a TPU.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]  # this order makes `train` the package, not a file here
os.environ.setdefault("JAX_PLATFORMS", "cpu")

WARM_UP = 3  # steps that are not measured: compilation, and the start of the data
GOAL = 0.02  # share of time spent waiting


def write_model(directory: Path) -> None:
    """Write a random model in the architecture of v1.5, with the tests' tokenizer: 0.7M parameters."""
    import jax

    from llava_jax import config
    from llava_jax.checkpoints.orbax_files import save
    from llava_jax.data.tokenizer import load_tokenizer
    from llava_jax.models import llava

    text = config.TextConfig(
        vocab_size=1000, width=128, ffn_width=344, layers=2, heads=2, kv_heads=2, head_width=64, max_positions=2048
    )
    vision = dataclasses.replace(config.VisionConfig(), width=64, ffn_width=128, layers=2, heads=1)
    model = config.preset("v1.5-7b").replace(text=text, vision=vision)
    files = load_tokenizer(ROOT / "tests" / "golden" / "tokenizer").files
    params = llava.init_params(model, jax.random.key(0))
    print(f"{sum(x.size for x in jax.tree.leaves(params)) / 1e6:.1f}M parameters", file=sys.stderr)
    save(directory, params, model, files)


def measure_data(folder: Path, workers: int) -> dict:
    """Run `train_data.py`, and return its results."""
    path = folder / "figures.json"
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "train_data.py"),
        "--workers",
        str(workers),
        "--json",
        str(path),
    ]
    subprocess.run(command, cwd=ROOT, check=True)
    return json.loads(path.read_text())


def measure(folder: Path, batching: str, args: argparse.Namespace) -> dict[str, float]:
    """Train, and read the metrics of the run."""
    from train_data import TEMPLATE

    output = folder / batching
    flags = {
        "checkpoint": folder / "model", "data": folder / "data.json", "image-folder": folder, "output": output,
        "template": TEMPLATE, "batching": batching, "global-batch-size": args.batch_size, "workers": args.workers,
        "steps": WARM_UP + args.steps, "tune": args.tune, "dtype": "float32", "save-every": 0,
    }  # fmt: skip
    command = [
        sys.executable,
        "-m",
        "train",
        *(str(part) for flag in flags.items() for part in (f"--{flag[0]}", flag[1])),
    ]
    subprocess.run(command, cwd=ROOT, check=True)
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()][WARM_UP:]
    seconds = sum(line["seconds"] for line in lines)
    return {
        "tokens_per_second": sum(line["tokens"] for line in lines) / seconds,
        "median_update_seconds": statistics.median(line["seconds"] for line in lines),
        "padding": statistics.fmean(line["padding"] for line in lines),
        "waiting": sum(line["data_wait"] * line["seconds"] for line in lines) / seconds,
    }


def main() -> None:
    p = argparse.ArgumentParser(description="Training speed of a small model on this machine.")
    p.add_argument("--batch-size", type=int, default=8, help="conversations per step")
    p.add_argument("--steps", type=int, default=10, help="steps to measure")
    p.add_argument("--workers", type=int, default=2)
    p.add_argument("--tune", default="projector,decoder")
    p.add_argument("--json", metavar="FILE", help="write the results there")
    args = p.parse_args()
    from train_data import draw_lengths, write_data

    from llava_jax.data.tokenizer import load_tokenizer

    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        write_model(folder / "model")
        tokenizer = load_tokenizer(ROOT / "tests" / "golden" / "tokenizer")
        drawn = draw_lengths(args.batch_size * (WARM_UP + args.steps), 0, 576, 2048)
        write_data(folder, tokenizer, *drawn, 576)
        result = {"settings": vars(args), "goal": {"waiting": GOAL}, "data": measure_data(folder, args.workers)}
        for batching in ("packed", "bucketed"):
            found = result[batching] = measure(folder, batching, args)
            print(
                f"{batching}: {found['tokens_per_second']:,.0f} tokens/s, a step takes "
                f"{found['median_update_seconds']:.2f} s, padding {found['padding']:.1%}, "
                f"waiting for data {found['waiting']:.2%} of the time (goal: under {GOAL:.0%})"
            )
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
