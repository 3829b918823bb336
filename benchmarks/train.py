"""Speed of a training step as a fraction of the devices' matmul throughput, both measured in the same run.

    python benchmarks/train.py                                                    # CPU, float32, 3 layers
    python benchmarks/train.py --preset v1.6-mistral-7b --dtype bfloat16 --json train.json     # GPU or TPU

Measures stage 1 (projector only), LoRA and full training of projector and decoder, with random weights and as many
decoder layers as fit the device. Rows are full: image tokens first, then text, and every position has a label. FLOPs
exclude recomputation: full remat runs the decoder's forward pass again, so that two thirds of the executed FLOPs count
in stage 1 and LoRA, three quarters in full training. Runs on one host.

`train_run.py` measures whole runs, including their data.
"""

import argparse
import dataclasses
import json
import os
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]  # this order makes `train` the package, not this file
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")  # fraction of a GPU's memory

import devices  # noqa: E402
import jax  # noqa: E402
import numpy as np  # noqa: E402

from llava_jax.aot import tpu, tpu_plan  # noqa: E402
from llava_jax.aot.flops import step_flops  # noqa: E402
from llava_jax.config import LlavaConfig  # noqa: E402
from llava_jax.console import note  # noqa: E402
from llava_jax.data.splice import TEXT, Batch  # noqa: E402
from llava_jax.models import llava  # noqa: E402
from llava_jax.models.layers import REMAT  # noqa: E402
from llava_jax.sharding.mesh import FSDP, make_mesh, row_multiple  # noqa: E402
from train.config import PRESETS, TrainConfig  # noqa: E402
from train.loop import put_batch  # noqa: E402
from train.parameters import load_dtype  # noqa: E402
from train.plan import batch_shapes, default_tiles  # noqa: E402
from train.step import setup  # noqa: E402

STAGES = {"stage 1": "projector", "LoRA": "lora", "full": "projector,decoder"}
GOAL = 0.55  # of the measured peak
WARM_UP, STEPS = 2, 1000  # steps before the measured ones; length of the compiled schedule
MEMORY_FRACTION = 0.95  # of a device's memory, at most
STACKING = 1.3  # peak memory while layers are stacked, one kind of kernel at a time, over that of the parameters


def with_layers(model: LlavaConfig, layers: int) -> LlavaConfig:
    return model.replace(text=dataclasses.replace(model.text, layers=layers))


def layers_that_fit(model: LlavaConfig, config: TrainConfig, mesh, rows: int, length: int, tiles: int) -> int:
    """The largest number of layers that fits, by the compiler's memory assignment. Each layer takes at least as much as
    the one before, so this searches downwards from an extrapolation."""
    if devices.memory_limit() is None:
        return model.text.layers
    limit = MEMORY_FRACTION * devices.memory_limit()

    def needed(layers: int) -> float:
        shallow = with_layers(model, layers)
        frozen, state, step, _ = setup(llava.param_shapes(shallow), shallow, config, mesh, STEPS)
        lowered = step.lower(frozen, state, batch_shapes(model, mesh, rows, length, tiles))
        return max(tpu.memory(lowered.compile()).peak, STACKING * tpu_plan.per_chip((frozen, state.trained)))

    two, four = needed(2), needed(4)
    layers = min(model.text.layers, 2 + int((limit - two) / (four - two) * 2))
    while layers > 1 and needed(layers) > limit:
        layers -= 1
    return max(1, layers)


def full_rows(model: LlavaConfig, rows: int, length: int, tiles: int) -> Batch:
    """Rows with the image tokens of `tiles` tiles, then text; all positions have labels."""
    rng = np.random.default_rng(0)
    side, features = model.vision.image_size, min(length, tiles * model.vision.features_per_tile)
    ids = rng.integers(3, model.text.vocab_size, (rows, length), dtype=np.int32)
    feature_rows = np.where(np.arange(length) < features, np.arange(length), TEXT).astype(np.int32)
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), ids.shape)
    return Batch(
        tiles=rng.integers(0, 256, (rows, tiles, side, side, 3), dtype=np.uint8),
        ids=ids,
        feature_rows=np.broadcast_to(feature_rows, ids.shape),
        positions=positions,
        segments=np.ones_like(ids),
        labels=ids,
    )


