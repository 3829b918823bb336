"""The optimizer: AdamW with a learning rate per part of the model, and transformers' schedules."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from llava_jax.console import InputError
from llava_jax.sharding.partition import path_of
from train.config import TrainConfig

PARTS = ("decoder", "projector", "vision")  # LoRA's matrices belong to the decoder


def part_of(path: str) -> str:
    """The part of the model that the parameter at `path` belongs to; the newline embedding is the decoder's."""
    top = path.split("/")[0]
    return "decoder" if top == "newline" else top


def peak(part: str, config: TrainConfig) -> float:
    """The peak learning rate of a part."""
    own = {"projector": config.projector_learning_rate, "vision": config.vision_learning_rate}.get(part)
    return config.learning_rate if own is None else own


def schedule(config: TrainConfig, total_steps: int) -> optax.Schedule:
    """Step (from 0) -> share of the peak learning rate.

    As in transformers' `get_cosine_schedule_with_warmup` and `get_constant_schedule_with_warmup`: the first step of a
    warm-up has rate 0, and the cosine reaches 0 after the last step.
    """
    warmup = math.ceil(total_steps * config.warmup_ratio)

    def share(count):
        ramp = count / max(1, warmup)
        if config.schedule == "constant":
            return jnp.where(count < warmup, ramp, 1.0)
        # (1 + cos(pi * progress)) / 2, in a form that is accurate near 0.
        remaining = jnp.clip((total_steps - count) / max(1, total_steps - warmup), 0.0, 1.0)
        return jnp.where(count < warmup, ramp, jnp.sin(0.5 * jnp.pi * remaining) ** 2)

    return share


def check_rates(config: TrainConfig, total_steps: int, wanted: int) -> None:
    """Check that the run trains something.

    Args:
      wanted: conversations per batch.

    Raises:
      InputError: the learning rate of all trained parts is 0 in all steps.
    """
    parts = ("decoder", "projector") if config.tune == "lora" else config.tune.split(",")
    if not any(peak(part, config) for part in parts):
        raise InputError(
            "nothing would be trained: all parts in --tune have learning rate 0; set --learning-rate above 0"
        )
    warmup = math.ceil(total_steps * config.warmup_ratio)
    if schedule(config, total_steps)(min(warmup, total_steps - 1)) == 0:
        few = "" if wanted == config.global_batch_size else f" of all {wanted} conversations"
        raise InputError(
            f"nothing would be trained: the run has one step{few}, the first of the warm-up, at learning rate 0; use "
            f"--global-batch-size below {wanted}, more --epochs or --steps, or --warmup-ratio 0"
        )


def make_optimizer(config: TrainConfig, total_steps: int) -> optax.GradientTransformation:
    """AdamW (Loshchilov and Hutter 2019) after clipping by the norm over all trained parameters."""
    return optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm) if config.max_grad_norm else optax.identity(),
        optax.scale_by_adam(config.adam_b1, config.adam_b2, config.adam_eps),
        optax.add_decayed_weights(config.weight_decay, mask=_decay_mask),
        optax.scale_by_schedule(schedule(config, total_steps)),
        optax.partition({part: optax.scale(-peak(part, config)) for part in PARTS}, _part_labels),
    )


def _part_labels(tree: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: part_of(path_of(path)), tree)


def _decay_mask(tree: Any) -> Any:
    """All parameters except biases and norms, as in the reference (llava/train/llava_trainer.py `create_optimizer`)."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path_of(path).split("/")[-1] not in ("bias", "scale"), tree)
