"""The supported families of vision towers and decoders: one file each, listed only here."""

from llava_jax.checkpoints.families.clip import CLIP
from llava_jax.checkpoints.families.family import Decoder, Tower
from llava_jax.checkpoints.families.llama import LLAMA
from llava_jax.checkpoints.families.mistral import MISTRAL
from llava_jax.checkpoints.families.qwen2 import QWEN2

TOWERS: dict[str, Tower] = {tower.name: tower for tower in (CLIP,)}
DECODERS: dict[str, Decoder] = {decoder.name: decoder for decoder in (LLAMA, MISTRAL, QWEN2)}
