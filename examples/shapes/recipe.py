"""Train a small LLaVA from scratch, from drawing its data to plotting its curves.

    python examples/shapes/recipe.py --output runs/shapes

    data/      images and conversations (train.datasets.shapes)
    start/     the randomly initialized model
    tower/     with a tower trained on shapes (warm_up.py), since there are no pretrained ones this small
    look/      with a decoder trained to find what a word names
    warm-up/   with a decoder trained on all kinds of questions
    captions/  and on captions: otherwise stage 1 would teach the projector to request captions, not to describe images
    reset/     the same with a random projector, where the published models start
    stage-1/   the projector alone, on captions
    stage-2/   projector and decoder, on conversations, with the tower frozen
    bundle/    the model in transformers' format, its card, its curves, an example image

Everything logs for TensorBoard (`tensorboard --logdir runs/shapes`). When repeated, an interrupted command resumes in
the phase that it was in (settings.json holds the settings of the directory); seeds are fixed.
"""

import collections
import itertools
import json
import math
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import numpy as np
import warm_up
from card import write_card
from cpu import quick_gradients
from model import CONFIG, PATCH, TILE, ids_of, initialize, save
from PIL import Image

from convert.to_hf import to_hf
from infer.benchmark_run import evaluate
from infer.benchmarks.conversations import Conversations
from infer.engine import Engine
from infer.results import score_table
from llava_jax.checkpoints.checkpoint import open_checkpoint
from llava_jax.console import InputError, Parser, enable_compilation_cache, note, run_main
from llava_jax.json_files import differences, read_json
from llava_jax.models.llava import Params
from llava_jax.sharding.mesh import make_mesh
from train import loop
from train.config import TrainConfig
from train.datasets.shapes import __main__ as shapes
from train.datasets.shapes import questions
from train.datasets.shapes.questions import plural
from train.datasets.shapes.scenes import COLOURS, SHAPES, SIZES, Scene, draw, make_scene
from train.figures import new_figure, save_figure
from train.loader import open_data
from train.plot import points, read_run, smooth
from train.run import prepare
from train.step import setup

EXAMPLES, TESTS, SEED = 20000, 2000, 0
EXAMPLE = 50  # seed of the bundled example image
LOOK_QUESTIONS = 14  # per image, in the phase `look`
SUBSET = 2000  # questions of the secondary measurements
COMMON = TrainConfig(
    dtype="float32", max_length=340, global_batch_size=8, adam_b2=0.98, weight_decay=0.05, warmup_ratio=0.05,
    workers=1, save_every=0, log_every=10, seed=SEED,
)  # fmt: skip
WARM_UPS = {
    "tower": dict(steps=4500, rate=2e-2),
    "look": dict(steps=2000, rate=1e-2),
    "warm-up": dict(steps=3600, rate=1e-2),
    "captions": dict(steps=700, rate=4e-3),
}
STAGES = {
    "stage-1": dict(tune="projector", learning_rate=1e-2, steps=800, template="plain"),
    "stage-2": dict(tune="projector,decoder", learning_rate=5e-4, steps=800),
}


def scaled(settings: dict[str, Any], share: float) -> dict[str, Any]:
    return settings | {"steps": max(10, round(share * settings["steps"]))}


def load(checkpoint: Path) -> Params:
    return open_checkpoint(checkpoint).load(make_mesh({}, jax.devices()[:1]))


def tokenizer_of(checkpoint: Path) -> bytes:
    return open_checkpoint(checkpoint).tokenizer.files["tokenizer.model"]


def make_start() -> tuple[Params, bytes]:
    """The randomly initialized model and its tokenizer."""
    tokenizer = (Path(__file__).parent / "tokenizer.model").read_bytes()
    return initialize(CONFIG, SEED, tokenizer), tokenizer


# ---------------------------------------------------------------- warm-up and stages


def warm_up_tower(output: Path, data: Path, examples: int, tests: int, share: float) -> None:
    def load_split(split: str, number: int) -> warm_up.LabelledTiles:
        scenes = [make_scene(shapes.rng_for(SEED, split, i, 0)) for i in range(number)]
        paths = [data / "images" / shapes.file_name(split, i) for i in range(number)]
        return warm_up.label_tiles(scenes, paths, CONFIG)

    labelled, held_out = load_split("train", examples), load_split("test", min(tests, 500))
    tokenizer = tokenizer_of(output / "start")
    words = [ids_of(names, tokenizer) for names in warm_up.NAMES]
    settings = scaled(WARM_UPS["tower"], share) | dict(seed=SEED, output=output / "log" / "tower")
    params = warm_up.warm_up_tower(load(output / "start"), CONFIG, words, labelled, held_out, **settings)
    save(output / "tower", CONFIG, params, tokenizer)


