"""The warm-up: there are no pretrained towers and decoders this small, so they are made here.

The tower learns to tell of each patch what covers it and where that is, in a code of the words for it, from pictures of
which everything is known (what pretraining on captions is to CLIP). Then the decoder, tower as it is, learns to look
for what a word names, and language. Both use Muon (Jordan et al. 2024) for matrices and AdamW for the rest: at equal
cost AdamW alone taught the tower a third as much.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from model import as_seen
from optax import contrib
from PIL import Image

from llava_jax.checkpoints.checkpoint import open_checkpoint
from llava_jax.config import LlavaConfig, VisionConfig
from llava_jax.console import Progress
from llava_jax.data import images
from llava_jax.data.images import TileLayout
from llava_jax.data.splice import IGNORE
from llava_jax.models import llama, llava
from llava_jax.models.clip import normalise, vision_features
from llava_jax.models.llava import Params
from llava_jax.models.projector import project
from llava_jax.sharding.mesh import make_mesh
from llava_jax.sharding.partition import Partition, path_of
from train import loop
from train.config import TrainConfig
from train.datasets.scenes import COLOURS, SHAPES, SIZES, Scene
from train.datasets.shape_questions import ACROSS, DOWN, middle_of, place_of
from train.loader import open_data
from train.loss import loss_sum, next_tokens
from train.metrics import MetricsFiles
from train.parameters import export_params, load_dtype, union
from train.step import setup

NAMES = [["background", *options] for options in (SHAPES, COLOURS, SIZES, DOWN, ACROSS)]
LOUD = 4.0  # times as much of a row is words as it needs to be told from others
LEAN = 0.1  # what a row for the decoder costs, the square of a number on the average: so it says nothing else
NEAR = 0.15  # of a patch: no further than this from an edge between two, a middle is in both of them in parts
COVERED = 0.15  # of a patch: from there on an object counts
WHITENED = 4000  # tiles that the patch embedding begins from
NOISE = 0.01  # variance below this share of the mean is not drawn out to one
AT_MIDDLES, SHARES, NUMBER = 6.0, 16.0, 4.0  # weights of the tower's losses, names' being one
TILES = 32  # of an update of the tower
HELD_OUT = 20  # batches of questions that an accuracy is measured on
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
                bar.advance(number % EVERY or EVERY, f"loss {float(loss):.3f}")
    files.close()
    return params


def _matrix(path: Any, x: jax.Array) -> contrib.MuonDimensionNumbers | None:
    """Kernels of layers, stacked or not, of the projector and of patches are Muon's; tokens and heads are not."""
    name = path_of(path)
    if name.endswith("/patch"):
        return contrib.MuonDimensionNumbers(reduction_axis=(0, 1, 2), output_axis=3)
    if not name.endswith("/kernel") or "/head/" in name:
        return None
    return contrib.MuonDimensionNumbers(reduction_axis=x.ndim - 2, output_axis=x.ndim - 1)


# ---------------------------------------------------------------- the tower


@dataclasses.dataclass(frozen=True)
class Seen:
    """Tiles of many pictures, and what is in them.

    tiles   uint8 [N, H, W, 3]
    names   int32 [N, R, R, 5]: shape, colour, size and place of what covers a patch most, as numbers in `NAMES`
    places  float32 [N, R, R, 4]: that object's middle, across and down from the picture's, in patches of the base
            tile, and the logarithms of its width and height, in patches of this one
    middle  float32 [N, R, R]: what a patch holds of middles of objects, so that those of a picture's base tile, and
            those of its grid, add up to the number of objects
    base    bool [N]: it is a base tile, a whole picture
    """

    tiles: np.ndarray
    names: np.ndarray
    places: np.ndarray
    middle: np.ndarray
    base: np.ndarray

    def at(self, index: np.ndarray) -> tuple[np.ndarray, ...]:
        return self.tiles[index], self.names[index], self.places[index], self.middle[index]


def look(scenes: list[Scene], paths: list[Path], config: LlavaConfig) -> Seen:
    """Cut pictures into tiles as the model sees them."""
    found = []
    with Progress("cutting tiles", len(scenes), "pictures", every=10.0) as bar:
        for scene, path in zip(scenes, paths, strict=True):
            image = Image.open(path).convert("RGB")
            place = images.tile_layout(image.size, config)
            windows = _windows(place, config.vision.image_size)
            for i, (tile, window) in enumerate(zip(images.tile_image(image, place, config), windows, strict=True)):
                found.append((tile, *_labels(scene, *window, config), i == 0))
            bar.advance()
    return Seen(*(np.stack(part) for part in zip(*found, strict=True)))


