"""Memory and speed of conversion in both directions, compared with `cp -r` of the same files onto the same disk.

    python benchmarks/convert.py [--gigabytes 6] [--rounds 3] [--cached] [--directory DIR] [--json FILE]

Writes a random checkpoint in the original's format (32 layers, bfloat16, shards of 2 GB), then converts it to Orbax
(`to-orbax`) and back (`to-hf --format original`), each in a child process, alternating with `cp -r`. For both, files
are not in the page cache (with `--cached`: all are), and memory has been idle for some seconds (a virtual machine that
returns idle memory to its host pays for it later; `cp` right after a deletion would not). The second time of each
includes flushing to disk (`sync`). Memory is the child's peak resident set, less that of a child that only imports the
same modules.
"""

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

GOALS = {"memory": 1e9, "speed": 2.0}
SHARD = 2 * 10**9
TOKENIZER = ROOT / "tests" / "golden" / "tokenizer"


def make_checkpoint(directory: Path, gigabytes: float) -> int:
    """Write a random checkpoint, shard by shard. Returns the bytes of its largest tensor."""
    import dataclasses

    import jax
    import ml_dtypes
    import numpy as np

    from llava_jax import config as c
    from llava_jax.checkpoints import safetensors_files, tensor_names
    from llava_jax.models.llava import param_shapes
    from llava_jax.sharding.partition import path_of

    width = max(128, round(2560 * (gigabytes / 6) ** 0.5 / 128) * 128)
    text = c.TextConfig(
        width=width, ffn_width=round(width * 2.7 / 128) * 128, heads=width // 128, kv_heads=width // 128,
        max_positions=4096,
    )  # fmt: skip
    config = dataclasses.replace(c.preset("v1.6-vicuna-7b"), text=text)
    leaves, _ = jax.tree_util.tree_flatten_with_path(param_shapes(config))
    tensors = {}
    for keys, leaf in leaves:
        name, (_, to_theirs) = tensor_names.write_name(path_of(keys), "original", config)
        tensors[name] = tensor_names.shape_after(to_theirs, leaf.shape)
    directory.mkdir(parents=True)
    random = np.random.default_rng(0)
    bfloat16 = np.dtype(ml_dtypes.bfloat16)
    read = lambda shape: (random.random(shape, np.float32) - 0.5).astype(bfloat16)  # noqa: E731
    safetensors_files.write_shards(
        directory,
        {name: safetensors_files.Pending(shape, bfloat16, lambda s=shape: read(s)) for name, shape in tensors.items()},
        SHARD,
    )
    fields = {
        "model_type": "llava", "architectures": ["LlavaLlamaForCausalLM"], "vocab_size": text.vocab_size,
        "hidden_size": width, "intermediate_size": text.ffn_width, "num_hidden_layers": text.layers,
        "num_attention_heads": text.heads, "num_key_value_heads": text.kv_heads, "rms_norm_eps": text.norm_eps,
        "max_position_embeddings": text.max_positions, "mm_vision_tower": "openai/clip-vit-large-patch14-336",
        "mm_projector_type": "mlp2x_gelu", "mm_patch_merge_type": "spatial_unpad", "image_aspect_ratio": "anyres",
        "image_grid_pinpoints": config.grid_pinpoints, "mm_hidden_size": 1024, "unfreeze_mm_vision_tower": True,
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(fields))
    for file in TOKENIZER.iterdir():
        shutil.copy(file, directory)
    return max(2 * int(np.prod(shape)) for shape in tensors.values())


def child(*args: str) -> tuple[float, int]:
    """Run a Python child process without its standard output. Returns its seconds and peak resident bytes."""
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *args], env=env, cwd=ROOT, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"failed: {' '.join(args)}")
    return time.perf_counter() - start, usage.ru_maxrss * 1024


def copy(source: Path, destination: Path) -> float:
    start = time.perf_counter()
    subprocess.run(["cp", "-r", source, destination], check=True)
    return time.perf_counter() - start


def settle(source: Path, cached: bool) -> None:
    """Flush to disk, drop the source's files from the page cache (or load all of them into it), and wait."""
    os.sync()
    for path in source.rglob("*"):
        if path.is_file() and cached:
            with path.open("rb") as file:
                while file.read(2**24):
                    pass
        elif path.is_file():
            file = os.open(path, os.O_RDONLY)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(file)
    time.sleep(5)


def sync() -> float:
    start = time.perf_counter()
    os.sync()
    return time.perf_counter() - start


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--gigabytes", type=float, default=6.0)
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--directory", help="the working directory; default: a temporary one")
    p.add_argument("--cached", action="store_true", help="keep the files in the page cache, for both")
    p.add_argument(
        "--kills", type=int, default=0, metavar="N", help="instead, interrupt conversions at N random moments"
    )
    p.add_argument(
        "--source", type=Path, metavar="DIR", help="for --kills: a checkpoint to use instead of a random one"
    )
    p.add_argument("--json", metavar="FILE", help="write the results there")
    p.add_argument("--make", metavar="DIR", help=argparse.SUPPRESS)  # runs in a child, so that this process stays small
    args = p.parse_args()
    if args.make:
        print(make_checkpoint(Path(args.make), args.gigabytes))
        return
    work = Path(tempfile.mkdtemp(prefix="convert-", dir=args.directory))
    try:
        figures = measure(work, args)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    if args.json:
        Path(args.json).write_text(json.dumps(figures, indent=2) + "\n")


