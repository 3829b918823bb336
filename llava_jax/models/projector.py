"""The projector: features of the vision tower to rows of the decoder's width."""

import flax.linen as nn
import jax

from llava_jax.config import LlavaConfig, projector_depth
from llava_jax.models.layers import ACTIVATIONS, Dense
from llava_jax.sharding.partition import UNSHARDED, Partition


class Projector(nn.Module):
    """`linear`, `mlpNx_gelu` or `identity` (llava/model/multimodal_projector/builder.py)."""

    config: LlavaConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for i in range(projector_depth(self.config.projector)):
            x = ACTIVATIONS["gelu"](x) if i else x
            x = Dense(self.config.text.width, bias=self.config.projector_bias, name=f"linear_{i}")(x)
        return x


def project(params, config: LlavaConfig, features: jax.Array, partition: Partition = UNSHARDED) -> jax.Array:
    """Features [..., C] to the decoder's width [..., D]. `params` is the `projector` part of the tree."""
    return Projector(config).apply({"params": partition.gather(params, "projector")}, features)