def _windows(place: TileLayout, tile: int) -> Iterable[tuple[np.ndarray, np.ndarray]]:
    """For each tile, the base one first: picture coordinates times the first, minus the second, are coordinates in
    it."""
    (columns, rows), size = place.grid, np.array(place.size)
    yield tile / size, np.zeros(2)
    scale = min(columns * tile / size[0], rows * tile / size[1])
    margin = (np.array([columns, rows]) * tile - np.ceil(size * scale)) // 2
    for row in range(rows):
        for column in range(columns):
            yield np.array([scale, scale]), np.array([column, row]) * tile - margin


def _labels(scene: Scene, scale: np.ndarray, corner: np.ndarray, config: LlavaConfig):
    """Names, places and middles on one tile. Places are the whole picture's on every tile: one of the grid cannot tell
    them, so its rows stay vague."""
    side, patch = config.vision.patches_per_side, config.vision.patch_size
    names, places = np.zeros((side, side, len(NAMES)), np.int32), np.zeros((side, side, 4), np.float32)
    middle, most = np.zeros((side, side), np.float32), np.full((side, side), COVERED)
    edges = np.arange(side)
    for thing in scene.things:
        box = (np.reshape(thing.box, (2, 2)) * scale - corner) / patch  # [[left, top], [right, bottom]] in patches
        across, down = (
            np.clip(np.minimum(edges + 1, high) - np.maximum(edges, low), 0, None) for low, high in box.T
        )  # fmt: skip
        cover = down[:, None] * across
        held_across, held_down = (_held(at, side) for at in box.mean(axis=0))
        held = held_down[:, None] * held_across
        cover += side**2 * held  # which holds of an object's middle, that object has
        mine = cover > most
        most[mine] = cover[mine]
        said = thing.shape, thing.colour, thing.size, *place_of(thing, scene).split()
        names[mine] = [options.index(name) for options, name in zip(NAMES, said, strict=True)]
        across_down = np.subtract(middle_of(thing, scene), 0.5) * side
        places[mine] = *across_down, *np.log(box[1] - box[0])
        middle += held
    return names, places, middle


def _held(at: float, side: int) -> np.ndarray:
    """Shares of a middle that columns, or rows, of patches hold: near an edge, also the tile's, each a part."""
    beyond = np.clip((at - np.arange(side + 1)) / (2 * NEAR) + 0.5, 0, 1)  # how far beyond each edge
    return beyond[:-1] - beyond[1:]


def whitened(tiles: np.ndarray, config: VisionConfig, seed: int) -> np.ndarray:
    """[P, P, 3, C] a patch embedding whose outputs on `tiles` are uncorrelated and about one.

    Pixels of a patch are nearly alike: without this, a random embedding sees little but mean brightness (as with the
    first layer of Page 2018 and Jordan 2024, who train fast on CIFAR-10). The C directions of most variance, at
    random angles.
    """
    side, patch, rng = config.patches_per_side, config.patch_size, np.random.default_rng(seed)
    pixels = np.asarray(normalise(tiles, config)).reshape(-1, side, patch, side, patch, 3).swapaxes(2, 3)
    pixels = pixels.reshape(-1, patch * patch * 3)
    variances, directions = (x[..., -config.width :] for x in np.linalg.eigh(pixels.T @ pixels / len(pixels)))
    turned = np.linalg.qr(rng.normal(size=(config.width, config.width)))[0]
    turned = directions / np.sqrt(variances + NOISE * variances.mean()) @ turned
    return turned.reshape(patch, patch, 3, config.width).astype(np.float32)


