"""The configuration of a training run: a frozen dataclass whose fields are flags, and the reference's presets."""

import dataclasses
import types
import typing
from typing import Any

from llava_jax.config import ASPECT_RATIOS, LlavaConfig
from llava_jax.console import (
    MAX_INT32,
    MIN_POSITIVE,
    SEED,
    InputError,
    Range,
    check_ranges,
    flag_of,
    integer,
    note,
    number,
    shorten,
    show_value,
)
from llava_jax.data.buckets import MAX_SLOTS
from llava_jax.data.templates import Template, choose_template, get_template, is_jinja
from llava_jax.models.layers import REMAT
from llava_jax.sharding.mesh import parse_mesh

TUNE = ("projector", "projector,decoder", "projector,decoder,vision", "lora")
BATCHING = ("packed", "bucketed")
IMAGE_FIRST = ("as_is", "random")
SCHEDULES = ("cosine", "constant")
DTYPES = ("bfloat16", "float32")
LORA_TARGETS = ("q", "k", "v", "o", "gate", "up", "down")


def _(default: Any, help: str, allowed: Range | None = None) -> Any:
    return dataclasses.field(default=default, metadata={"help": help} | ({"range": allowed} if allowed else {}))


RATE = number(0, 10)
DECAY = number(0, 0.999999)  # float32 has few numbers between that and 1
EVERY = integer(0, MAX_INT32)


class _Origin:
    """Attributes of `TrainConfig` that are not fields: they record where its values come from."""

    preset: str | None
    given: frozenset[str]