def measure(model: LlavaConfig, config: TrainConfig, rows: int, length: int, tiles: int, steps: int) -> dict:
    """Measure the seconds of a step, and the matmul peak before and after."""
    mesh = make_mesh({FSDP: -1})
    rows *= row_multiple(mesh)
    flops = step_flops(model, config.tune, rows, length, tiles)
    peak = devices.matmul_peak(config.dtype)
    params = devices.random_params(model, mesh, lambda path: load_dtype(path, config))
    frozen, state, step, _ = setup(params, model, config, mesh, STEPS)
    batch = put_batch(full_rows(model, rows, length, tiles), mesh, rows)
    seconds = []
    for i in range(WARM_UP + steps):
        start = time.perf_counter()
        state, metrics = step(frozen, state, batch)
        loss = float(metrics["loss"])
        seconds.append(time.perf_counter() - start)
        if not metrics["ok"]:
            raise SystemExit(f"step {i + 1} was skipped: its loss {loss} or its gradient is not finite")
        note(f"step {i + 1} of {WARM_UP + steps}: {seconds[-1]:.3f} s, loss {loss:.3f}")
    del frozen, state, batch
    peak = max(peak, devices.matmul_peak(config.dtype))
    median = statistics.median(seconds[WARM_UP:])
    return {
        "layers": model.text.layers,
        "seconds": median,
        "positions_per_second": rows * length / median,
        "model_flops": flops,
        "matmul_peak": peak,
        "share": flops / median / mesh.size / peak,
        "loss": loss,
    }


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--preset", default=devices.SMALL, help=f"a released model's name; default: {devices.SMALL}")
    p.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    p.add_argument("--layers", type=int, help="decoder layers; default: as many as fit, 3 on a CPU")
    p.add_argument("--seq", type=int, help="positions per row; default: the model's training length, 1024 on a CPU")
    p.add_argument("--rows", type=int, default=1, help="rows per device; default 1")
    p.add_argument("--remat", default="full", choices=list(REMAT))
    p.add_argument("--steps", type=int, default=5, help="steps to measure; default 5")
    p.add_argument("--stages", default=",".join(STAGES), help=f"default: {','.join(STAGES)}")
    p.add_argument("--json", metavar="FILE")
    args = p.parse_args()
    if args.dtype == "float32":
        jax.config.update("jax_default_matmul_precision", "highest")
    model, on_cpu = devices.model_config(args.preset), jax.default_backend() == "cpu"
    length = args.seq or (1024 if on_cpu else model.max_length)
    tiles = max(1, length // model.vision.features_per_tile) if on_cpu else default_tiles(model, length)
    figures = {"settings": vars(args), "device": devices.device_kind(), "devices": jax.device_count(), "goal": GOAL}
    figures["jax"] = jax.__version__
    print(
        f"{args.preset}, {args.dtype}, remat {args.remat}, {args.rows} x {length:,} positions and {tiles} tiles per "
        f"device; {jax.device_count()} x {devices.device_kind()}, jax {jax.__version__}"
    )
    print(f"{'':9}{'layers':>7}{'s/step':>10}{'positions/s':>13}{'matmul peak':>15}{'of peak (goal)':>15}")
    for name in args.stages.split(","):
        config = PRESETS["v1.6-finetune"].replace(tune=STAGES[name], dtype=args.dtype, remat=args.remat)
        layers = args.layers or (3 if on_cpu else 0)
        if not layers:
            mesh = make_mesh({FSDP: -1})
            layers = layers_that_fit(model, config, mesh, args.rows * row_multiple(mesh), length, tiles)
        found = measure(with_layers(model, layers), config, args.rows, length, tiles, args.steps)
        figures[name] = found
        print(
            f"{name:9}{layers:>7}{found['seconds']:>10.3f}{found['positions_per_second']:>13,.0f}"
            f"{found['matmul_peak'] / 1e12:>8.2f} TFLOP/s{found['share']:>9.0%} ({GOAL:.0%})",
            flush=True,
        )
        if args.json:
            Path(args.json).write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