def warm_up_decoder(name: str, output: Path, data: Path, checkpoint: Path, share: float) -> None:
    config = COMMON.replace(
        checkpoint=str(checkpoint),
        data=str(data / "train.json"),
        eval_data=str(data / "test.json"),
        image_folder=str(data / "images"),
        output=str(output / "log" / name),
    )
    if name == "look":  # one tile: a quarter of the computation, and each object appears once
        config = config.replace(
            data=str(data / "looking.json"),
            eval_data=str(data / "test_looking.json"),
            image_folder=str(data / "small"),
            aspect_ratio="square",
            max_length=230,
        )
    configs = [config]
    if name == "captions":  # every third batch has captions, as in stage 1
        captions = config.replace(data=str(data / "captions.json"), template=STAGES["stage-1"]["template"])
        configs = [config, config, captions]
    params = warm_up.warm_up_decoder(configs, **scaled(WARM_UPS[name], share))
    save(output / name, CONFIG, params, tokenizer_of(checkpoint))


def write_looking(data: Path, examples: int, tests: int) -> None:
    """Write questions that only require finding one or two objects, about images resized to one tile: finding what a
    word names is learned faster in isolation."""
    kinds = [questions.colour, questions.shape, questions.place, questions.position]
    for split, number, name in (("test", tests, "test_looking.json"), ("train", examples, "looking.json")):
        rows = []
        for i in range(number):
            scene, rng = make_scene(shapes.rng_for(SEED, split, i, 0)), shapes.rng_for(SEED, split, i, 4)
            turns: dict[questions.Turn, None] = {}
            for ask in 30 * kinds:
                if turn := ask(rng, scene):
                    turns[turn] = None
                if len(turns) == LOOK_QUESTIONS:
                    break
            if len(scene.things) > 1 and turns:
                named = [("look", turn) for turn in turns]
                rows.append(shapes.make_row(rng, f"{split}-{i}", [shapes.file_name(split, i)], named))
        resize_images([shapes.file_name(split, i) for i in range(number)], data / "images", data / "small")
        (data / name).write_text(json.dumps(rows))


def resize_images(names: list[str], source: Path, target: Path) -> None:
    """Resize images to one tile, as for the base tile."""
    target.mkdir(parents=True, exist_ok=True)

    def save(name: str) -> None:
        Image.open(source / name).resize((TILE, TILE)).save(target / name)

    shapes.save_each("resizing", save, names)


def reset_projector(warm: Path, reset: Path) -> None:
    """Save the warmed-up model with a random projector, the start of LLaVA's stage 1."""
    tokenizer = tokenizer_of(warm)
    projector = initialize(CONFIG, SEED + 1, tokenizer)["projector"]
    save(reset, CONFIG, load(warm) | {"projector": projector}, tokenizer)


def stage_config(name: str, output: Path, data: Path, checkpoint: Path, share: float) -> TrainConfig:
    captions = name == "stage-1"
    return COMMON.replace(
        checkpoint=str(checkpoint),
        data=str(data / ("captions.json" if captions else "train.json")),
        eval_data=str(data / "test_captions.json") if captions else None,
        image_folder=str(data / "images"),
        output=str(output / name),
        **scaled(STAGES[name], share),
    )


def run_stage(name: str, output: Path, data: Path, checkpoint: Path, share: float) -> Path:
    """Train or resume one stage. Returns the resulting checkpoint."""
    note(f"--- {name}")
    if status := loop.train(prepare(stage_config(name, output, data, checkpoint, share))):
        raise SystemExit(status)
    return output / name / "model"


# ---------------------------------------------------------------- measurements


def captions_loss(output: Path, data: Path, checkpoint: Path) -> float:
    """Mean loss of a checkpoint over the labelled tokens of the held-out captions, as stage 1 measures it."""
    config = stage_config("stage-1", output, data, checkpoint, 1.0)
    found, mesh = open_checkpoint(checkpoint), make_mesh({}, jax.devices()[:1])
    frozen, state, _, eval_fn = setup(found.load(mesh), found.config, config, mesh, 1)
    held_out = open_data(config, found.config, found.tokenizer, path=config.eval_data, train=False)
    sums = [eval_fn(frozen, state, loop.put_batch(batch, mesh, held_out.rows)) for batch, _ in held_out]
    held_out.close()
    return float(sum(x["loss_sum"] for x in sums) / sum(x["labelled"] for x in sums))


