"""Speed of generation beside transformers: the same random weights, prompt and picture, on the same device.

    python benchmarks/generate.py                                         # CPU, float32, 513M parameters
    python benchmarks/generate.py --preset v1.6-mistral-7b --dtype bfloat16     # on a GPU

Two child processes hold a model each and take turns, so that both meet the machine in the same mood; each figure
is the median of the rounds. Prefill is everything from uint8 pixels and token ids to the first token. Prints a
table, and the figures as JSON with `--json FILE`.
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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

SMALL = "513M"
IMAGE = (672, 672)  # a 2 x 2 grid of tiles and the whole: five tiles, 2,928 features
TEXT_TOKENS = 30
GOALS = {"prefill": 0.9, "decode": 3.0}


def model_config(preset: str):
    """The benchmark's own v1.6 model, or a released one's dimensions, in transformers' dialect of vocabulary."""
    import dataclasses

    from llava_jax import config as c

    if preset != SMALL:
        base = c.preset(preset)
        return base.replace(text=dataclasses.replace(base.text, vocab_size=-(-base.text.vocab_size // 64) * 64 + 64))
    text = c.TextConfig(
        vocab_size=32064, width=1024, ffn_width=2816, layers=12, heads=16, kv_heads=8, head_width=64,
        max_positions=8192, rope_theta=1e6, family="mistral",
    )  # fmt: skip
    return c.preset("v1.6-mistral-7b").replace(text=text)


def make_weights(preset: str, directory: Path, dtype: str) -> None:
    """A random model in transformers' own classes, saved as it saves."""
    import torch
    import transformers as tf

    config = model_config(preset)
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
    model = tf.LlavaNextForConditionalGeneration(outer).eval()
    model.generation_config.eos_token_id = None
    model.save_pretrained(directory, max_shard_size="4GB")
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.0f}M parameters", file=sys.stderr)


def question(config, seed: int = 0):
    """A picture and 30 token ids around it."""
    import numpy as np
    from PIL import Image

    random = np.random.default_rng(seed)
    pixels = random.integers(0, 256, (IMAGE[1], IMAGE[0], 3), dtype=np.uint8)
    ids = random.integers(3, config.text.vocab_size - 64, TEXT_TOKENS)
    return Image.fromarray(pixels), ids.astype(np.int32)


# ---------------------------------------------------------------- the two contestants


def serve_ours(pipe, args) -> None:
    import jax
    import numpy as np

    from infer.engine import Engine, Request, _Prepared
    from infer.sampling import Sampling
    from llava_jax import images, splice
    from llava_jax.sharding import inference_mesh
    from llava_jax.sources import open_source

    source = open_source(Path(args.directory))
    from llava_jax.checkpoint import _load_source

    mesh = inference_mesh(source.config)
    params = _load_source(source, mesh, args.dtype)
    engine = Engine(params, source.config, _NoTokenizer(), mesh)
    picture, ids = question(source.config)
    place = images.layout(picture.size, source.config)
    ids = np.concatenate([ids[:5], [splice.IMAGE], ids[5:]])
    row = splice.Row(ids, (place,))
    item = _Prepared(Request(("",)), row, splice.spliced_length(row, source.config))
    pixels = (images.tiles(picture, place, source.config),)
    sampling = Sampling(max_new_tokens=args.new_tokens)

    def run():
        *_, answers = engine._run([item], [pixels], sampling, steps=args.new_tokens)
        return answers[0]

    run()
    device = jax.devices()[0].device_kind
    pipe.send({"prompt_tokens": item.length, "device": device, "version": f"jax {jax.__version__}"})
    while pipe.recv():
        answer = run()
        pipe.send(
            {"prefill": answer.prefill_seconds, "decode": 1 / answer.decode_tokens_per_second, "ids": answer.token_ids}
        )


class _NoTokenizer:
    """The benchmark works on token ids."""

    bos_id = eos_id = None

    def token_id(self, token):
        return None

    def add_special(self, tokens):
        pass

    def decode(self, ids):
        return ""


def serve_theirs(pipe, args) -> None:
    import numpy as np
    import torch
    import transformers

    from llava_jax import images
    from llava_jax.sources import open_source

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, args.dtype)
    model = (
        transformers.LlavaNextForConditionalGeneration.from_pretrained(args.directory, dtype=dtype).to(device).eval()
    )
    config = open_source(Path(args.directory)).config.replace(image_rules="transformers")
    picture, ids = question(config)
    place = images.layout(picture.size, config)
    tiles = torch.from_numpy(images.tiles(picture, place, config))
    features = 2928
    mark = model.config.image_token_id
    input_ids = torch.from_numpy(np.concatenate([ids[:5], [mark] * features, ids[5:]]))[None].long().to(device)
    mean, std = (torch.tensor(x) for x in (config.vision.image_mean, config.vision.image_std))

    class Clock(transformers.StoppingCriteria):
        """Looks at the time after each token, and never stops."""

        def __call__(self, input_ids, scores, **_):
            if device == "cuda":
                torch.cuda.synchronize()
            self.times.append(time.perf_counter())
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    clock = Clock()

    @torch.inference_mode()
    def run():
        clock.times = [time.perf_counter()]
        pixels = ((tiles.float() / 255 - mean) / std).permute(0, 3, 1, 2)[None].to(device, dtype)
        out = model.generate(
            input_ids=input_ids, attention_mask=torch.ones_like(input_ids), pixel_values=pixels,
            image_sizes=torch.tensor([[IMAGE[1], IMAGE[0]]]), do_sample=False, min_new_tokens=args.new_tokens,
            max_new_tokens=args.new_tokens, pad_token_id=0, stopping_criteria=[clock],
        )  # fmt: skip
        start, first, *_, last = clock.times
        ids = out[0, input_ids.shape[1] :].tolist()
        return {"prefill": first - start, "decode": (last - first) / (args.new_tokens - 1), "ids": ids}

    run()
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    version = f"transformers {transformers.__version__}, torch {torch.__version__}"
    pipe.send({"prompt_tokens": input_ids.shape[1], "device": name, "version": version})
    while pipe.recv():
        pipe.send(run())


# ---------------------------------------------------------------- the match


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--preset", default=SMALL, help=f"a released model's name; default: the {SMALL} model")
    p.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--new-tokens", type=int, default=32)
    p.add_argument("--directory", help="where the weights are, or are to be made; default: a temporary directory")
    p.add_argument("--json", metavar="FILE")
    args = p.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        args.directory = args.directory or scratch
        if not (Path(args.directory) / "config.json").exists():
            context = multiprocessing.get_context("spawn")
            maker = context.Process(target=make_weights, args=(args.preset, Path(args.directory), args.dtype))
            maker.start()
            maker.join()
        report(args, *match(args))


def match(args):
    context = multiprocessing.get_context("spawn")
    contestants = {}
    for name, serve in (("llava-jax", serve_ours), ("transformers", serve_theirs)):
        ours, theirs = context.Pipe()
        process = context.Process(target=serve, args=(theirs, args), daemon=True)
        process.start()
        theirs.close()
        contestants[name] = (ours, ours.recv())
    rounds = []
    for n in range(args.rounds):
        results = {}
        for name, (pipe, _) in contestants.items():
            pipe.send(True)
            results[name] = pipe.recv()
        rounds.append(results)
        said = (f"{name} {r['prefill']:.1f} s, {1 / r['decode']:.1f} tokens/s" for name, r in results.items())
        print(f"round {n + 1} of {args.rounds}: {'; '.join(said)}", file=sys.stderr)
    for pipe, _ in contestants.values():
        pipe.send(False)
    return {name: info for name, (_, info) in contestants.items()}, rounds


def report(args, infos, rounds) -> None:
    median = lambda name, key: statistics.median(r[name][key] for r in rounds)  # noqa: E731
    tokens = infos["llava-jax"]["prompt_tokens"]
    assert tokens == infos["transformers"]["prompt_tokens"], infos
    figures = {}
    print(f"{args.preset}, {args.dtype}, {tokens} prompt tokens, five tiles, batch 1; {os.cpu_count()} cores")
    print(f"{'':14}{'prefill s':>10}{'prompt tok/s':>14}{'decode tok/s':>14}   device")
    for name, info in infos.items():
        prefill, decode = median(name, "prefill"), median(name, "decode")
        figures[name] = {"prefill_seconds": prefill, "decode_tokens_per_second": 1 / decode, **info}
        print(
            f"{name:14}{prefill:10.3f}{tokens / prefill:14.1f}{1 / decode:14.2f}   {info['device']}, {info['version']}"
        )
    ratios = {
        key: statistics.median(r["transformers"][key] / r["llava-jax"][key] for r in rounds)
        for key in ("prefill", "decode")
    }
    print(
        f"speed against transformers: prefill {ratios['prefill']:.2f} x (goal {GOALS['prefill']}), "
        f"decode {ratios['decode']:.2f} x (goal {GOALS['decode']:.0f})"
    )
    same = rounds[0]["llava-jax"]["ids"] == rounds[0]["transformers"]["ids"]
    print(f"the {args.new_tokens} greedy tokens are {'the same' if same else 'NOT the same'}")
    if args.json:
        result = {"preset": args.preset, "dtype": args.dtype, "ratios": ratios, "same_tokens": same, **figures}
        Path(args.json).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
