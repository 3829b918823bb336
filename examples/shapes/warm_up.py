"""The warm-up: there are no pretrained towers and decoders this small, so they are made here.

The tower learns to tell of each patch what covers it, from pictures of which everything is known (what pretraining on
captions is to CLIP). Then the decoder, tower as it is, learns language and looking from conversations. Both use Muon
(Jordan et al. 2024) for matrices and AdamW for the rest: at equal cost AdamW alone learned a third as much.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax import contrib
from PIL import Image

from llava_jax import decoder, images, llava
from llava_jax.checkpoint import open_checkpoint
from llava_jax.config import LlavaConfig
from llava_jax.console import Progress
from llava_jax.images import TileLayout
from llava_jax.llava import Params
from llava_jax.sharding import make_mesh, path_of
from llava_jax.splice import IGNORE
from llava_jax.vision import normalise, vision_features
from train import loop, step
from train.config import TrainConfig
from train.data import open_data
from train.metrics import MetricsFiles
from train.scenes import COLOURS, SHAPES, Scene

COVERED = 0.15  # of a patch: from there on an object counts
TILES = 64  # of an update of the tower
HELD_OUT = 40  # batches of questions that an accuracy is measured on
EVERY, WATCHED = 10, 25  # updates from one line of metrics to the next, lines from one measured accuracy to the next


# ---------------------------------------------------------------- any training


def fit(
    loss_of: Callable[[Any, Any, Any], jax.Array],
    params: Any,
    frozen: Any,
    batches: Iterator[Any],
    steps: int,
    rate: float,
    output: Path,
    watch: Callable[[Any], float],
) -> Any:
    """Train `params` for `loss_of(params, frozen, batch)`, and write down how it goes.

    `rate` is Muon's peak; AdamW's is a third of it. `watch(params)` gives the accuracy on what is held out.
    """

    def schedule(peak: float) -> optax.Schedule:
        return optax.warmup_cosine_decay_schedule(0.0, peak, max(1, steps // 20), steps, peak / 50)

    muon = contrib.muon(
        schedule(rate),
        adam_learning_rate=schedule(rate / 3),
        adam_b2=0.98,
        weight_decay=0.05,
        muon_weight_dimension_numbers=jax.tree_util.tree_map_with_path(_matrix, params),
    )
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), muon)

    @jax.jit
    def update(params, state, frozen, batch):
        loss, grads = jax.value_and_grad(loss_of)(params, frozen, batch)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    output.mkdir(parents=True, exist_ok=True)
    state, files = optimizer.init(params), MetricsFiles(output, 0)
    with Progress(output.name, steps, "updates", every=10.0) as bar:
        for number in range(1, steps + 1):
            params, state, loss = update(params, state, frozen, next(batches))
            if number % EVERY == 0 or number == steps:
                accuracy = {"accuracy": watch(params)} if number % (WATCHED * EVERY) == 0 or number == steps else {}
                files.write({"step": number, "loss": float(loss)} | accuracy)
                bar.advance(EVERY, f"loss {float(loss):.3f}")
    files.close()
    return params


def _matrix(path: Any, x: jax.Array) -> contrib.MuonDimensionNumbers | None:
    """Kernels of layers, stacked or not, and of the projector are Muon's; patches, tokens and heads are not."""
    if not path_of(path).endswith("/kernel") or "/head/" in path_of(path):
        return None
    return contrib.MuonDimensionNumbers(reduction_axis=x.ndim - 2, output_axis=x.ndim - 1)


# ---------------------------------------------------------------- the tower


