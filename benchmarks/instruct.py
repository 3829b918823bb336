"""Training data that a language model writes, from captions and boxes to a trained model, without a language model.

    python benchmarks/instruct.py --json instruct.json

A scripted endpoint (`tests/scripted_endpoint.py`) stands in for the model. Reports two things: how many requests a
second `train.datasets.instruct` sends to an endpoint that takes half a second for a reply, against what so many
requests in flight allow; and the loss of the bundled model on held-out conversations before and after stage 2 on
those that an endpoint wrote which often fails.
"""

import argparse
import dataclasses
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from scripted_endpoint import ScriptedEndpoint  # noqa: E402

FAULTY = dict(lost=0.05, bad=0.15, stubborn=0.02)
DELAY, CONCURRENCY = 0.5, 64
HELD_OUT = 10  # one image in so many
GOAL = 0.1  # of the time beyond what the endpoint takes


def run(module: str, *flags) -> None:
    subprocess.run([sys.executable, "-m", module, *map(str, flags)], cwd=ROOT, check=True)


def ask(folder: Path, output: Path, script: ScriptedEndpoint, *more) -> dict[str, float]:
    """Run `train.datasets.instruct`; seconds from the first request to the last reply, and CPU seconds of all of it."""
    flags = (
        "--captions",
        folder / "records.jsonl",
        "--model",
        "scripted",
        "--endpoint",
        script.url,
        "--output",
        output,
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with script:
        run("train.datasets.instruct", *flags, "--boxes-for", "conversation,detail,reasoning", *more)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"requests": len(script.log), "seconds": script.last + script.delay - script.first, "cpu_seconds": cpu}


def measure_rate(folder: Path) -> dict[str, float]:
    found = ask(folder, folder / "rate", ScriptedEndpoint(delay=DELAY), "--concurrency", CONCURRENCY)
    ideal = found["requests"] * DELAY / CONCURRENCY
    return found | {
        "ideal_seconds": ideal,
        "requests_per_second": found["requests"] / found["seconds"],
        "overhead": found["seconds"] / ideal - 1,
        "cpu_milliseconds_per_request": 1e3 * found["cpu_seconds"] / found["requests"],
    }


def write_data(folder: Path) -> dict[str, float]:
    """Have the faulty endpoint write conversations, and hold some back: `train.json`, `held_out.json`."""
    output = folder / "instruct"
    found = ask(folder, output, ScriptedEndpoint(**FAULTY, seed=1))
    rows = json.loads((output / "instruct.json").read_text())
    images = sorted({row["image"] for row in rows})
    held_out = set(images[::HELD_OUT])
    for name, wanted in (("train.json", False), ("held_out.json", True)):
        (folder / name).write_text(json.dumps([row for row in rows if (row["image"] in held_out) == wanted]))
    rejected = len((output / "rejected.jsonl").read_text().splitlines())
    return {"conversations": len(rows), "rejected": rejected, "requests": found["requests"]}


def train(folder: Path, steps: int) -> dict[str, float]:
    """Stage 2 of the bundled model, with the settings that it was trained with at a lower learning rate."""
    from train import loop
    from train.config import TrainConfig
    from train.run import prepare

    config = TrainConfig(
        checkpoint=str(ROOT / "infer" / "shapes"), data=str(folder / "train.json"), image_folder=str(folder / "images"),
        eval_data=str(folder / "held_out.json"), output=str(folder / "run"), tune="projector,decoder", dtype="float32",
        learning_rate=3e-4, steps=steps, global_batch_size=8, max_length=640, adam_b2=0.98, weight_decay=0.05,
        warmup_ratio=0.05, workers=1, save_every=0, log_every=10,
    )  # fmt: skip
    before = held_out_loss(config)
    if loop.train(prepare(config)):
        raise SystemExit("training was stopped")
    trained = dataclasses.replace(config, checkpoint=str(folder / "run" / "model"))
    return {"steps": steps, "loss_before": before, "loss_after": held_out_loss(trained)}


def held_out_loss(config) -> float:
    """Mean loss of a checkpoint over the labelled tokens of the held-out conversations."""
    import jax

    from llava_jax.checkpoints.checkpoint import open_checkpoint
    from llava_jax.sharding.mesh import make_mesh
    from train.loader import open_data
    from train.loop import evaluate
    from train.step import setup

    found, mesh = open_checkpoint(config.checkpoint), make_mesh({}, jax.devices()[:1])
    frozen, state, _, eval_fn = setup(found.load(mesh), found.config, config, mesh, 1)
    data = open_data(config, found.config, found.tokenizer, path=config.eval_data, train=False)
    loss = evaluate(data, mesh, frozen, state, eval_fn)
    data.close()
    return loss


def main() -> None:
    p = argparse.ArgumentParser(description="Training data that a language model writes: rate, and training on it.")
    p.add_argument("--images", type=int, default=400)
    p.add_argument("--steps", type=int, default=300)
    p.add_argument("--json", metavar="FILE", help="write the results there")
    args = p.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory) / "shapes"
        run("train.datasets.shapes", "--output", folder, "--examples", args.images)
        result = {"settings": vars(args), "goal": {"overhead": GOAL}, "rate": (rate := measure_rate(folder))}
        print(
            f"{rate['requests_per_second']:.0f} requests/s with {CONCURRENCY} in flight of {DELAY} s each: "
            f"{rate['overhead']:.1%} more time than the endpoint takes (goal: {GOAL:.0%}), "
            f"{rate['cpu_milliseconds_per_request']:.1f} ms of a core per request"
        )
        result["data"] = write_data(folder)
        result["training"] = train(folder, args.steps)
        print(result["data"], result["training"])
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