def ask_about_sizes(scenes: list[Scene], path: Path) -> None:
    """Write questions about the shape of objects with a unique colour; their kind is the object's size."""
    rows = []
    for i, scene in enumerate(scenes):
        rng = shapes.rng_for(SEED, "test", i, 3)
        for thing in scene.things:
            if len(scene.having(colour=thing.colour)) == 1:
                turn = (f"what shape is the {thing.colour} object?", thing.shape)
                rows.append(shapes.make_row(rng, f"{i}", [shapes.file_name("test", i)], [(thing.size, turn)]))
    path.write_text(json.dumps(rows))


def ask_for_details(scenes: list[Scene], path: Path) -> None:
    """Write requests for a detailed description of each scene, to be matched exactly."""
    rows = []
    for i, scene in enumerate(scenes):
        rng = shapes.rng_for(SEED, "test", i, 5)
        turn = questions.detail(rng, scene)
        rows.append(shapes.make_row(rng, f"{i}", [shapes.file_name("test", i)], [("detail", turn)]))
    path.write_text(json.dumps(rows))


def write_noise(data: Path, tests: int, output: Path) -> None:
    """Write noise images with the sizes of the test images."""
    (output / "noise").mkdir(parents=True, exist_ok=True)
    for i in range(tests):
        name, rng = shapes.file_name("test", i), np.random.default_rng((SEED, i))
        image = Image.open(data / "images" / name)
        Image.fromarray(rng.integers(0, 256, (image.height, image.width, 3), np.uint8)).save(output / "noise" / name)


def prior(asked: Path, trained_on: Path) -> dict[str, float]:
    """Accuracy by kind of always giving the most frequent training answer to a question's wording."""
    answers = collections.defaultdict(collections.Counter)
    for _, question, answer in _turns(trained_on):
        answers[_wording(question)][answer] += 1
    right = collections.defaultdict(list)
    for kind, question, answer in _turns(asked):
        guess = answers[_wording(question)].most_common(1)
        right[kind].append(bool(guess) and guess[0][0] == answer)
    return {kind: sum(scores) / len(scores) for kind, scores in right.items()}


def _turns(path: Path) -> Iterator[tuple[str, str, str]]:
    for row in json.loads(path.read_text()):
        texts = [turn["value"] for turn in row["conversations"]]
        yield from zip(row["kinds"], texts[::2], texts[1::2], strict=True)


def _wording(question: str) -> str:
    """A question with names replaced: "what shape is the _ object?"."""
    names = "|".join([*COLOURS, *map(plural, SHAPES), *SHAPES, *SIZES])
    return re.sub(rf"\b({names})\b|<image>|\n", "_", question.lower())


def make_bundle(model: Path, bundle: Path) -> None:
    """Write the bundle: the model in transformers' format in bfloat16, and an example image."""
    to_hf(model, bundle, dtype="bfloat16", overwrite=True)
    rng = np.random.default_rng(EXAMPLE)
    draw(make_scene(rng), rng).save(bundle / "example.png")


