"""The model card: what the small model is, and what was measured of it."""

from typing import Any

TEXT = """# A small LLaVA that knows coloured shapes

{parameters:,} parameters in the architecture of LLaVA 1.6: a CLIP-type tower (tiles of {tile} pixels, patches of
{patch}), anyres with `spatial_unpad`, an `mlp2x_gelu` projector, a Mistral-type decoder with grouped heads, and a
tokenizer of {vocab} pieces with LLaMA's conventions. Format: `transformers.LlavaNextForConditionalGeneration`,
bfloat16.

## Data

`python -m train.datasets.shapes --output DIR --examples {examples} --test-examples {tests} --seed 0`: {examples:,}
images with one to six objects (six shapes, eight colours, two sizes; plain, gradient or noisy backgrounds; sides from
1:3 to 3:1), captions, and conversations whose answers follow from what was drawn. All of it is made by rule, from no
other data.

## Training

`python examples/shapes/recipe.py --output DIR`: a warm-up of the tower on labelled patches and of the decoder
on questions and captions (there are no pretrained ones this small), the projector reset, then LLaVA's two stages: the
projector alone on captions, then projector and decoder on conversations with the tower frozen.

| held-out captions | loss for each token |
| --- | --- |
| projector reset | {reset:.3f} |
| after stage 1 (projector only) | {stage_1:.3f} |

![Loss and accuracy](curves.png)

## Accuracy

Exact answers to {questions:,} questions about {tests:,} pictures that are not in the training data
(`python -m infer.evaluate`). "Noise": every picture replaced by noise, for the first {noise:,} questions. "Prior": what
was answered most often in training to questions of the same wording.

| kind of question | questions | accuracy | noise | prior |
| --- | ---: | ---: | ---: | ---: |
{kinds}

"What shape is the red object?", with all tiles and with the base tile alone (the whole picture squashed to
{tile} pixels):

| the object is | questions | all tiles | base tile alone |
| --- | ---: | ---: | ---: |
{sizes}

## Limits

It miscounts by one now and then, the more objects the oftener, and most of all where it has to count twice
(`reasoning`). Of {described:,} detailed descriptions of held-out pictures {described_right:.1%} are right to the word;
in the others the number, an object or its place is wrong, or one is named twice or forgotten. It knows nothing but such
pictures and such questions, in English, mostly one line long; of anything else it makes something up in the same words.
Colours between two of its eight, shapes that touch, and more than six objects are outside of what it has seen. It is
there to try and to test things with, not to be used.
"""


def write_card(results: dict[str, Any], **facts: Any) -> str:
    """The card in Markdown, from what `recipe.measure` found; `facts` fill in the rest."""
    asked, noise = results["questions"], results["noise"]
    kinds = [
        f"| {kind} | {part['questions']:,} | {part['accuracy']:.1%} | {noise['by_kind'][kind]['accuracy']:.1%} "
        f"| {results['prior'][kind]:.1%} |"
        for kind, part in sorted(asked["by_kind"].items())
    ]
    kinds.append(
        f"| all | {asked['questions']:,} | {asked['accuracy']:.1%} | {noise['accuracy']:.1%} "
        f"| {sum(results['prior'].values()) / len(results['prior']):.1%} |"
    )
    base = results["base tile"]["by_kind"]
    sizes = [
        f"| {size} | {part['questions']:,} | {part['accuracy']:.1%} | {base[size]['accuracy']:.1%} |"
        for size, part in results["sizes"]["by_kind"].items()
    ]
    losses = results["captions_loss"]
    return TEXT.format(
        kinds="\n".join(kinds), sizes="\n".join(sizes), questions=asked["questions"], noise=noise["questions"],
        described=results["details"]["questions"], described_right=results["details"]["accuracy"],
        reset=losses["reset"], stage_1=losses["stage-1"], **facts,
    )  # fmt: skip
