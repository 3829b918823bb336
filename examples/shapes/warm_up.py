"""The warm-up, which trains a tower and a decoder, since there are no pretrained ones this small.

The tower learns which object covers each patch and where that object is, encoded as words, from fully labelled images
(this replaces CLIP's pretraining on captions). Then, with the tower frozen, the decoder learns to find what a word
names, and language. Both use Muon (Jordan et al. 2024) for matrices and AdamW for the rest: at equal cost, AdamW alone
taught the tower a third as much.
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
from model import to_visual
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
from train.datasets.shapes.questions import ACROSS, DOWN, middle_of, place_of
from train.datasets.shapes.scenes import COLOURS, SHAPES, SIZES, Scene
from train.loader import open_data
from train.loss import loss_sum, next_tokens
from train.metrics import MetricsFiles
from train.parameters import export_params, load_dtype, union
from train.step import setup

NAMES = [["background", *options] for options in (SHAPES, COLOURS, SIZES, DOWN, ACROSS)]
WORD_SCALE = 4.0  # scale of words in a feature row, relative to what separates them from others
FEATURE_PENALTY = 0.1  # weight of the mean square of features, so that they encode nothing else
NEAR = 0.15  # of a patch: a centre this close to the edge between two patches is shared by both
COVERED = 0.15  # of a patch: the coverage from which an object counts
WHITENED = 4000  # tiles that initialize the patch embedding
NOISE = 0.01  # regularizes whitening, relative to the mean variance
AT_CENTRES, SHARES, NUMBER = 6.0, 16.0, 4.0  # weights of the tower's losses, relative to names
TILES = 32  # in a batch for the tower
HELD_OUT = 20  # batches of questions to measure accuracy on
LOG_EVERY, EVAL_EVERY = 10, 25  # steps per line of metrics, lines per accuracy


# ---------------------------------------------------------------- the training loop


def fit(
    loss_of: Callable[[Any, Any, Any], jax.Array],
    params: Any,
    frozen: Any,
    batches: Iterator[Any],
    steps: int,
    rate: float,
    output: Path,
    evaluate: Callable[[Any], float],
) -> Any:
    """Train `params` on `loss_of(params, frozen, batch)`, and log metrics.

    `rate` is Muon's peak learning rate; AdamW's is a third of it. `evaluate(params)` returns the held-out accuracy.
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
    def train_step(params, state, frozen, batch):
        loss, grads = jax.value_and_grad(loss_of)(params, frozen, batch)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    output.mkdir(parents=True, exist_ok=True)
    state, files = optimizer.init(params), MetricsFiles(output, 0)
    with Progress(output.name, steps, "steps", every=10.0) as bar:
        for number in range(1, steps + 1):
            params, state, loss = train_step(params, state, frozen, next(batches))
            if number % LOG_EVERY == 0 or number == steps:
                is_last = number == steps
                accuracy = {"accuracy": evaluate(params)} if number % (EVAL_EVERY * LOG_EVERY) == 0 or is_last else {}
                files.write({"step": number, "loss": float(loss)} | accuracy)
                bar.advance(number % LOG_EVERY or LOG_EVERY, f"loss {float(loss):.3f}")
    files.close()
    return params


def _matrix(path: Any, x: jax.Array) -> contrib.MuonDimensionNumbers | None:
    """Muon trains the kernels of layers, stacked or not, the projector and the patch embedding; AdamW the rest."""
    name = path_of(path)
    if name.endswith("/patch"):
        return contrib.MuonDimensionNumbers(reduction_axis=(0, 1, 2), output_axis=3)
    if not name.endswith("/kernel") or "/head/" in name:
        return None
    return contrib.MuonDimensionNumbers(reduction_axis=x.ndim - 2, output_axis=x.ndim - 1)


# ---------------------------------------------------------------- the tower


@dataclasses.dataclass(frozen=True)
class LabelledTiles:
    """Tiles of many images, with labels for each patch.

    tiles   uint8 [N, H, W, 3]
    names   int32 [N, R, R, 5]: shape, colour, size and place of the object that covers a patch most, indices in `NAMES`
    places  float32 [N, R, R, 4]: that object's centre relative to the image's (across, down), in patches of the base
            tile, and the logarithms of its width and height, in patches of this tile
    centre  float32 [N, R, R]: the share of object centres in a patch, which sums to the number of objects over an
            image's base tile, and over its grid
    base    bool [N]: whether it is a base tile, the whole image
    """

    tiles: np.ndarray
    names: np.ndarray
    places: np.ndarray
    centre: np.ndarray
    base: np.ndarray

    def at(self, index: np.ndarray) -> tuple[np.ndarray, ...]:
        return self.tiles[index], self.names[index], self.places[index], self.centre[index]


