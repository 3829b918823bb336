"""A step on a mesh with `tensor`, which shards the decoder's layers, and the tiles that the tower encodes."""

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from helpers import one_device
from llava_jax import config as c
from llava_jax.data.splice import pack, splice
from llava_jax.sharding.mesh import make_mesh, parse_mesh
from training import PLAIN, conversations, start


def batch_of(packed: bool):
    """Rows of which `tensor` divides neither the tiles of all nor those of a device."""
    rows, model = conversations(c.tiny()), c.tiny()
    if packed:
        return pack([rows[:3], rows[3:4], rows[4:6], rows[6:8]], model, batch=4, tiles=7)
    return splice(rows[1:4], model, tiles=7)


def two_steps(tune: str, packed: bool, mesh) -> tuple[list[float], dict[str, np.ndarray]]:
    """Both losses, and how far each parameter has moved. With an epsilon of 1 AdamW's updates are all but proportional
    to the gradients, however small these are."""
    config = PLAIN.replace(tune=tune, learning_rate=1.0, adam_eps=1.0)
    frozen, state, step, _, batch = start(config, batch_of(packed), mesh=mesh)
    before = {path: np.asarray(x) for path, x in flatten_dict(state.trained, sep="/").items()}
    losses = []
    for _ in range(2):
        state, metrics = step(frozen, state, batch)
        losses.append(float(metrics["loss"]))
    return losses, {path: x - before[path] for path, x in flatten_dict(state.trained, sep="/").items()}


@pytest.mark.parametrize(
    ("tune", "packed", "mesh"),
    [("projector", False, "tensor=4"), ("projector,decoder,vision", True, "fsdp=2,tensor=4")],
)
def test_losses_and_parameters_are_those_of_one_device(tune, packed, mesh):
    sizes = parse_mesh(mesh)
    losses, moved = two_steps(tune, packed, make_mesh(sizes, jax.devices()[: np.prod(list(sizes.values()))]))
    want_losses, want = two_steps(tune, packed, one_device())
    np.testing.assert_allclose(losses, want_losses, rtol=1e-5)
    assert losses[1] < losses[0] and moved.keys() == want.keys()
    largest = max(np.abs(x).max() for x in want.values())
    for path, x in want.items():
        # A bias of keys changes nothing: all of its gradient is rounding.
        size = largest if path == "vision/layers/attention/k/bias" else np.abs(x).max()
        # The tower's weights move by some thousand times their precision.
        np.testing.assert_allclose(moved[path], x, atol=1e-3 * size, rtol=0, err_msg=path)
