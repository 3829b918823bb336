"""From an image to uint8 tiles, exactly as the reference makes them (host only: Pillow and NumPy).

The reference (llava/mm_utils.py `process_images`, and the CLIP image processor behind it) knows three ways:

    square   the shortest side to the tower's size, bicubic; centre crop
    pad      pad to a square with the mean colour, then as `square`
    anyres   the best of a few grids of tiles: fit, pad with black, cut; before them the whole image squashed
             into one tile

All arithmetic on pixels happens in Pillow on uint8, so tiles are uint8 here and the subtraction of the mean
waits for the device (`clip.normalise`): a quarter of the bytes to send.

Which pixels a file holds is decided in `open_image`:

- EXIF rotation is applied. The reference ignores it, and so sees phone images lying on their side; what a
  person sees is what the question is about. Its training data holds hardly any such image.
- Alpha is dropped, palettes, grey and CMYK are converted by Pillow's `convert("RGB")`: as the reference does.
- 16-bit grey is scaled to 8 bits. Pillow's own conversion clips at 255, which turns such an image white.
- Of an animation the first frame is taken.

Only `FORMATS` are opened: of the rest that Pillow knows, some are handed to other programs, and most are never met.

`read_tiles` holds one image at a time, as RGB at 4 bytes a pixel or as grey at 1, which is kept grey until it is cut.
A JPEG of more than `FULL_PIXELS` is halved by its decoder (1.2 bytes a pixel instead of 4.4; measured on 64 million
pixels, 8 % of the values in the tiles differ from those of the full size, by 1 of 255); smaller ones never are, so that
their tiles are the reference's. Conversion takes up to 9 bytes a pixel for a moment (RGBA, CMYK, rotation). WebP's
decoder takes 16, so `FULL_PIXELS` are the most that a WebP may have. Of images of more than `LARGE_PIXELS` one is
decoded at a time, however many threads there are.
"""

import contextlib
import dataclasses
import io
import math
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path, PurePath

import numpy as np
from PIL import Image, ImageOps, TiffImagePlugin, UnidentifiedImageError, WebPImagePlugin  # noqa: F401  # of FORMATS

from llava_jax.config import BICUBIC, LlavaConfig, VisionConfig
from llava_jax.console import InputError, shorten
from llava_jax.data.urls import Fetched, fetch, is_url
from llava_jax.files import open_regular

FORMATS = {"JPEG": "JPEG", "PNG": "PNG", "WEBP": "WebP", "GIF": "GIF", "BMP": "BMP", "TIFF": "TIFF"}  # Pillow's names
MAX_PIXELS = 178_956_970  # twice Pillow's own warning threshold, where it too speaks of a decompression bomb
MAX_ASPECT = 200
MAX_FILE = 2**30  # bytes: MAX_PIXELS of 16-bit colour, uncompressed
MAX_SCANS = 100  # of a JPEG: progressive ones have about ten, each of which goes over all pixels
MAX_SEGMENTS = 10 * MAX_SCANS  # of tables, between scans
FULL_PIXELS = 64_000_000
LARGE_PIXELS = 16_000_000
STRIP_PIXELS = 2**20  # that are converted at a time

MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]")  # in a JPEG, of a segment or the end: all others have no length
START_OF_SCAN, END_OF_IMAGE = b"\xff\xda", b"\xff\xd9"

_one_large = threading.Lock()


@dataclasses.dataclass(frozen=True)
class TileLayout:
    """How an image lies in its tiles: all that splicing needs to know of it."""

    size: tuple[int, int]  # width, height in pixels
    grid: tuple[int, int] | None = None  # columns, rows of tiles after the first; None: one tile, no grid

    @property
    def tiles(self) -> int:
        return 1 + self.grid[0] * self.grid[1] if self.grid else 1


# ---------------------------------------------------------------- files


def open_image(source: str | os.PathLike | bytes | Image.Image) -> Image.Image:
    """An image as RGB, as a person sees it.

    Args:
      source: a path, an `http(s):`, `data:` or `file:` URL, the bytes of a file, or a Pillow image.

    Raises:
      InputError: no such file, not an image, truncated, or of a size that no LLaVA can look at.
    """
    with _opened(source) as (what, image):
        image = _decode(what, image, in_place=image is not source)
        return image if image.mode == "RGB" else image.convert("RGB")


def image_size(source: str | os.PathLike | bytes | Image.Image) -> tuple[int, int]:
    """Width and height that `open_image` will give, from the file's header alone.

    Raises:
      InputError: as `open_image`, but for damage behind the header.
    """
    with _opened(source) as (what, image):
        return _upright_size(what, image)


