"""LoRA (Hu et al. 2021) on the linear layers of the decoder: parameters, application, adapters in PEFT's format.

An adapted kernel W [in, out] has two more parameters next to it in the tree, `lora_a` [in, rank] and `lora_b`
[rank, out]: the layer computes x W + alpha / rank * drop(x) A B. The model's modules are unchanged: `adapted`
intercepts the calls of Dense layers whose parameters contain factors.
"""

import contextlib
import json
import os
import pickle
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import multihost_utils
from safetensors.numpy import save_file

from llava_jax.checkpoints.outputs import new_directory
from llava_jax.checkpoints.tensor_names import write_name
from llava_jax.config import LlavaConfig
from llava_jax.models.layers import SAVED_LORA
from llava_jax.models.llava import Params
from llava_jax.sharding.fsdp import row_shard_index
from train.config import TrainConfig

FACTORS = {"lora_a": "lora_A", "lora_b": "lora_B"}  # our names: PEFT's


def init_lora(kernels: Mapping[str, jax.Array], config: TrainConfig) -> dict[str, jax.Array]:
    """Initialize the factors of stacked kernels `{".../q/kernel": [L, in, out]}`, by path, in float32.

    As in PEFT: A is uniform in +-1 / sqrt(in) (He's initialisation with a = sqrt(5)), B is zero.
    """
    factors, key = {}, jax.random.key(config.seed)
    for i, (path, kernel) in enumerate(kernels.items()):
        layers, width, out = kernel.shape
        shape = (layers, width, config.lora_rank)
        bound = width**-0.5
        base = path.removesuffix("kernel")
        factors[base + "lora_a"] = jax.random.uniform(jax.random.fold_in(key, i), shape, minval=-bound, maxval=bound)
        factors[base + "lora_b"] = jnp.zeros((layers, config.lora_rank, out))
    return factors


def adapted_kernels(paths: Iterable[str], config: TrainConfig) -> list[str]:
    """The paths of stacked kernels that LoRA adapts."""
    tails = tuple(f"/{target}/kernel" for target in config.lora_targets)
    return [path for path in paths if path.startswith("decoder/layers/") and path.endswith(tails)]


def add_dropout(layers: dict, key: jax.Array) -> dict:
    """Add a key to each adapted linear layer of the stacked decoder layers: `lora_key` [L]."""
    flat = flatten_dict(layers, sep="/")
    factors = [path for path in flat if path.endswith("lora_a")]
    for i, path in enumerate(factors):
        keys = jax.random.split(jax.random.fold_in(key, i), flat[path].shape[0])
        flat[path.removesuffix("lora_a") + "lora_key"] = keys
    return unflatten_dict(flat, sep="/")


def adapted(config: TrainConfig) -> contextlib.AbstractContextManager:
    """A context in which Dense layers whose parameters contain factors apply them."""

    def intercept(call, args, kwargs, context):
        out = call(*args, **kwargs)
        dense = context.module
        if not isinstance(dense, nn.Dense) or not dense.has_variable("params", "lora_a"):
            return out
        (x,) = args
        if dense.has_variable("params", "lora_key"):
            key = dense.get_variable("params", "lora_key")
            # Global row numbers, so that dropout is the same on every mesh.
            rows = row_shard_index() * len(x) + jnp.arange(len(x))
            keys = jax.vmap(jax.random.fold_in, (None, 0))(key, rows)
            dropped = min(round(config.lora_dropout * 2**16), 2**16 - 1)
            kept = jax.lax.map(lambda key: jax.random.bits(key, x.shape[1:], "uint16") >= dropped, keys)
            x = jnp.where(kept, x / (1 - config.lora_dropout), 0).astype(x.dtype)
        a, b = (dense.get_variable("params", name) for name in FACTORS)
        return out + checkpoint_name(x @ a * scale(config), SAVED_LORA) @ b

    return nn.intercept_methods(intercept)


def scale(config: TrainConfig) -> float:
    """The scale of the factors' product."""
    return config.lora_alpha / config.lora_rank


# ---------------------------------------------------------------- after training


def merged(kernel: np.ndarray, a: np.ndarray, b: np.ndarray, config: TrainConfig) -> np.ndarray:
    """A kernel plus the scaled product of its factors, in the kernel's dtype."""
    return (kernel.astype(np.float32) + scale(config) * (a @ b)).astype(kernel.dtype)


def save_adapter(directory: str | os.PathLike, params: Params, model: LlavaConfig, config: TrainConfig) -> None:
    """Write the trained parameters as the reference does: a PEFT adapter, and the projector in a separate file.

        adapter_config.json  adapter_model.safetensors  non_lora_trainables.bin

    All processes call it; the first one writes, and replaces an existing adapter. Names are those of the original
    (`LlavaLlamaForCausalLM`).

    Args:
      params: the result of `parameters.export_params`: one entry per layer, factors next to their kernels.

    Raises:
      InputError: the adapter cannot be written.

    Source: llava/train/train.py, the end of `train`; peft's `save_pretrained`.
    """
    adapter, others = {}, {}
    for path, leaf in flatten_dict(params, sep="/").items():
        base, _, last = path.rpartition("/")
        if last in FACTORS:
            name, _ = write_name(f"{base}/kernel", "original", model)
            adapter[f"base_model.model.{name.removesuffix('weight')}{FACTORS[last]}.weight"] = _host(leaf).T
        elif path.startswith("projector/"):
            name, (_, to_theirs) = write_name(path, "original", model)
            others[f"base_model.model.{name}"] = to_theirs(_host(leaf))
    if jax.process_index():
        return
    contents = {k: np.ascontiguousarray(x) for k, x in adapter.items()}
    adapter_config = dict(
        peft_type="LORA", task_type="CAUSAL_LM", base_model_name_or_path=config.checkpoint, bias="none",
        r=config.lora_rank, lora_alpha=config.lora_alpha, lora_dropout=config.lora_dropout, inference_mode=True,
        target_modules=sorted({name.split(".")[-3] for name in adapter}),
    )  # fmt: skip
    with new_directory(directory, overwrite=True) as staged:
        save_file(contents, staged / "adapter_model.safetensors")
        _save_torch(Path(staged / "non_lora_trainables.bin"), others)
        (staged / "adapter_config.json").write_text(json.dumps(adapter_config, indent=2) + "\n")


def _host(x: jax.Array) -> np.ndarray:
    if not x.is_fully_addressable:
        x = multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x, np.float32)


def _save_torch(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Write a dictionary of float32 tensors in the format of `torch.save`: a zip file of a pickle and of tensor bytes.

    The pickle names torch classes, and torch need not be installed, so this assembles the pickle from opcodes.
    """

    def plain(x) -> bytes:  # without the protocol header and the stop opcode
        return pickle.dumps(x, 2)[2:-1]

    storage, rebuild = b"ctorch\nFloatStorage\n", b"ctorch._utils\n_rebuild_tensor_v2\n"
    no_hooks = b"ccollections\nOrderedDict\n)R"
    items = b""
    for i, (name, x) in enumerate(tensors.items()):
        strides = tuple(s // x.itemsize for s in np.ascontiguousarray(x).strides)
        stored = b"(" + plain("storage") + storage + plain(str(i)) + plain("cpu") + plain(x.size) + b"tQ"
        rest = plain(0) + plain(x.shape) + plain(strides) + plain(False) + no_hooks
        items += plain(name) + rebuild + b"(" + stored + rest + b"tR"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}(" + items + b"u.")
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/version", "3\n")
        for i, x in enumerate(tensors.values()):
            archive.writestr(f"archive/data/{i}", np.ascontiguousarray(x, "<f4").tobytes())