def label_tiles(scenes: list[Scene], paths: list[Path], config: LlavaConfig) -> LabelledTiles:
    """Split images into tiles as for the model, and label them."""
    found = []
    with Progress("labelling tiles", len(scenes), "images", every=10.0) as bar:
        for scene, path in zip(scenes, paths, strict=True):
            image = Image.open(path).convert("RGB")
            layout = images.tile_layout(image.size, config)
            windows = _windows(layout, config.vision.image_size)
            for i, (tile, window) in enumerate(zip(images.tile_image(image, layout, config), windows, strict=True)):
                found.append((tile, *_labels(scene, *window, config), i == 0))
            bar.advance()
    return LabelledTiles(*(np.stack(part) for part in zip(*found, strict=True)))


def _windows(layout: TileLayout, tile: int) -> Iterable[tuple[np.ndarray, np.ndarray]]:
    """Scale and offset of each tile, the base tile first: `image coordinates * scale - offset` are tile coordinates."""
    (columns, rows), size = layout.grid, np.array(layout.size)
    yield tile / size, np.zeros(2)
    scale = min(columns * tile / size[0], rows * tile / size[1])
    margin = (np.array([columns, rows]) * tile - np.ceil(size * scale)) // 2
    for row in range(rows):
        for column in range(columns):
            yield np.array([scale, scale]), np.array([column, row]) * tile - margin


def _labels(scene: Scene, scale: np.ndarray, corner: np.ndarray, config: LlavaConfig):
    """Names, places and centres on one tile. Places are relative to the whole image on every tile; a tile of the grid
    cannot determine them, so its features stay vague."""
    side, patch = config.vision.patches_per_side, config.vision.patch_size
    names, places = np.zeros((side, side, len(NAMES)), np.int32), np.zeros((side, side, 4), np.float32)
    centre, best = np.zeros((side, side), np.float32), np.full((side, side), COVERED)
    edges = np.arange(side)
    for thing in scene.things:
        box = (np.reshape(thing.box, (2, 2)) * scale - corner) / patch  # [[left, top], [right, bottom]] in patches
        across, down = (
            np.clip(np.minimum(edges + 1, high) - np.maximum(edges, low), 0, None) for low, high in box.T
        )  # fmt: skip
        cover = down[:, None] * across
        share_across, share_down = (_centre_shares(at, side) for at in box.mean(axis=0))
        shares = share_down[:, None] * share_across
        cover += side**2 * shares  # an object owns the patches of its centre
        mine = cover > best
        best[mine] = cover[mine]
        labels = thing.shape, thing.colour, thing.size, *place_of(thing, scene).split()
        names[mine] = [options.index(name) for options, name in zip(NAMES, labels, strict=True)]
        across_down = np.subtract(middle_of(thing, scene), 0.5) * side
        places[mine] = *across_down, *np.log(box[1] - box[0])
        centre += shares
    return names, places, centre


def _centre_shares(at: float, side: int) -> np.ndarray:
    """Shares of a centre in each column, or row, of patches: split near an edge, including the tile's."""
    beyond = np.clip((at - np.arange(side + 1)) / (2 * NEAR) + 0.5, 0, 1)  # the share beyond each edge
    return beyond[:-1] - beyond[1:]


def whitened(tiles: np.ndarray, config: VisionConfig, seed: int) -> np.ndarray:
    """[P, P, 3, C] a patch embedding whose outputs on `tiles` are uncorrelated with about unit variance.

    The pixels of a patch are similar: without this, a random embedding captures little but mean brightness (compare the
    first layer of Page 2018 and Jordan 2024, who train fast on CIFAR-10). It projects onto the C directions of most
    variance, randomly rotated.
    """
    side, patch, rng = config.patches_per_side, config.patch_size, np.random.default_rng(seed)
    pixels = np.asarray(normalise(tiles, config)).reshape(-1, side, patch, side, patch, 3).swapaxes(2, 3)
    pixels = pixels.reshape(-1, patch * patch * 3)
    variances, directions = (x[..., -config.width :] for x in np.linalg.eigh(pixels.T @ pixels / len(pixels)))
    rotation = np.linalg.qr(rng.normal(size=(config.width, config.width)))[0]
    projection = directions / np.sqrt(variances + NOISE * variances.mean()) @ rotation
    return projection.reshape(patch, patch, 3, config.width).astype(np.float32)


