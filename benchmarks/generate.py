"""Generation speed compared with transformers: the same random weights, prompts and images, on the same device (on a
TPU, which transformers does not support, only ours runs).

    python benchmarks/generate.py                                         # CPU, float32, 513M parameters
    python benchmarks/generate.py --preset v1.6-mistral-7b --dtype bfloat16 --batch 1,16     # on a GPU

Two child processes hold one model each and alternate, so that both run under the same conditions; each figure is the
median of the rounds. Prefill is everything from images and token ids to the first token. In the same rounds, our
process measures the device's matmul throughput and memory bandwidth: prefill's FLOPs, and the bytes that decoding
reads (weights and cache), are reported as fractions of these. Prints a table; `--json FILE` writes the results.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[i]) for i in (1, 0)]

import devices  # noqa: E402

IMAGE = (672, 672)  # a 2 x 2 grid of tiles plus the base tile: five tiles, 2,928 image tokens
TILES, FEATURES, TEXT_TOKENS = 5, 2928, 30
# Relative to transformers' speed, and to the measured peaks.
PEAK_GOALS = {"prefill share": 0.6, "decode share": 0.8}
GOALS = {
    "cpu": {"prefill": 0.9, "decode": 3.0},
    "gpu": {"prefill": 1.0, "decode": 2.0, **PEAK_GOALS},
    "tpu": PEAK_GOALS,
}


def make_weights(preset: str, directory: Path, dtype: str) -> None:
    """Create a random model with transformers, and save it."""
    import torch
    import transformers as tf

    config = devices.model_config(preset)
    text, vision = config.text, config.vision
    inner = {"llama": tf.LlamaConfig, "mistral": tf.MistralConfig}[text.family](
        vocab_size=text.vocab_size, hidden_size=text.width, intermediate_size=text.ffn_width,
        num_hidden_layers=text.layers, num_attention_heads=text.heads, num_key_value_heads=text.kv_heads,
        head_dim=text.head_width, max_position_embeddings=text.max_positions, rms_norm_eps=text.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": text.rope_theta},
        **({"sliding_window": None} if text.family == "mistral" else {}),
    )  # fmt: skip
    outer = tf.LlavaNextConfig(
        text_config=inner.to_dict(),
        vision_config=dict(
            model_type="clip_vision_model", hidden_size=vision.width, intermediate_size=vision.ffn_width,
            num_hidden_layers=vision.layers, num_attention_heads=vision.heads, image_size=vision.image_size,
            patch_size=vision.patch_size,
        ),
        image_grid_pinpoints=[list(p) for p in config.grid_pinpoints], image_token_index=text.vocab_size - 64,
    )  # fmt: skip
    torch.manual_seed(0)
    torch.set_default_dtype(getattr(torch, dtype))
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = tf.LlavaNextForConditionalGeneration(outer).eval()
    model.generation_config.eos_token_id = None
    model.save_pretrained(directory, max_shard_size="4GB")
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.0f}M parameters", file=sys.stderr)


def questions(config, rows: int):
    """For each row, a different image and 30 token ids around it."""
    import numpy as np
    from PIL import Image

    for seed in range(rows):
        ids = np.random.default_rng(seed).integers(3, config.text.vocab_size - 64, TEXT_TOKENS)
        yield Image.fromarray(devices.noise_image(IMAGE, seed)), ids.astype(np.int32)


# ---------------------------------------------------------------- the two implementations


def serve_ours(pipe, args) -> None:
    """Serve requests: for a number of rows, answer that many questions at once; None stops."""
    import jax
    import numpy as np

    from infer.engine import Engine
    from infer.prompt import Request, place_images, prompt_image
    from infer.sampling import Sampling
    from llava_jax.aot.flops import decoder_flops, encode_flops
    from llava_jax.checkpoints.checkpoint import _load_source, open_any
    from llava_jax.data import splice
    from llava_jax.sharding.mesh import inference_mesh

    if args.dtype == "float32":
        jax.config.update("jax_default_matmul_precision", "highest")  # as in torch
    source = open_any(args.directory)
    config = source.config
    mesh = inference_mesh(config, jax.devices()[:1])  # one device, as for transformers
    engine = Engine(_load_source(source, mesh, args.dtype), config, _NoTokenizer(), mesh)
    engine.eos_ids = ()
    read = sum(x.nbytes for x in jax.tree.leaves({**engine.params["decoder"], "embed": {}}))
    schedulers = {}

    def prepare(image, ids):
        ids = np.concatenate([ids[:5], [splice.IMAGE], ids[5:]])
        prompt = place_images(Request(("",)), (prompt_image(image, config),), ids)
        assert prompt.length == FEATURES + TEXT_TOKENS
        return prompt

    def run(rows):
        n, steps = FEATURES + TEXT_TOKENS, args.new_tokens - 1
        scheduler = schedulers.get(rows) or engine.scheduler(rows, n + args.new_tokens)
        schedulers[rows] = scheduler
        prompts = [prepare(*question) for question in questions(config, rows)]
        scheduler.forget()

        def answer(new_tokens):
            start = time.perf_counter()
            generations = [scheduler.submit(prompt, Sampling(max_new_tokens=new_tokens)) for prompt in prompts]
            scheduler.run(generations)
            return time.perf_counter() - start, generations

        prefill, _ = answer(1)
        # Again, with all but the last position of each prompt in the cache.
        seconds, generations = answer(args.new_tokens)
        first, _ = answer(1)
        decode = (seconds - first) / steps
        cached = 2 * config.text.layers * config.text.kv_heads * config.text.head_width * np.dtype(args.dtype).itemsize
        flops = encode_flops(config, rows * TILES) + decoder_flops(config, rows, n, n / 2)
        peaks = {"matmul": devices.matmul_peak(args.dtype), "bandwidth": devices.read_bandwidth(args.dtype)}
        return {
            "prefill": prefill,
            "decode": decode,
            "ids": [[token.id for token in generation.tokens] for generation in generations],
            "prefill share": flops / prefill / peaks["matmul"],
            "decode share": (read + rows * (n + steps / 2) * cached) / decode / peaks["bandwidth"],
            **peaks,
        }

    pipe.send({"device": devices.device_kind(), "platform": jax.default_backend(), "version": f"jax {jax.__version__}"})
    serve(pipe, run)


def serve(pipe, run) -> None:
    """Run each request; the first request of each number of rows runs twice, to compile."""
    seen = set()
    while rows := pipe.recv():
        if rows not in seen:
            run(rows)
            seen.add(rows)
        pipe.send(run(rows))


class _NoTokenizer:
    """The benchmark works on token ids."""

    bos_id = eos_id = None

    def token_id(self, token):
        return None

    def add_special(self, tokens):
        pass

    def stream(self):
        return self

    def add(self, token):
        return ""

    rest = finish = lambda self: ""


def serve_theirs(pipe, args) -> None:
    import jax
    import numpy as np
    import torch
    import transformers

    jax.config.update("jax_platforms", "cpu")  # the GPU is PyTorch's here
    from llava_jax.checkpoints.checkpoint import open_any
    from llava_jax.data import images

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, args.dtype)
    model = (
        transformers.LlavaNextForConditionalGeneration.from_pretrained(args.directory, dtype=dtype).to(device).eval()
    )
    config = open_any(args.directory).config.replace(image_rules="transformers")
    image_id = model.config.image_token_id
    mean, std = (torch.tensor(x, device=device) for x in (config.vision.image_mean, config.vision.image_std))

    def prepare(image, ids):
        tiles = images.tile_image(image, images.tile_layout(image.size, config), config)
        return torch.from_numpy(tiles), np.concatenate([ids[:5], [image_id] * FEATURES, ids[5:]])

    class Clock(transformers.StoppingCriteria):
        """Records the time after each token, and never stops."""

        def __call__(self, input_ids, scores, **_):
            if device == "cuda":
                torch.cuda.synchronize()
            self.times.append(time.perf_counter())
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    clock = Clock()

    @torch.inference_mode()
    def run(rows):
        tiles, ids = zip(*(prepare(*question) for question in questions(config, rows)), strict=True)
        clock.times = [time.perf_counter()]
        input_ids = torch.from_numpy(np.stack(ids)).long().to(device)
        pixels = (torch.stack(tiles).to(device).float() / 255 - mean) / std
        pixels = pixels.permute(0, 1, 4, 2, 3).to(dtype)
        out = model.generate(
            input_ids=input_ids, attention_mask=torch.ones_like(input_ids), pixel_values=pixels,
            image_sizes=torch.tensor([[IMAGE[1], IMAGE[0]]] * rows), do_sample=False, min_new_tokens=args.new_tokens,
            max_new_tokens=args.new_tokens, pad_token_id=0, stopping_criteria=[clock],
        )  # fmt: skip
        start, first, *_, last = clock.times
        ids = out[:, input_ids.shape[1] :].tolist()
        return {"prefill": first - start, "decode": (last - first) / (args.new_tokens - 1), "ids": ids}

    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    pipe.send({"device": name, "version": f"transformers {transformers.__version__}, torch {torch.__version__}"})
    serve(pipe, run)


# ---------------------------------------------------------------- the comparison


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--preset", default=devices.SMALL, help=f"a v1.6 model's name; default: the {devices.SMALL} model")
    p.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    p.add_argument("--batch", default="1", help="numbers of questions answered at once: 1,16; default 1")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--new-tokens", type=int, default=32)
    p.add_argument("--directory", help="directory of the weights, created if missing; default: a temporary one")
    p.add_argument("--json", metavar="FILE")
    args = p.parse_args()
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")  # of a GPU's memory; PyTorch uses the rest
    with tempfile.TemporaryDirectory() as scratch:
        args.directory = args.directory or scratch
        if not (Path(args.directory) / "config.json").exists():
            context = multiprocessing.get_context("spawn")
            maker = context.Process(target=make_weights, args=(args.preset, Path(args.directory), args.dtype))
            maker.start()
            maker.join()
            if maker.exitcode:
                raise SystemExit("no weights were made")
        report(args, *compare(args))


def compare(args):
    """Run all rounds. Returns a description of each implementation; and, for each number of rows, the results of each
    round by implementation."""
    context = multiprocessing.get_context("spawn")
    servers = {}
    for name, serve in (("llava-jax", serve_ours), ("transformers", serve_theirs)):
        ours, theirs = context.Pipe()
        process = context.Process(target=serve, args=(theirs, args), daemon=True)
        process.start()
        theirs.close()
        servers[name] = (ours, ours.recv())
        if servers[name][1].get("platform") == "tpu":
            break
    rounds = {}
    for rows in map(int, args.batch.split(",")):
        for n in range(args.rounds):
            results = {}
            for name, (pipe, _) in servers.items():
                pipe.send(rows)
                results[name] = pipe.recv()
            rounds.setdefault(rows, []).append(results)
            texts = (f"{name} {r['prefill']:.2f} s, {rows / r['decode']:.1f} tokens/s" for name, r in results.items())
            print(f"batch {rows}, round {n + 1} of {args.rounds}: {'; '.join(texts)}", file=sys.stderr)
    for pipe, _ in servers.values():
        pipe.send(None)
    return {name: info for name, (_, info) in servers.items()}, rounds


def report(args, infos, rounds) -> None:
    tokens, goals = FEATURES + TEXT_TOKENS, GOALS[infos["llava-jax"].pop("platform")]
    result = {"preset": args.preset, "dtype": args.dtype, "goals": goals, "devices": infos, "batch": {}}
    print(f"{args.preset}, {args.dtype}, {tokens} prompt tokens per row, {TILES} tiles; {os.cpu_count()} cores")
    for name, info in infos.items():
        print(f"  {name}: {info['device']}, {info['version']}")
    print(f"{'batch':>5} {'':14}{'prefill s':>10}{'prompt tok/s':>14}{'decode tok/s':>14}")
    for rows, results_of in rounds.items():

        def median(of, results_of=results_of):
            return statistics.median(map(of, results_of))

        figures = result["batch"][rows] = {}
        for name in infos:
            prefill, decode = (median(lambda r, name=name, key=key: r[name][key]) for key in ("prefill", "decode"))
            figures[name] = {"prefill_seconds": prefill, "decode_tokens_per_second": rows / decode}
            print(f"{rows:>5} {name:14}{prefill:10.3f}{rows * tokens / prefill:14.1f}{rows / decode:14.2f}")
        summary = {"prefill": [], "decode": []}
        if "transformers" in infos:
            for key in summary:
                ratio = figures[key] = median(lambda r, key=key: r["transformers"][key] / r["llava-jax"][key])
                summary[key].append(f"{ratio:.2f} x transformers (goal {goals[key]:g})")
            figures["same_tokens"] = all(r["llava-jax"]["ids"] == r["transformers"]["ids"] for r in results_of)
        for key, peak, unit in (("prefill", "matmul", "TFLOP/s"), ("decode", "bandwidth", "TB/s")):
            share = figures[f"{key} share"] = median(lambda r, key=key: r["llava-jax"][f"{key} share"])
            figures[peak] = median(lambda r, peak=peak: r["llava-jax"][peak])
            goal = f" (goal {goals[f'{key} share']:.0%})" if f"{key} share" in goals else ""
            summary[key].append(f"{share:.0%} of {figures[peak] / 1e12:.3g} {unit}{goal}")
        print("\n".join(f"      {key}: {', '.join(parts)}" for key, parts in summary.items()))
        if "same_tokens" in figures:
            same = "the same" if figures["same_tokens"] else "NOT the same (near-ties may differ in bfloat16)"
            print(f"      the {args.new_tokens} greedy tokens are {same}")
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