@dataclasses.dataclass(frozen=True)
class Seen:
    """Tiles of many pictures, and what is in them.

    tiles   uint8 [N, H, W, 3]
    names   int32 [N, R, R, 2]: shape and colour of what covers a patch most, counted from 1; 0 is background
    places  float32 [N, R, R, 4]: from the patch to that object's middle, across and down, and the logarithms of its
            width and height, all in patches
    middle  bool [N, R, R]: it is the patch in which the object's middle lies
    """

    tiles: np.ndarray
    names: np.ndarray
    places: np.ndarray
    middle: np.ndarray

    def at(self, index: np.ndarray) -> tuple[np.ndarray, ...]:
        return self.tiles[index], self.names[index], self.places[index], self.middle[index]


def look(scenes: list[Scene], paths: list[Path], config: LlavaConfig) -> Seen:
    """Cut pictures into tiles as the model sees them."""
    found = []
    with Progress("cutting tiles", len(scenes), "pictures", every=10.0) as bar:
        for scene, path in zip(scenes, paths, strict=True):
            image = Image.open(path).convert("RGB")
            place = images.layout(image.size, config)
            for tile, (scale, corner) in zip(
                images.tiles(image, place, config), _windows(place, config.vision.image_size), strict=True
            ):
                found.append((tile, *_labels(scene, scale, corner, config)))
            bar.advance()
    return Seen(*(np.stack(part) for part in zip(*found, strict=True)))


def _windows(place: TileLayout, tile: int) -> Iterable[tuple[np.ndarray, np.ndarray]]:
    """For each tile: picture coordinates times the first, minus the second, are coordinates in it."""
    (columns, rows), size = place.grid, np.array(place.size)
    yield tile / size, np.zeros(2)
    scale = min(columns * tile / size[0], rows * tile / size[1])
    margin = (np.array([columns, rows]) * tile - np.ceil(size * scale)) // 2
    for row in range(rows):
        for column in range(columns):
            yield np.array([scale, scale]), np.array([column, row]) * tile - margin


def _labels(scene: Scene, scale: np.ndarray, corner: np.ndarray, config: LlavaConfig):
    side, patch = config.vision.patches_per_side, config.vision.patch_size
    names, places = np.zeros((side, side, 2), np.int32), np.zeros((side, side, 4), np.float32)
    middle, most = np.zeros((side, side), bool), np.full((side, side), COVERED)
    edges = np.arange(side)
    for thing in scene.things:
        box = (np.reshape(thing.box, (2, 2)) * scale - corner) / patch  # [[left, top], [right, bottom]] in patches
        across, down = (
            np.clip(np.minimum(edges + 1, high) - np.maximum(edges, low), 0, None) for low, high in box.T
        )  # fmt: skip
        cover = down[:, None] * across
        column, row = np.floor(centre := box.mean(axis=0)).astype(int)
        inside = 0 <= column < side and 0 <= row < side
        if inside:
            cover[row, column] += side**2  # whose middle it holds, that object has the patch
        mine = cover > most
        most[mine] = cover[mine]
        names[mine] = SHAPES.index(thing.shape) + 1, list(COLOURS).index(thing.colour) + 1
        rows, columns = np.nonzero(mine)
        size = np.log(box[1] - box[0])
        places[mine] = np.stack(np.broadcast_arrays(*(centre - 0.5), *size, columns)[:4], axis=-1)
        places[mine, :2] -= np.stack([columns, rows], axis=-1)
        if inside:
            middle[row, column] = True
    return names, places, middle