def warm_up_tower(
    params: Params,
    config: LlavaConfig,
    words: list[list[int]],
    labelled: LabelledTiles,
    held_out: LabelledTiles,
    steps: int,
    rate: float,
    seed: int,
    output: Path,
) -> Params:
    """Train the tower to recognize shapes, and the projector to encode their names; returns the new `params`.

    A feature row is compared with words encoded by `to_visual`, as CLIP compares images with texts. Fixed directions of
    the row encode places, and the logarithm of its share of centres: attention sums exponentials, so the decoder can
    count. A centre near the edge between two patches is ambiguous, so both share it. Accuracy is the share of correct
    shapes and colours at patches with at least half of a centre.

    Args:
      words: the token ids of `NAMES`.
    """
    width = config.text.width
    table = to_visual(params["decoder"]["embed"]["embedding"])
    tokens = [table[jnp.array(ids)].T / width**0.5 / WORD_SCALE for ids in words]
    directions = jax.random.normal(jax.random.key(seed), (width, 5)) / width

    def predict(trained, tiles):
        x = vision_features(trained["vision"], config.vision, normalise(tiles, config.vision))
        x = project(trained["projector"], config, x)
        x = x.reshape(len(tiles), config.vision.patches_per_side, -1, width)
        return x, [x @ token for token in tokens]

    def loss_of(trained, frozen, batch):
        tiles, names, places, centre = batch
        x, logits_of = predict(trained, tiles)
        entropy = optax.softmax_cross_entropy_with_integer_labels
        losses = (1 + AT_CENTRES * centre) * sum(entropy(logits, names[..., i]) for i, logits in enumerate(logits_of))
        place = x @ directions
        losses += jnp.sum((place[..., :4] - places) ** 2, axis=-1) * (names[..., 0] > 0)
        log_share = jnp.minimum(4 * place[..., 4], 2.0)  # bounded at initialization
        share = jnp.exp(log_share)
        losses += SHARES * (share - centre * log_share)
        number = jnp.sum(share, axis=(1, 2)) - jnp.sum(centre, axis=(1, 2))
        return (jnp.sum(losses) + NUMBER * jnp.sum(number**2)) / len(tiles) + FEATURE_PENALTY * jnp.mean(x**2)

    @jax.jit
    def right(trained, tiles, names):
        _, (shape, colour, *_) = predict(trained, tiles)
        return (shape.argmax(-1) == names[..., 0]) & (colour.argmax(-1) == names[..., 1])

    def accuracy(trained) -> float:
        whole = np.flatnonzero(held_out.base)
        parts = [held_out.at(np.resize(whole[i : i + TILES], TILES)) for i in range(0, len(whole), TILES)]
        return float(np.concatenate([right(trained, part[0], part[1])[part[3] >= 0.5] for part in parts]).mean())

    rng = np.random.default_rng(seed)
    half, base = TILES // 2, np.flatnonzero(labelled.base)
    batches = (
        labelled.at(np.concatenate([rng.choice(base, half), rng.choice(len(labelled.tiles), half)]))
        for _ in iter(int, 1)
    )
    some = labelled.tiles[rng.integers(len(labelled.tiles), size=WHITENED)]
    embed = params["vision"]["embed"] | {"patch": jnp.array(whitened(some, config.vision, seed))}
    trained = {"vision": params["vision"] | {"embed": embed}, "projector": params["projector"]}
    return params | fit(loss_of, trained, {}, batches, steps, rate, output, accuracy)


# ---------------------------------------------------------------- the decoder


def warm_up_decoder(configs: Sequence[TrainConfig], steps: int, rate: float) -> Params:
    """Train decoder and projector on batches of each configuration in turn; a configuration may be repeated.

    Each configuration determines its data, the first one everything else, including the checkpoint. Accuracy is the
    share of the first one's held-out conversations in which every labelled token is predicted correctly, given the
    tokens before it.
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
        x = llama.forward(params["decoder"], found.config.text, x, batch.positions, batch.segments, partition=partition)
        targets = next_tokens(batch)
        return (targets != IGNORE) & (
            llama.logits(params["decoder"], found.config.text, x, partition).argmax(-1) != targets
        )

    def accuracy(trained) -> float:
        right = asked = 0
        for batch, _ in itertools.islice(held_out, HELD_OUT):
            missed = np.asarray(wrong(trained, frozen, loop.put_batch(batch, mesh, held_out.rows)))
            for row, segments in zip(missed, batch.segments, strict=True):
                present = np.unique(segments[segments > 0])
                asked, right = asked + len(present), right + len(present) - len(np.unique(segments[row]))
        return right / asked

    passes = {c: iter(data) for c, data in opened.items()}
    batches = (loop.put_batch(next(passes[c])[0], mesh, opened[c].rows) for c in itertools.cycle(configs))
    trained = fit(loss_of, state.trained, frozen, batches, steps, rate, Path(config.output), accuracy)
    for data in (*opened.values(), held_out):
        data.close()
    return export_params(frozen, trained)
