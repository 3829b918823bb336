"""Export the result of a run: the model in our format, optionally in transformers', and LoRA's adapter.

Frozen tensors are copied from the input checkpoint's files one by one, so that they are equal bit for bit, whatever the
run's compute dtype. Trained tensors are stored in their dtype in the input checkpoint.
"""

import dataclasses
import functools

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from jax.experimental import multihost_utils

from llava_jax.checkpoints.checkpoint import Checkpoint
from llava_jax.checkpoints.hf_files import write_hf
from llava_jax.checkpoints.orbax_files import save
from llava_jax.checkpoints.sources import Tensor
from llava_jax.config import LlavaConfig
from train import lora
from train.config import TrainConfig
from train.parameters import export_params
from train.run_directory import Output
from train.step import TrainState


def export(output: Output, checkpoint: Checkpoint, model: LlavaConfig, config: TrainConfig, state: TrainState) -> None:
    """Write `model/`, with LoRA also `adapter/`, and `hf/` if configured. All processes call it; the first one writes.

    Args:
      checkpoint: the input checkpoint.
      model: the configuration that was trained, with the run's image settings.

    Raises:
      InputError: the files cannot be written.
    """
    jax.tree.map(lambda x: x.delete(), state.opt_state)  # to free memory
    params = export_params({}, state.trained)
    if config.tune == "lora":
        lora.save_adapter(output.files / "adapter", params, model, config)
    trained = {path: _gathered(x) for path, x in flatten_dict(params, sep="/").items()}
    if not output.first:
        return
    source = checkpoint.source()
    result = dataclasses.replace(
        source, config=result_config(model, config), tensors=_replace_trained(source.tensors, trained, config)
    )
    save(
        output.root / "model",
        result.tensors,
        result.config,
        checkpoint.tokenizer.files,
        unused=source.unused,
        overwrite=True,
    )
    if config.export_hf:
        write_hf(output.root / "hf", result, checkpoint.tokenizer, overwrite=True)


def result_config(model: LlavaConfig, config: TrainConfig) -> LlavaConfig:
    """The configuration of the result: with the template and the length that the model was trained with."""
    kept = {}
    if config.template not in (None, "plain"):
        kept = {"template": config.template, "template_from": "config.json"}
    return model.replace(max_length=config.max_length, **kept)


def _gathered(x: jax.Array) -> np.ndarray | jax.Array:
    """An array that this process can read; an array sharded over processes is gathered to the host."""
    return x if x.is_fully_addressable else multihost_utils.process_allgather(x, tiled=True)


def _replace_trained(
    tensors: dict[str, Tensor], trained: dict[str, np.ndarray | jax.Array], config: TrainConfig
) -> dict[str, Tensor]:
    """The input's tensors with the trained ones replaced; nothing is read yet."""
    tensors = dict(tensors)
    for path, x in trained.items():
        if path.endswith("lora_a"):
            path = path.removesuffix("lora_a") + "kernel"
            factors = x, trained[path.removesuffix("kernel") + "lora_b"]
            read = functools.partial(_read_adapted, tensors[path], *factors, config)
        elif path.endswith("lora_b"):
            continue
        else:
            read = functools.partial(_read_trained, tensors[path], x)
        tensors[path] = dataclasses.replace(tensors[path], read=read)
    return tensors


def _read_trained(stored: Tensor, x: np.ndarray | jax.Array) -> np.ndarray:
    return np.asarray(x).astype(stored.dtype)


def _read_adapted(
    stored: Tensor, a: np.ndarray | jax.Array, b: np.ndarray | jax.Array, config: TrainConfig
) -> np.ndarray:
    return lora.merged(stored.read(), np.asarray(a), np.asarray(b), config)