def kill(source: Path, work: Path, times: int) -> dict[str, dict[str, int]]:
    """Interrupt conversions that replace an older checkpoint at random moments, every other time by Ctrl-C.

    Each must leave the old or the new checkpoint, complete; the next command must clean up.
    """
    from convert.verify import verify

    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    quiet = dict(env=env, cwd=ROOT, stderr=subprocess.DEVNULL)
    same = lambda a, b: all(row.result == "identical" for row in verify(a, b))  # noqa: E731
    pick, report = random.Random(0), {}
    for kind in ("to-orbax", "to-hf"):
        directory = work / kind
        directory.mkdir()

        def command(dtype: str, destination: Path, kind=kind) -> list[str]:
            flags = ["--dtype", dtype, "--overwrite"]
            return [sys.executable, "-m", "convert", kind, str(source), str(destination), *flags]

        whole = {}
        for dtype in ("bfloat16", "float16"):
            start = time.perf_counter()
            subprocess.run(command(dtype, work / f"{kind}-{dtype}"), check=True, **quiet)
            seconds = time.perf_counter() - start
            whole[dtype] = work / f"{kind}-{dtype}"
        current, left = "bfloat16", {"old": 0, "new": 0, "between": 0}
        subprocess.run(command(current, directory / "out"), check=True, **quiet)
        for i in range(times):
            new = "float16" if current == "bfloat16" else "bfloat16"
            process = subprocess.Popen(command(new, directory / "out"), **quiet)
            time.sleep(pick.random() * seconds * 1.1)
            process.send_signal(signal.SIGINT if i % 2 else signal.SIGKILL)
            process.wait()
            if not (directory / "out").exists():  # killed between two renames: the next command finishes
                left["between"] += 1
                subprocess.run(command(new, directory / "out"), check=True, **quiet)
            found = next((dtype for dtype in whole if same(directory / "out", whole[dtype])), None)
            if found is None:
                sys.exit(f"{kind}: left neither the old checkpoint nor the new one")
            left["old" if found == current else "new"] += 1
            print(f"{kind} {i + 1}: {'old' if found == current else 'new'}", file=sys.stderr, flush=True)
            current = found
        subprocess.run(command(current, directory / "out"), check=True, **quiet)
        if os.listdir(directory) != ["out"]:
            sys.exit(f"{kind}: left {os.listdir(directory)}")
        report[kind] = left
        print(
            f"{kind} interrupted {times} times: left the old checkpoint {left['old']} times, the new one {left['new']}",
            flush=True,
        )
    return report


def measure(work: Path, args) -> dict:
    if args.kills and args.source:
        return kill(args.source, work, args.kills)
    source, orbax, back = work / "source", work / "orbax", work / "back"
    made = subprocess.run(
        [sys.executable, __file__, "--make", str(source), "--gigabytes", str(args.gigabytes)],
        check=True, capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    largest = int(made.stdout)
    if args.kills:
        return kill(source, work, args.kills)
    size = sum(f.stat().st_size for f in source.iterdir())
    _, idle = child("-c", "import convert.__main__, convert.to_orbax, convert.to_hf, orbax.checkpoint")
    runs = {
        "to-orbax": (source, ["-m", "convert", "to-orbax", str(source), str(orbax)], orbax),
        "to-hf": (orbax, ["-m", "convert", "to-hf", str(orbax), str(back), "--format", "original"], back),
    }
    found = {name: {"copy": [], "copy_sync": [], "convert": [], "convert_sync": [], "peak": []} for name in runs}
    for _ in range(args.rounds):
        shutil.rmtree(orbax, ignore_errors=True)
        for name, (start, command, end) in runs.items():
            shutil.rmtree(end, ignore_errors=True)
            settle(start, args.cached)
            found[name]["copy"].append(copy(start, work / "copy"))
            found[name]["copy_sync"].append(found[name]["copy"][-1] + sync())
            shutil.rmtree(work / "copy")
            settle(start, args.cached)
            seconds, peak = child(*command)
            found[name]["convert"].append(seconds)
            found[name]["convert_sync"].append(seconds + sync())
            found[name]["peak"].append(peak)
    child("-m", "convert", "verify", str(source), str(back))
    figures = {"bytes": size, "largest_tensor": largest, "idle_bytes": idle, "goals": GOALS}
    print(f"{size / 1e9:.2f} GB, largest tensor {largest / 1e6:.0f} MB, idle interpreter {idle / 1e6:.0f} MB")
    print(f"{'':22} {'cp -r':>8} {'convert':>8} {'ratio':>7} {'goal':>5}   {'memory above idle':>18} {'goal':>9}")
    for name, values in found.items():
        above = max(values["peak"]) - idle
        figures[name] = values | {"memory_above_idle": above}
        for end, what in (("", name), ("_sync", "  including sync")):
            ratio = statistics.median(b / a for a, b in zip(values["copy" + end], values["convert" + end], strict=True))
            figures[name]["ratio" + end] = ratio
            print(
                f"{what:22} {statistics.median(values['copy' + end]):7.1f}s "
                f"{statistics.median(values['convert' + end]):7.1f}s {ratio:6.2f}x {GOALS['speed']:4.1f}x   "
                + ("" if end else f"{above / 1e6:15.0f} MB {(GOALS['memory'] + largest) / 1e6:6.0f} MB")
            )
    return figures


if __name__ == "__main__":
    main()