@dataclasses.dataclass(frozen=True)
class TrainConfig(_Origin):
    """The configuration of a run. Each field is a flag (`learning_rate` is `--learning-rate`), `metadata["help"]`
    describes it, and `metadata["range"]` is the range of a number.

    Attributes:
      preset: the name of the preset that the values not in `given` come from; None without a preset. `preset` and
        `given` are neither compared nor saved.
      given: names of the fields that have been replaced.

    Raises:
      InputError: a value is out of range, or not one of the allowed values.
    """

    # data
    data: str | tuple[str, ...] = _(
        "",
        "conversations: JSON list, JSON lines, LLaVA-NeXT's YAML or a prepared dataset; FILE=0.5 for half of its "
        "rows; repeatable",
    )
    image_folder: str = _("", "directory of the images that the data names")
    follow_links: bool = _(False, "follow links that lead out of the image folder, to other disks")
    template: str | None = _(None, "conversation template; None: the checkpoint's own")
    max_length: int = _(
        2048, "maximum positions of a conversation after splicing; longer ones are truncated", integer(2, 2**17)
    )
    batching: str = _("packed", "packed: several conversations per row; bucketed: one per row, in a few lengths")
    global_batch_size: int = _(128, "conversations per step, over all devices and accumulated parts", integer(1, 10**6))
    epochs: float = _(1.0, "passes over the data", number(0, 10**6, above=True))
    steps: int | None = _(None, "steps of the whole run; None: what `epochs` gives", integer(1, MAX_INT32))
    on_bad_sample: str = _("skip", "skip: leave out bad samples and count them; fail: stop at the first")
    max_bad_share: float = _(0.01, "share of bad samples above which the run stops even with skip", number(0, 1))
    workers: int = _(4, "threads that read and decode images; 0: the thread that makes batches does", integer(0, 1024))
    prefetch: int = _(2, "batches prepared ahead", integer(1, 1024))
    positions_per_row: int | None = _(
        None,
        "positions of a packed row; None: max_length, or up to twice that if it saves computation",
        integer(2, 2**18),
    )
    tiles_per_row: int | None = _(None, "maximum tiles per row; None: from the data", integer(0, 512))
    aspect_ratio: str | None = _(None, "square, pad or anyres; None: the checkpoint's own")
    image_first: str = _(
        "as_is", "as_is: a single image before its question, as in the reference; random: before or after it"
    )
    eval_data: str | tuple[str, ...] | None = _(None, "held-out conversations to evaluate on; repeatable")
    eval_every: int = _(0, "steps between evaluations; 0: only after the last", EVERY)
    eval_benchmarks: tuple[str, ...] | None = _(
        None, "benchmarks to score in evaluations: pope,scienceqa (python -m infer.evaluate --list lists all)"
    )
    eval_data_dir: str | None = _(None, "directory that has the files of each benchmark in one of its own")
    eval_limit: int | None = _(
        None,
        "ask only the first questions of each benchmark; None: all",
        integer(1, MAX_INT32),
    )
    eval_batch_size: int = _(16, "questions of a benchmark to answer at once, by each process", integer(1, MAX_SLOTS))

    # model
    checkpoint: str = _("", "the model to start from: a directory or a hub name")
    vision_tower: str | None = _(None, "CLIP directory, for an original checkpoint without its tower")
    tune: str = _("projector,decoder", "parts to train: " + " | ".join(TUNE))
    lora_rank: int = _(128, "rank of LoRA's matrices", integer(1, 8192))
    lora_alpha: float = _(256.0, "LoRA's update is scaled by alpha / rank", number(0, 10**6))
    lora_dropout: float = _(0.05, "dropout rate of LoRA's inputs", number(0, 0.999))
    lora_targets: tuple[str, ...] = _(LORA_TARGETS, "linear layers of the decoder that LoRA adapts")

    # optimizer
    learning_rate: float = _(2e-5, "peak learning rate", RATE)
    projector_learning_rate: float | None = _(None, "peak learning rate of the projector; None: learning_rate", RATE)
    vision_learning_rate: float | None = _(None, "peak learning rate of the vision tower; None: learning_rate", RATE)
    schedule: str = _("cosine", "cosine: to zero at the last step; constant; either after a linear warm-up")
    warmup_ratio: float = _(0.03, "warm-up as a share of all steps", number(0, 1))
    weight_decay: float = _(0.0, "AdamW's weight decay; not applied to biases and norms", number(0, 100))
    adam_b1: float = _(0.9, "AdamW's beta 1", DECAY)
    adam_b2: float = _(0.999, "AdamW's beta 2", DECAY)
    adam_eps: float = _(1e-8, "AdamW's epsilon", number(MIN_POSITIVE, 1))
    max_grad_norm: float = _(
        1.0, "clip gradients to this norm over all trained parameters; 0: no clipping", number(0, 10**6)
    )
    accumulate: int = _(
        1, "parts of a batch to compute one after the other, summing their gradients", integer(1, 10**6)
    )

    # run
    output: str = _("", "directory of the run: checkpoints, metrics, exported model")
    seed: int = _(0, "random seed: order of the data, LoRA's initialization and dropout", SEED)
    dtype: str = _("bfloat16", "dtype of the computation; trained parameters are stored in float32")
    reduce_dtype: str | None = _(None, "dtype of the sum of gradients over devices, bfloat16 or float32; None: dtype")
    remat: str = _(
        "full", "activations of a layer to save for the backward pass: full (none) | minimal | dots | none (all)"
    )
    mesh: str | None = _(None, "for example data=1,fsdp=8,tensor=1; None: all devices along fsdp")
    save_every: int = _(500, "steps between checkpoints; 0: only as save_minutes says, and after the last step", EVERY)
    save_minutes: float = _(30.0, "maximum minutes between checkpoints; 0: no limit", number(0, 10**6))
    keep: int = _(3, "latest checkpoints to keep, in addition to the best", integer(1, MAX_INT32))
    log_every: int = _(1, "steps between lines of metrics", integer(1, MAX_INT32))
    profile_steps: str | None = _(None, "A:B: write a profiler trace of steps A to B")
    export_hf: bool = _(False, "also export the model in transformers' format")

    preset: dataclasses.InitVar[str | None] = None
    given: dataclasses.InitVar[frozenset[str]] = frozenset()

    def __post_init__(self, preset: str | None, given: frozenset[str]):
        object.__setattr__(self, "preset", preset)
        object.__setattr__(self, "given", given)
        for field in dataclasses.fields(self):
            _check_type(field.name, getattr(self, field.name), field.type)
        for name, known in (
            ("tune", TUNE),
            ("batching", BATCHING),
            ("schedule", SCHEDULES),
            ("remat", REMAT),
            ("dtype", DTYPES),
            ("reduce_dtype", (None, *DTYPES)),
            ("on_bad_sample", ("skip", "fail")),
            ("image_first", IMAGE_FIRST),
            ("aspect_ratio", (None, *ASPECT_RATIOS)),
        ):
            if getattr(self, name) not in known:
                listed = ", ".join(str(value) for value in known if value)
                raise InputError(f"{flag_of(name)} {shorten(getattr(self, name))!r}: only {listed}")
        check_ranges(self)
        if self.positions_per_row is not None and self.positions_per_row < self.max_length:
            raise InputError(
                f"--positions-per-row {self.positions_per_row}: must be at least --max-length, {self.max_length}"
            )
        if self.accumulate > self.global_batch_size:
            raise InputError(
                f"--accumulate {self.accumulate}: must be at most --global-batch-size, {self.global_batch_size}: each "
                "part needs a conversation"
            )
        if unknown := [target for target in self.lora_targets if target not in LORA_TARGETS]:
            raise InputError(f"--lora-targets {shorten(', '.join(unknown))}: only {', '.join(LORA_TARGETS)}")
        if self.tune == "lora" and not self.lora_targets:
            raise InputError(f"--lora-targets: name at least one of {', '.join(LORA_TARGETS)}")
        if self.mesh is not None:
            parse_mesh(self.mesh)

    def replace(self, **changes) -> "TrainConfig":
        """A copy with other values, which are added to `given`."""
        return dataclasses.replace(self, **changes, given=self.given | changes.keys())