def measure(model: Path, output: Path, data: Path, tests: int) -> dict[str, Any]:
    """Measure accuracy by kind, on noise, by prior, and with the base tile only."""
    scenes = [make_scene(shapes.rng_for(SEED, "test", i, 0)) for i in range(tests)]
    ask_about_sizes(scenes, output / "sizes.json")
    ask_for_details(scenes[: SUBSET // 4], output / "details.json")
    write_noise(data, tests, output)
    engine = Engine.load(model)
    base = Engine.load(model)
    base.config = base.config.replace(aspect_ratio="square")

    def ask(engine, file, folder, limit=None):
        note(f"--- {file.name}, {folder.name}")
        asked = Conversations(file, folder, "exact_match")
        score = evaluate(engine, asked, Path(), rows=64, max_new_tokens=128, limit=limit)
        return {"accuracy": score.value, "questions": len(score.marks), "by_kind": score.parts}

    return {
        "questions": ask(engine, data / "test.json", data / "images"),
        "details": ask(engine, output / "details.json", data / "images"),
        "noise": ask(engine, data / "test.json", output / "noise", SUBSET),
        "prior": prior(data / "test.json", data / "train.json"),
        "sizes": ask(engine, output / "sizes.json", data / "images", SUBSET),
        "base tile": ask(base, output / "sizes.json", data / "small", SUBSET),
    }


def draw_curves(output: Path) -> Any:
    """Plot loss and accuracy of the warm-ups, and loss of the stages."""
    runs = {name: read_run(str(output / "log" / name)) for name in WARM_UPS}
    runs |= {name: read_run(str(output / name)) for name in STAGES}
    measured = [name for name, run in runs.items() if any("accuracy" in line for line in run)]
    figure, axes = new_figure(len(runs) + len(measured))
    panels = iter(axes)
    for name, run in runs.items():
        steps, losses = points(run, "loss", name)
        ax = next(panels)
        ax.plot(steps, list(smooth(losses, 0.9)))
        ax.set(title=f"{name}: loss", xlabel="steps", ylim=(0, None))
        if name in measured:
            ax = next(panels)
            ax.plot(*points(run, "accuracy", name), "o-")
            ax.set(title=f"{name}: held-out {'patches' if name == 'tower' else 'questions'}", xlabel="steps")
            ax.set(ylim=(0, 1.02))
            ax.yaxis.set_major_formatter("{x:.0%}")
    for ax in axes:
        ax.grid(alpha=0.3)
    return figure


# ---------------------------------------------------------------- the command


def begin(output: Path, settings: dict[str, Any]) -> None:
    """Create the output directory, or check that it was created with these settings.

    Raises:
      InputError: the directory has other contents or settings.
    """
    path, settings = output / "settings.json", json.loads(json.dumps(settings))
    temporary = path.with_suffix(".new")
    if path.exists():
        try:
            saved = read_json(path)
        except InputError:
            saved = {}
        if found := differences(saved, settings):
            raise InputError(
                f"--output {output}: was created with other settings: {'; '.join(found)}; resume with those, "
                "or give a new directory"
            )
        return
    if output.exists() and set(output.iterdir()) - {temporary}:
        raise InputError(f"--output {output}: is not empty; give a new directory")
    output.mkdir(parents=True, exist_ok=True)
    temporary.write_text(json.dumps(settings, indent=2) + "\n")
    temporary.replace(path)


def main() -> None:
    p = Parser(prog="python examples/shapes/recipe.py", description="Train the small model of shapes.")
    p.add_argument("--output", required=True, metavar="DIR")
    p.add_argument("--examples", type=int, default=EXAMPLES, metavar="N", help=f"(default {EXAMPLES})")
    p.add_argument("--tests", type=int, default=TESTS, metavar="N", help=f"test images (default {TESTS})")
    p.add_argument(
        "--share", type=float, default=1.0, metavar="X", help="fraction of the steps, for a quick try (default 1)"
    )
    args = p.parse_args()
    for name in ("examples", "tests"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name} {getattr(args, name)}: must be at least 1")
    if not 0 < args.share < math.inf:
        raise InputError(f"--share {args.share}: must be above 0")
    output, data = Path(args.output).absolute(), Path(args.output).absolute() / "data"
    new_figure(1)  # an error now, not after an hour, if there is no matplotlib
    flags = dict(examples=args.examples, tests=args.tests, share=args.share)
    begin(output, flags | WARM_UPS | STAGES | dict(common=asdict(COMMON), model=asdict(CONFIG)))
    enable_compilation_cache()
    if not data.exists():
        shutil.rmtree(drawn := output / "drawing", ignore_errors=True)
        shapes.write(drawn, args.examples, args.tests, SEED)
        drawn.rename(data)
    if not (data / "looking.json").exists():
        write_looking(data, args.examples, args.tests)
    if not (output / "start").exists():
        save(output / "start", CONFIG, *make_start())
    with quick_gradients():
        if not (output / "tower").exists():
            warm_up_tower(output, data, args.examples, args.tests, args.share)
        for before, name in itertools.pairwise(WARM_UPS):
            if not (output / name).exists():
                warm_up_decoder(name, output, data, output / before, args.share)
        if not (output / "reset").exists():
            reset_projector(output / "captions", output / "reset")
        first = run_stage("stage-1", output, data, output / "reset", args.share)
        second = run_stage("stage-2", output, data, first, args.share)
    make_bundle(second, output / "bundle")
    results = measure(output / "bundle", output, data, args.tests)
    results["captions_loss"] = {
        name: captions_loss(output, data, path) for name, path in (("reset", output / "reset"), ("stage-1", first))
    }
    (output / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    save_figure(draw_curves(output), output / "bundle" / "curves.png")
    facts = dict(examples=args.examples, tests=args.tests, tile=TILE, patch=PATCH, vocab=CONFIG.text.vocab_size)
    facts["parameters"] = sum(x.size for x in jax.tree.leaves(load(second)))
    (output / "bundle" / "README.md").write_text(write_card(results, **facts))
    asked = results["questions"]
    totals = {"accuracy": asked["accuracy"]}
    print(score_table({"parts": asked["by_kind"], "totals": totals, "scale": 100, "questions": asked["questions"]}))


if __name__ == "__main__":
    run_main(main)