def read_tiles(source: str | os.PathLike | bytes | Image.Image, place: TileLayout, config: LlavaConfig) -> np.ndarray:
    """The uint8 tiles [T, H, W, 3] of an image, of which nothing else stays in memory.

    Args:
      place: `layout(image_size(source), config)`; without a grid the size in it does not matter.

    Raises:
      InputError: as `open_image` and `layout`, or it has another size than the grid was made for.
    """
    with _opened(source) as (what, image):
        size = _upright_size(what, image)
        if place.grid and size != place.size:
            raise InputError(f"{what}: has {size} pixels where its header said {place.size}")
        if config.aspect_ratio == "pad":
            _check_square(size)
        if image.width * image.height > FULL_PIXELS and image is not source:
            image.draft(None, (image.width // 2, image.height // 2))  # of JPEGs; others have no such thing
        return tiles(_decode(what, image, in_place=image is not source), place, config)


@contextlib.contextmanager
def _opened(source) -> Iterator[tuple[str, Image.Image]]:
    """What errors call an image, and the image, its header read. Large ones wait for each other."""
    with contextlib.ExitStack() as stack:
        if isinstance(source, Image.Image):
            what, image = "image", source
        else:
            source = fetch(source)
            if isinstance(source, bytes):
                what, file = getattr(source, "name", "image"), io.BytesIO(source)
            elif isinstance(source, (str, os.PathLike)):
                what, file = shorten(os.fspath(source)), stack.enter_context(_open_file(source))
            else:
                raise InputError(f"an image is a path, a URL, bytes or a Pillow image, not {type(source).__name__}")
            image = _identify(what, file)
        width, height = image.size
        most = FULL_PIXELS if image.format == "WEBP" and image is not source else MAX_PIXELS
        if width * height > most:
            raise InputError(f"{what}: {width}x{height} is more than {most:,} pixels; scale it down first")
        if min(width, height) < 2 or max(width, height) > MAX_ASPECT * min(width, height):
            raise InputError(
                f"{what}: {width}x{height} pixels cannot be looked at: each side needs at least 2 pixels, "
                f"and the longer one at most {MAX_ASPECT} times the shorter"
            )
        if width * height > LARGE_PIXELS:
            stack.enter_context(_one_large)
        yield what, image


def _open_file(path: str | os.PathLike):
    what = shorten(os.fspath(path))
    try:
        file = open_regular(path)
    except FileNotFoundError:
        raise InputError(f"{what}: no such image") from None
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise InputError(f"{what}: cannot be read ({_reason(error)})") from None
    if (size := os.fstat(file.fileno()).st_size) > MAX_FILE:
        file.close()
        raise InputError(f"{what}: has {size:,} bytes; an image file has at most {MAX_FILE:,}")
    return file


def _identify(what: str, file) -> Image.Image:
    try:
        return Image.open(file, formats=list(FORMATS))
    except UnidentifiedImageError:
        known = ", ".join(FORMATS.values())
        raise InputError(f"{what}: not an image of a format that is read ({known})") from None
    except Image.DecompressionBombError:
        raise InputError(f"{what}: more than {MAX_PIXELS:,} pixels; scale it down first") from None
    except Exception as error:
        raise InputError(f"{what}: cannot be read ({_reason(error)})") from None


def _upright_size(what: str, image: Image.Image) -> tuple[int, int]:
    try:
        turned = image.format != "TIFF" and image.getexif().get(0x0112, 1) in (5, 6, 7, 8)  # TIFFs come turned
    except Exception as error:
        raise InputError(f"{what}: broken image ({_reason(error)})") from None
    return (image.height, image.width) if turned else image.size


def _decode(what: str, image: Image.Image, *, in_place: bool) -> Image.Image:
    """An opened image with its pixels, upright, of 8 bits a channel: grey as L, a quarter of the memory, else RGB.

    Args:
      in_place: whether `image` itself may be turned.
    """
    try:
        if image.mode == "F":
            raise InputError(f"{what}: floating-point pixels; save it with 8 or 16 bits a channel")
        if image.format in ("JPEG", "MPO") and in_place:
            _check_scans(image.fp)
        image.load()
        image = ImageOps.exif_transpose(image, in_place=in_place) or image
        if image.mode.startswith("I"):  # I;16 and its byte orders; I where a format has no narrower mode
            return _scale_16_bits(what, image)
        wanted = "L" if image.mode in ("1", "L") else "RGB"
        return image if image.mode == wanted else image.convert(wanted)
    except InputError:
        raise
    except MemoryError:
        raise InputError(f"{what}: not enough memory for {image.width}x{image.height} pixels") from None
    except Exception as error:  # Pillow's decoders raise whatever they like on a broken file
        raise InputError(f"{what}: broken image ({_reason(error)})") from None


def _check_scans(file) -> None:
    """Raises ValueError at a JPEG that is made to be decoded for hours: of scans that are empty and many.

    Args:
      file: which Pillow has read to where the first scan begins. Behind the end of the image there may be anything,
        such as the film that phones append.
    """
    at, scans, segments = file.tell(), 1, 0
    while len(block := file.read(2**16)) > 1:
        marker = MARKER.search(block)
        if not marker:
            file.seek(-1, os.SEEK_CUR)  # where half of one may be
            continue
        if marker[0] == END_OF_IMAGE:
            break
        scans, segments = scans + (marker[0] == START_OF_SCAN), segments + 1
        if scans > MAX_SCANS or segments > MAX_SEGMENTS:
            raise ValueError(f"more than {MAX_SCANS} scans")
        file.seek(marker.end() - len(block), os.SEEK_CUR)
        file.seek(max(int.from_bytes(file.read(2), "big") - 2, 0), os.SEEK_CUR)
    file.seek(at)


def _scale_16_bits(what: str, image: Image.Image) -> Image.Image:
    """Grey of 16 bits, or of 8 in a wider format, as 8 bits; in strips, since each copy is twice its size or more."""
    rows = max(1, STRIP_PIXELS // image.width)
    boxes = [(0, top, image.width, min(top + rows, image.height)) for top in range(0, image.height, rows)]
    shift = 8
    if image.mode == "I":
        low, high = image.getextrema()
        if low < 0 or high > 0xFFFF:
            raise InputError(f"{what}: 32-bit pixels; save it with 8 or 16 bits a channel")
        shift = 8 if high > 0xFF else 0
    grey = Image.new("L", image.size)
    for box in boxes:
        grey.paste(Image.fromarray((np.asarray(image.crop(box)) >> shift).astype(np.uint8)), box)
    return grey


class ImageFolder:
    """Where the images are that a file names; no name leads out of it."""

    def __init__(self, folder: str | os.PathLike | None, *, follow_links: bool = False):
        """
        Args:
          folder: None or "" for the current directory.
          follow_links: also links in the folder that lead out of it.

        Raises:
          InputError: there is no such directory.
        """
        self.folder, self.follow_links = Path(folder or "."), follow_links
        if not self.folder.is_dir():
            raise InputError(f"--image-folder {shorten(self.folder)}: no such directory")
        self._absolute, self._real = os.path.abspath(self.folder), os.path.realpath(self.folder)

    def find(self, name: str) -> str | Fetched:
        """The path of a name: relative to the folder, absolute or a `file:` URL inside it; or what a `data:` URL holds.

        Raises:
          InputError: it leads out of the folder, or is to be downloaded, or a URL of no image.
        """
        if is_url(name):
            raise InputError(f"{shorten(name)}: a URL to download; images that a file names are in the image folder")
        found = fetch(name)
        if isinstance(found, Fetched):
            return found
        path = PurePath(found)
        if ".." in path.parts:
            raise InputError(f"{shorten(name)}: leads out of the image folder")
        file = str(self.folder / path)
        if self.follow_links and not path.is_absolute():
            return file
        try:
            real = PurePath(os.path.realpath(file))
        except ValueError:  # no file can have such a name, which opening it says better
            return file
        inside = real.is_relative_to(self._real)
        if path.is_absolute() and not (inside or any(map(path.is_relative_to, (self._absolute, self._real)))):
            raise InputError(f"{shorten(name)}: leads out of the image folder, {shorten(self._absolute)}")
        if not (inside or self.follow_links):
            raise InputError(
                f"{shorten(name)}: leads out of the image folder, by a link to {shorten(real)} "
                "(--follow-links allows it)"
            )
        return file


def _reason(error: BaseException) -> str:
    return shorten(getattr(error, "strerror", None) or str(error) or type(error).__name__)


# ---------------------------------------------------------------- layout


def layout(size: tuple[int, int], config: LlavaConfig) -> TileLayout:
    """How an image of `size` (width, height) is cut into tiles.

    Raises:
      InputError: no grid holds even one pixel of it, or it is too long to be padded to a square.
    """
    if config.aspect_ratio == "pad":
        _check_square(size)
    if config.aspect_ratio != "anyres":
        return TileLayout(size)
    width, height = best_resolution(size, config)
    tile = config.vision.image_size
    return TileLayout(size, (width // tile, height // tile))


def most_tiles(config: LlavaConfig) -> int:
    """Tiles that an image may have, of whatever size."""
    tile = config.vision.image_size
    grids = config.grid_pinpoints if config.aspect_ratio == "anyres" else ()
    return max((1 + (w // tile) * (h // tile) for w, h in grids), default=1)


def best_resolution(size: tuple[int, int], config: LlavaConfig) -> tuple[int, int]:
    """Of the configured resolutions the (width, height) that keeps most pixels, then wastes fewest.

    The first of equals wins (llava/mm_utils.py `select_best_resolution`). The original reads the list as
    (width, height), transformers as (height, width): it matters where two are equally good.
    """
    swap = config.image_rules == "transformers"
    best, most, least_waste = None, 0, math.inf
    for pinpoint in config.grid_pinpoints:
        w, h = reversed(pinpoint) if swap else pinpoint
        scale = min(w / size[0], h / size[1])
        kept = min(int(size[0] * scale) * int(size[1] * scale), size[0] * size[1])
        waste = w * h - kept
        if kept > most or (kept == most and waste < least_waste):
            best, most, least_waste = (w, h), kept, waste
    if best is None:
        raise InputError(f"an image of {size[0]}x{size[1]} pixels is too narrow for every grid of the model")
    return best


# ---------------------------------------------------------------- pixels


def tiles(image: Image.Image, place: TileLayout, config: LlavaConfig) -> np.ndarray:
    """Cut an image, RGB or grey (L), into uint8 tiles [T, H, W, 3], H = W = the tower's image size.

    `place` is `layout(image.size, config)`. Tile 0 is the whole image; the grid follows row by row.
    """
    tile = config.vision.image_size
    if place.grid is None:
        if config.aspect_ratio == "pad":
            image = _pad_to_square(image, tuple(int(x * 255) for x in config.vision.image_mean))
        return _resize_and_crop(image, config.vision)[None]
    # The original's grids are bicubic whatever the image processor says; transformers' are as it says.
    resample = Image.Resampling(config.vision.resample if config.image_rules == "transformers" else BICUBIC)
    columns, rows = place.grid
    whole = np.asarray(image.resize((tile, tile), resample).convert("RGB"))
    grid = np.asarray(_fit(image, (columns * tile, rows * tile), resample))
    grid = grid.reshape(rows, tile, columns, tile, 3).swapaxes(1, 2).reshape(-1, tile, tile, 3)
    return np.concatenate([whole[None], grid])


def _check_square(size: tuple[int, int]) -> None:
    if max(size) ** 2 > MAX_PIXELS:
        raise InputError(f"an image of {size[0]}x{size[1]} pixels is too long to be padded to a square; scale it down")


def _pad_to_square(image: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    """llava/mm_utils.py `expand2square`."""
    _check_square(image.size)
    if image.width == image.height:
        return image
    side = max(image.size)
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def _resize_and_crop(image: Image.Image, vision: VisionConfig) -> np.ndarray:
    """The CLIP image processor on uint8 (transformers' CLIPImageProcessor): resize, then the middle."""
    size = vision.image_size
    resize = (size,) if vision.resize is None else vision.resize
    if len(resize) == 2:
        height, width = resize
    elif len(resize) == 1:  # the shortest edge
        short, long = sorted(image.size)
        long = int(resize[0] * long / short)
        width, height = (resize[0], long) if image.width <= image.height else (long, resize[0])
    else:
        width, height = image.size
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling(vision.resample))
    if vision.center_crop:  # black where it is smaller
        left, top = (width - size) // 2, (height - size) // 2
        image = image.crop((left, top, left + size, top + size))
    return np.asarray(image.convert("RGB"))


def _fit(image: Image.Image, size: tuple[int, int], resample: Image.Resampling) -> Image.Image:
    """llava/mm_utils.py `resize_and_pad_image`: scale to touch `size`, in the middle, black around."""
    width, height = size
    by_width, by_height = width / image.width, height / image.height
    if by_width < by_height:
        new = (width, min(math.ceil(image.height * by_width), height))
    else:
        new = (min(math.ceil(image.width * by_height), width), height)
    canvas = Image.new("RGB", size, (0, 0, 0))
    canvas.paste(image.resize(new, resample), ((width - new[0]) // 2, (height - new[1]) // 2))
    return canvas