def warm_up_tower(
    params: Params,
    config: LlavaConfig,
    words: list[list[int]],
    seen: Seen,
    held_out: Seen,
    steps: int,
    rate: float,
    seed: int,
    output: Path,
) -> Params:
    """`params` with a tower that knows shapes, and a projector that knows the words for them.

    A row for the decoder is compared with words `as_seen`, as CLIP compares pictures with texts; places are read off it
    in fixed directions, and so is the logarithm of what it holds of middles: attention adds up exponentials, so a
    decoder can count. Which patch holds a middle near an edge between two, nobody can tell; in halves, both do. Its
    accuracy: how often shape and colour are right at patches that hold half of a middle or more.

    Args:
      words: the tokens of `NAMES`.
    """
    width = config.text.width
    table = as_seen(params["decoder"]["embed"]["embedding"])
    tokens = [table[jnp.array(ids)].T / width**0.5 / LOUD for ids in words]
    directions = jax.random.normal(jax.random.key(seed), (width, 5)) / width

    def tell(trained, tiles):
        x = vision_features(trained["vision"], config, normalise(tiles, config.vision))
        x = project(trained["projector"], config, x)
        x = x.reshape(len(tiles), config.vision.patches_per_side, -1, width)
        return x, [x @ token for token in tokens]

    def loss_of(trained, frozen, batch):
        tiles, names, places, middle = batch
        x, said = tell(trained, tiles)
        entropy = optax.softmax_cross_entropy_with_integer_labels
        losses = (1 + AT_MIDDLES * middle) * sum(entropy(logits, names[..., i]) for i, logits in enumerate(said))
        place = x @ directions
        losses += jnp.sum((place[..., :4] - places) ** 2, axis=-1) * (names[..., 0] > 0)
        log_share = jnp.minimum(4 * place[..., 4], 2.0)  # finite at first
        share = jnp.exp(log_share)
        losses += SHARES * (share - middle * log_share)
        number = jnp.sum(share, axis=(1, 2)) - jnp.sum(middle, axis=(1, 2))
        return (jnp.sum(losses) + NUMBER * jnp.sum(number**2)) / len(tiles) + LEAN * jnp.mean(x**2)

    @jax.jit
    def right(trained, tiles, names):
        _, (shape, colour, *_) = tell(trained, tiles)
        return (shape.argmax(-1) == names[..., 0]) & (colour.argmax(-1) == names[..., 1])

    def accuracy(trained) -> float:
        whole = np.flatnonzero(held_out.base)
        parts = [held_out.at(np.resize(whole[i : i + TILES], TILES)) for i in range(0, len(whole), TILES)]
        return float(np.concatenate([right(trained, part[0], part[1])[part[3] >= 0.5] for part in parts]).mean())

    rng = np.random.default_rng(seed)
    half, base = TILES // 2, np.flatnonzero(seen.base)
    batches = (
        seen.at(np.concatenate([rng.choice(base, half), rng.choice(len(seen.tiles), half)])) for _ in iter(int, 1)
    )
    some = seen.tiles[rng.integers(len(seen.tiles), size=WHITENED)]
    embed = params["vision"]["embed"] | {"patch": jnp.array(whitened(some, config.vision, seed))}
    trained = {"vision": params["vision"] | {"embed": embed}, "projector": params["projector"]}
    return params | fit(loss_of, trained, {}, batches, steps, rate, output, accuracy)


# ---------------------------------------------------------------- the decoder


def warm_up_decoder(configs: Sequence[TrainConfig], steps: int, rate: float) -> Params:
    """The checkpoint that `configs` name, its decoder and projector trained on a batch of each one's data in turn; one
    may be there several times. Each says how its data is read, the first one all else.

    Its accuracy: the share of the first one's held-out conversations of which every token is right that it had to
    predict, given those before it.
    """
    config, mesh = configs[0], make_mesh({}, jax.devices()[:1])
    found = open_checkpoint(config.checkpoint)
    opened = {c: open_data(c, found.config, found.tokenizer) for c in configs}
    partition = Partition(found.config, mesh)
    params = found.load(mesh, lambda path: load_dtype(path, config))
    frozen, state, *_ = setup(params, found.config, config, mesh, steps)

    def loss_of(trained, frozen, batch):
        labelled = jnp.sum(next_tokens(batch) != IGNORE)
        return loss_sum(union(frozen, trained), batch, found.config, config, partition) / labelled

    held_out = open_data(config, found.config, found.tokenizer, path=config.eval_data, train=False)

    @jax.jit
    def wrong(trained, frozen, batch):
        params = union(frozen, trained)
        x = llava.embed_batch(params, found.config, batch, partition)
        x = llama.decode(params["decoder"], found.config, x, batch.positions, batch.segments, partition=partition)
        targets = next_tokens(batch)
        return (targets != IGNORE) & (llama.logits(params["decoder"], found.config, x, partition).argmax(-1) != targets)

    def accuracy(trained) -> float:
        right = asked = 0
        for batch, _ in itertools.islice(held_out, HELD_OUT):
            missed = np.asarray(wrong(trained, frozen, loop.put_batch(batch, mesh, held_out.rows)))
            for row, segments in zip(missed, batch.segments, strict=True):
                said = np.unique(segments[segments > 0])
                asked, right = asked + len(said), right + len(said) - len(np.unique(segments[row]))
        return right / asked

    passes = {c: iter(data) for c, data in opened.items()}
    batches = (loop.put_batch(next(passes[c])[0], mesh, opened[c].rows) for c in itertools.cycle(configs))
    trained = fit(loss_of, state.trained, frozen, batches, steps, rate, Path(config.output), accuracy)
    for data in (*opened.values(), held_out):
        data.close()
    return export_params(frozen, trained)