def warm_up_tower(
    params: Params, config: LlavaConfig, seen: Seen, held_out: Seen, steps: int, rate: float, seed: int, output: Path
) -> Params:
    """`params` with a tower that knows shapes. A linear head says what it sees; that is not kept.

    Its accuracy: the share of objects whose shape and colour are right, at the patch where their middle lies.
    """
    width, shapes, colours = config.vision.width, len(SHAPES) + 1, len(COLOURS) + 1
    head = {"kernel": jnp.zeros((width, shapes + colours + 5)), "bias": jnp.zeros(shapes + colours + 5)}

    def tell(trained, tiles):
        x = vision_features(trained["vision"], config, normalise(tiles, config.vision))
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)
        x = x @ trained["tell"]["head"]["kernel"] + trained["tell"]["head"]["bias"]
        x = x.reshape(len(tiles), config.vision.patches_per_side, -1, x.shape[-1])
        return jnp.split(x, [shapes, shapes + colours, shapes + colours + 4], axis=-1)

    def loss_of(trained, frozen, batch):
        tiles, names, places, middle = batch
        shape, colour, place, is_middle = tell(trained, tiles)
        entropy = optax.softmax_cross_entropy_with_integer_labels
        losses = entropy(shape, names[..., 0]) + entropy(colour, names[..., 1])
        losses += jnp.sum((place - places) ** 2, axis=-1) * (names[..., 0] > 0)
        losses += 2 * optax.sigmoid_binary_cross_entropy(is_middle[..., 0], middle)
        return jnp.sum(losses) / len(tiles)

    @jax.jit
    def right(trained, tiles, names):
        shape, colour, *_ = tell(trained, tiles)
        return (shape.argmax(-1) == names[..., 0]) & (colour.argmax(-1) == names[..., 1])

    def accuracy(trained) -> float:
        starts = range(0, len(held_out.tiles) - TILES + 1, TILES)
        parts = [held_out.at(np.arange(start, start + TILES)) for start in starts]
        return float(np.concatenate([right(trained, part[0], part[1])[part[3]] for part in parts]).mean())

    rng = np.random.default_rng(seed)
    batches = (seen.at(rng.integers(len(seen.tiles), size=TILES)) for _ in iter(int, 1))
    trained = {"vision": params["vision"], "tell": {"head": head}}
    trained = fit(loss_of, trained, {}, batches, steps, rate, output, accuracy)
    return params | {"vision": trained["vision"]}


# ---------------------------------------------------------------- the decoder


def warm_up_decoder(config: TrainConfig, steps: int, rate: float) -> Params:
    """The checkpoint that `config` names, its decoder and projector trained on its data.

    Its accuracy: the share of held-out conversations of which every token is right that it had to predict, given those
    before it.
    """
    found, mesh = open_checkpoint(config.checkpoint), make_mesh({}, jax.devices()[:1])
    data = open_data(config, found.config, found.tokenizer)
    params = found.load(mesh, lambda path: step.load_dtype(path, config))
    frozen, state, *_ = step.setup(params, found.config, config, mesh, steps)

    def loss_of(trained, frozen, batch):
        labelled = jnp.sum(step.next_tokens(batch) != IGNORE)
        return step.loss_sum(step.union(frozen, trained), batch, found.config, config, mesh) / labelled

    held_out = open_data(config, found.config, found.tokenizer, path=config.eval_data, train=False)

    @jax.jit
    def wrong(trained, frozen, batch):
        params = step.union(frozen, trained)
        x = llava.embed_batch(params, found.config, batch, mesh)
        x = decoder.decode(params["decoder"], found.config, x, batch.positions, batch.segments, mesh=mesh)
        targets = step.next_tokens(batch)
        return (targets != IGNORE) & (decoder.logits(params["decoder"], found.config, x, mesh).argmax(-1) != targets)

    def accuracy(trained) -> float:
        right = asked = 0
        for batch, _ in itertools.islice(held_out, HELD_OUT):
            missed = np.asarray(wrong(trained, frozen, loop.put_batch(batch, mesh, held_out.rows)))
            for row, segments in zip(missed, batch.segments, strict=True):
                said = np.unique(segments[segments > 0])
                asked, right = asked + len(said), right + len(said) - len(np.unique(segments[row]))
        return right / asked

    batches = (loop.put_batch(batch, mesh, data.rows) for batch, _ in data)
    trained = fit(loss_of, state.trained, frozen, batches, steps, rate, Path(config.output), accuracy)
    data.close()
    held_out.close()
    return step.export_params(frozen, dataclasses.replace(state, trained=trained))