def _check_type(name: str, value: Any, wanted: Any) -> None:
    """Check a value's type against the field's annotation; an int is accepted for a float."""
    kinds = wanted.__args__ if isinstance(wanted, types.UnionType) else (wanted,)
    kinds = tuple(typing.get_origin(kind) or kind for kind in kinds)
    kinds = (*kinds, int) if float in kinds else kinds
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        kind = wanted.__name__ if isinstance(wanted, type) else wanted
        raise InputError(f"{flag_of(name)} {show_value(value)}: must be {kind}")


# The reference's scripts, by the name of the stage (scripts/*.sh, scripts/v1_5/*.sh of haotian-liu/LLaVA).
PRESETS: dict[str, TrainConfig] = {
    "v1-pretrain": TrainConfig(template="plain", aspect_ratio="square", tune="projector", learning_rate=2e-3),
    # The paper places the image before or after the question at random.
    "v1-finetune": TrainConfig(template="v1", aspect_ratio="square", image_first="random"),
    "v1-finetune-scienceqa": TrainConfig(template="v1", aspect_ratio="square", epochs=12.0),
    "v1.5-pretrain": TrainConfig(
        template="plain", aspect_ratio="square", tune="projector", global_batch_size=256, learning_rate=1e-3
    ),
    "v1.5-finetune": TrainConfig(template="v1", aspect_ratio="pad"),
    "v1.5-finetune-lora": TrainConfig(
        template="v1", aspect_ratio="pad", tune="lora", learning_rate=2e-4, projector_learning_rate=2e-5
    ),
    "v1.5-finetune-task": TrainConfig(template="v1", aspect_ratio="pad"),
    # The settings of v1.6 are not published; these are from LLaVA-NeXT's direct_finetune_clip.sh, with the batch size
    # of v1.5 and the length of the released models.
    "v1.6-finetune": TrainConfig(
        aspect_ratio="anyres", tune="projector,decoder,vision", max_length=4096, learning_rate=1e-5,
        vision_learning_rate=2e-6,
    ),
    # There is no script for LoRA either: v1.5's settings, with v1.6's images and length, and a frozen tower.
    "v1.6-finetune-lora": TrainConfig(
        aspect_ratio="anyres", tune="lora", max_length=4096, learning_rate=2e-4, projector_learning_rate=2e-5
    ),
}  # fmt: skip
PRESETS = {name: dataclasses.replace(preset, preset=name) for name, preset in PRESETS.items()}


# ---------------------------------------------------------------- presets and checkpoints


def check_preset(config: TrainConfig, model: LlavaConfig) -> None:
    """Check that the preset does not contradict the checkpoint: only a flag may change what the model was trained for.

    The stage decides between the plain template and others, and between `square` and `pad`.

    Args:
      model: the checkpoint's configuration.

    Raises:
      InputError: the preset's template or image mode, not set by a flag, is of another kind than the checkpoint's.
    """
    from_preset = config.preset and "template" not in config.given and config.template not in (None, "plain")
    if from_preset and is_jinja(choose_template(model)) and not _contradictions(config, model):
        note(f"warning: the preset's template {config.template} replaces the checkpoint's own chat template")
    found = _contradictions(config, model)
    if not found:
        return
    assert config.preset is not None
    flags = [flag_of(name) for name in found]
    preset, own = zip(*found.values(), strict=True)
    as_preset, as_checkpoint = (" ".join(sum(zip(flags, values, strict=True), ())) for values in (preset, own))
    stage = config.preset.partition("-")[2]
    others = [name for name in PRESETS if name.partition("-")[2] == stage and not _contradictions(PRESETS[name], model)]
    other = f"take --preset {others[-1]}, or " if others else ""
    raise InputError(
        f"--preset {config.preset} has {' and '.join(preset)}, the checkpoint {' and '.join(own)}: {other}give "
        f"{as_checkpoint} to train it unchanged, or {as_preset} to change it"
    )


def _contradictions(config: TrainConfig, model: LlavaConfig) -> dict[str, tuple[str, str]]:
    """The values of the preset and the checkpoint for each field of the preset in which they are of different kinds."""
    found, own = {}, choose_template(model)
    if is_jinja(own):  # which has no name: use the template that suits the decoder
        own = choose_template(model.replace(template=None))
    if config.template:
        kinds = {_kind(get_template(name)) for name in (config.template, own)}
        if len(kinds) > 1 and ("plain",) not in kinds:
            found["template"] = config.template, own
    if config.aspect_ratio and (config.aspect_ratio == "anyres") != (model.aspect_ratio == "anyres"):
        found["aspect_ratio"] = config.aspect_ratio, model.aspect_ratio
    return {name: values for name, values in found.items() if config.preset and name not in config.given}


def _kind(template: Template) -> tuple:
    """Equal for templates that differ only in their system text or their role names."""
    if template.style in ("chatml", "llama_2"):
        return template.style, template.roles, template.sep, template.sep2
    return (template.style,)
