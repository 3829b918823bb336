"""Split images into uint8 tiles that equal the reference's (host only: Pillow and NumPy).

The reference (llava/mm_utils.py `process_images`, and the CLIP image processor that it calls) has three modes:

    square   resize the shortest side to the tower's image size (bicubic), centre crop
    pad      pad to a square with the mean colour, then as `square`
    anyres   the whole image resized to one tile, then the best of a few grids of tiles: resize to fit, pad with
             black, split

All pixel arithmetic happens in Pillow on uint8, so tiles are uint8 here, and the device subtracts the mean
(`clip.normalise`): that transfers a quarter of the bytes.

`open_image` determines the pixels of a file:

- It applies EXIF rotation, so that the model sees what people see. The reference ignores it, and sees many photos from
  phones rotated; its training data has hardly any such image.
- It drops alpha, and converts palettes, grey and CMYK with Pillow's `convert("RGB")`, as the reference does.
- It scales 16-bit grey to 8 bits. Pillow's own conversion clips at 255, which turns such an image white.
- It uses the first frame of an animation.

Only `FORMATS` are supported: Pillow passes some of the others to external programs, and most are never used.

`read_tiles` holds one image at a time, as RGB at 4 bytes a pixel or as grey at 1 (until it is split into tiles). The
JPEG decoder halves images of more than `FULL_PIXELS` (1.2 bytes a pixel instead of 4.4; measured on 64 million pixels,
8 % of the values in the tiles differ from those at full size, by 1 of 255), and never smaller ones, so that their tiles
equal the reference's. Conversion briefly takes up to 9 bytes a pixel (RGBA, CMYK, rotation). WebP's decoder takes 16,
so a WebP has at most `FULL_PIXELS`. Only one image of more than `LARGE_PIXELS` is decoded at a time, whatever the
number of threads.
"""

import contextlib
import dataclasses
import io
import math
import os
import re
import threading
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageOps, TiffImagePlugin, UnidentifiedImageError, WebPImagePlugin  # noqa: F401  # FORMATS

from llava_jax.config import BICUBIC, LlavaConfig, VisionConfig
from llava_jax.console import InputError, shorten
from llava_jax.data.urls import fetch
from llava_jax.files import open_regular

FORMATS = {"JPEG": "JPEG", "PNG": "PNG", "WEBP": "WebP", "GIF": "GIF", "BMP": "BMP", "TIFF": "TIFF"}  # Pillow's names
MAX_PIXELS = 178_956_970  # twice Pillow's warning threshold, where Pillow raises DecompressionBombError
MAX_ASPECT = 200
MAX_FILE = 2**30  # bytes: MAX_PIXELS of 16-bit colour, uncompressed
MAX_SCANS = 100  # of a JPEG; progressive ones have about ten, and each scan covers all pixels
MAX_SEGMENTS = 10 * MAX_SCANS  # of a JPEG, including the tables between scans
FULL_PIXELS = 64_000_000
LARGE_PIXELS = 16_000_000
STRIP_PIXELS = 2**20  # converted at a time

MARKER = re.compile(
    rb"\xff[^\x00\x01\xd0-\xd8\xff]"
)  # JPEG markers that begin a segment or end the image; the others have no length
START_OF_SCAN, END_OF_IMAGE = b"\xff\xda", b"\xff\xd9"

_one_large = threading.Lock()


@dataclasses.dataclass(frozen=True)
class TileLayout:
    """How an image is divided into tiles: everything that splicing needs to know about it."""

    size: tuple[int, int]  # width, height in pixels
    grid: tuple[int, int] | None = None  # columns, rows of tiles after the first; None: one tile, no grid

    @property
    def tiles(self) -> int:
        return 1 + self.grid[0] * self.grid[1] if self.grid else 1


# ---------------------------------------------------------------- files


def open_image(source: str | os.PathLike | bytes | Image.Image) -> Image.Image:
    """Open an image as RGB, with EXIF rotation applied.

    Args:
      source: a path, an `http(s):`, `data:` or `file:` URL, the bytes of a file, or a Pillow image.

    Raises:
      InputError: the file is missing, not an image or truncated, or the image has an unsupported size.
    """
    with _opened(source) as (name, image):
        image = _decode(name, image, in_place=image is not source)
        return image if image.mode == "RGB" else image.convert("RGB")


def image_size(source: str | os.PathLike | bytes | Image.Image) -> tuple[int, int]:
    """Width and height of the image that `open_image` returns, from the file's header alone.

    Raises:
      InputError: as `open_image`, except for damage after the header.
    """
    with _opened(source) as (name, image):
        return _upright_size(name, image)


def read_tiles(source: str | os.PathLike | bytes | Image.Image, layout: TileLayout, config: LlavaConfig) -> np.ndarray:
    """Read the uint8 tiles [T, H, W, 3] of an image, and keep nothing else of it in memory.

    Args:
      layout: `tile_layout(image_size(source), config)`; without a grid, its size is not used.

    Raises:
      InputError: as `open_image` and `tile_layout`, or the image's size differs from the layout's.
    """
    with _opened(source) as (name, image):
        size = _upright_size(name, image)
        if layout.grid and size != layout.size:
            raise InputError(f"{name}: has {size} pixels, but its header gave {layout.size}")
        if config.aspect_ratio == "pad":
            _check_square(size)
        if image.width * image.height > FULL_PIXELS and image is not source:
            image.draft(None, (image.width // 2, image.height // 2))  # only affects JPEGs
        return tile_image(_decode(name, image, in_place=image is not source), layout, config)


@contextlib.contextmanager
def _opened(source) -> Iterator[tuple[str, Image.Image]]:
    """Yields the name of an image in errors, and the image with its header read. Large images are opened one by one."""
    with contextlib.ExitStack() as stack:
        if isinstance(source, Image.Image):
            name, image = "image", source
        else:
            source = fetch(source)
            if isinstance(source, bytes):
                name, file = getattr(source, "name", "image"), io.BytesIO(source)
            elif isinstance(source, (str, os.PathLike)):
                name, file = shorten(os.fspath(source)), stack.enter_context(_open_file(source))
            else:
                raise InputError(f"an image is a path, a URL, bytes or a Pillow image, not {type(source).__name__}")
            image = _identify(name, file)
        width, height = image.size
        max_pixels = FULL_PIXELS if image.format == "WEBP" and image is not source else MAX_PIXELS
        if width * height > max_pixels:
            raise InputError(f"{name}: {width}x{height} is more than {max_pixels:,} pixels; scale it down first")
        if min(width, height) < 2 or max(width, height) > MAX_ASPECT * min(width, height):
            raise InputError(
                f"{name}: {width}x{height} pixels is an unsupported size: each side needs at least 2 pixels, "
                f"and the longer one may have at most {MAX_ASPECT} times the shorter"
            )
        if width * height > LARGE_PIXELS:
            stack.enter_context(_one_large)
        yield name, image


def _open_file(path: str | os.PathLike):
    name = shorten(os.fspath(path))
    try:
        file = open_regular(path)
    except FileNotFoundError:
        raise InputError(f"{name}: no such image") from None
    except (OSError, ValueError) as error:  # ValueError: an invalid file name
        raise InputError(f"{name}: cannot be read ({_reason(error)})") from None
    if (size := os.fstat(file.fileno()).st_size) > MAX_FILE:
        file.close()
        raise InputError(f"{name}: has {size:,} bytes; an image file may have at most {MAX_FILE:,}")
    return file


def _identify(name: str, file) -> Image.Image:
    try:
        return Image.open(file, formats=list(FORMATS))
    except UnidentifiedImageError:
        raise InputError(f"{name}: not an image in a supported format ({', '.join(FORMATS.values())})") from None
    except Image.DecompressionBombError:
        raise InputError(f"{name}: more than {MAX_PIXELS:,} pixels; scale it down first") from None
    except Exception as error:
        raise InputError(f"{name}: cannot be read ({_reason(error)})") from None


def _upright_size(name: str, image: Image.Image) -> tuple[int, int]:
    try:
        is_rotated = image.format != "TIFF" and image.getexif().get(0x0112, 1) in (5, 6, 7, 8)  # Pillow rotates TIFFs
    except Exception as error:
        raise InputError(f"{name}: broken image ({_reason(error)})") from None
    return (image.height, image.width) if is_rotated else image.size


def _decode(name: str, image: Image.Image, *, in_place: bool) -> Image.Image:
    """Decode an opened image, rotated upright, to 8 bits a channel: RGB, or L for grey (a quarter of the memory).

    Args:
      in_place: whether `image` itself may be rotated.
    """
    try:
        if image.mode == "F":
            raise InputError(f"{name}: floating-point pixels; save it with 8 or 16 bits a channel")
        if image.format in ("JPEG", "MPO") and in_place:
            _check_scans(image.fp)  # type: ignore[attr-defined]  # of an image that has just been opened
        image.load()
        if in_place:
            ImageOps.exif_transpose(image, in_place=True)
        else:
            image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # I;16 in either byte order; I in formats that have no narrower mode
            return _scale_16_bits(name, image)
        mode = "L" if image.mode in ("1", "L") else "RGB"
        return image if image.mode == mode else image.convert(mode)
    except InputError:
        raise
    except MemoryError:
        raise InputError(f"{name}: not enough memory for {image.width}x{image.height} pixels") from None
    except Exception as error:  # Pillow's decoders raise any exception on a broken file
        raise InputError(f"{name}: broken image ({_reason(error)})") from None


def _check_scans(file) -> None:
    """Raise ValueError for a JPEG that is crafted to take hours to decode, with a great many empty scans.

    Args:
      file: at the start of the first scan, where Pillow stopped reading. Anything may follow the end of the image, such
        as the video that phones append.
    """
    at, scans, segments = file.tell(), 1, 0
    while len(block := file.read(2**16)) > 1:
        marker = MARKER.search(block)
        if not marker:
            file.seek(-1, os.SEEK_CUR)  # a marker may straddle two blocks
            continue
        if marker[0] == END_OF_IMAGE:
            break
        scans, segments = scans + (marker[0] == START_OF_SCAN), segments + 1
        if scans > MAX_SCANS or segments > MAX_SEGMENTS:
            raise ValueError(f"more than {MAX_SCANS} scans")
        file.seek(marker.end() - len(block), os.SEEK_CUR)
        file.seek(max(int.from_bytes(file.read(2), "big") - 2, 0), os.SEEK_CUR)
    file.seek(at)


def _scale_16_bits(name: str, image: Image.Image) -> Image.Image:
    """Convert grey of 16 bits, or of 8 in a wider mode, to 8 bits; in strips, since copies are larger."""
    rows = max(1, STRIP_PIXELS // image.width)
    boxes = [(0, top, image.width, min(top + rows, image.height)) for top in range(0, image.height, rows)]
    shift = 8
    if image.mode == "I":
        low, high = np.asarray(image.getextrema())
        if low < 0 or high > 0xFFFF:
            raise InputError(f"{name}: 32-bit pixels; save it with 8 or 16 bits a channel")
        shift = 8 if high > 0xFF else 0
    grey = Image.new("L", image.size)
    for box in boxes:
        grey.paste(Image.fromarray((np.asarray(image.crop(box)) >> shift).astype(np.uint8)), box)
    return grey


def _reason(error: BaseException) -> str:
    return shorten(getattr(error, "strerror", None) or str(error) or type(error).__name__)


# ---------------------------------------------------------------- layout


def tile_layout(size: tuple[int, int], config: LlavaConfig) -> TileLayout:
    """The layout of the tiles of an image of `size` (width, height).

    Raises:
      InputError: the image is too narrow for every grid, or too long to be padded to a square.
    """
    if config.aspect_ratio == "pad":
        _check_square(size)
    if config.aspect_ratio != "anyres":
        return TileLayout(size)
    width, height = best_resolution(size, config)
    tile = config.vision.image_size
    return TileLayout(size, (width // tile, height // tile))


def image_tile_counts(config: LlavaConfig) -> tuple[int, ...]:
    """The numbers of tiles that an image may have, the smallest first."""
    tile = config.vision.image_size
    if config.aspect_ratio != "anyres":
        return (1,)
    return tuple(sorted({1 + (w // tile) * (h // tile) for w, h in config.grid_pinpoints}))


def max_tiles(config: LlavaConfig) -> int:
    """The largest number of tiles that an image of any size may have."""
    return image_tile_counts(config)[-1]


def best_resolution(size: tuple[int, int], config: LlavaConfig) -> tuple[int, int]:
    """The configured (width, height) that keeps the most pixels of an image, then wastes the fewest.

    The first of equals wins (llava/mm_utils.py `select_best_resolution`). The original reads the list as
    (width, height), transformers as (height, width), which matters if two are equally good.
    """
    swap = config.image_rules == "transformers"
    best, most_kept, least_waste = None, 0, math.inf
    for pinpoint in config.grid_pinpoints:
        w, h = reversed(pinpoint) if swap else pinpoint
        scale = min(w / size[0], h / size[1])
        kept = min(int(size[0] * scale) * int(size[1] * scale), size[0] * size[1])
        waste = w * h - kept
        if kept > most_kept or (kept == most_kept and waste < least_waste):
            best, most_kept, least_waste = (w, h), kept, waste
    if best is None:
        raise InputError(f"an image of {size[0]}x{size[1]} pixels is too narrow for every grid of the model")
    return best


# ---------------------------------------------------------------- pixels


def tile_image(image: Image.Image, layout: TileLayout, config: LlavaConfig) -> np.ndarray:
    """Split an image, RGB or grey (L), into uint8 tiles [T, H, W, 3], H = W = the tower's image size.

    `layout` is `tile_layout(image.size, config)`. Tile 0 is the whole image; the grid follows row by row.
    """
    tile = config.vision.image_size
    if layout.grid is None:
        if config.aspect_ratio == "pad":
            red, green, blue = (int(x * 255) for x in config.vision.image_mean)
            image = _pad_to_square(image, (red, green, blue))
        return _resize_and_crop(image, config.vision)[None]
    # The original always resizes grids bicubically, transformers with the image processor's resample.
    resample = Image.Resampling(config.vision.resample if config.image_rules == "transformers" else BICUBIC)
    columns, rows = layout.grid
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
    """The CLIP image processor on uint8 (transformers' CLIPImageProcessor): resize, then centre crop."""
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
    if vision.center_crop:  # padded with black if the image is smaller
        left, top = (width - size) // 2, (height - size) // 2
        image = image.crop((left, top, left + size, top + size))
    return np.asarray(image.convert("RGB"))


def _fit(image: Image.Image, size: tuple[int, int], resample: Image.Resampling) -> Image.Image:
    """llava/mm_utils.py `resize_and_pad_image`: resize to fit into `size`, centred and padded with black."""
    width, height = size
    by_width, by_height = width / image.width, height / image.height
    if by_width < by_height:
        new = (width, min(math.ceil(image.height * by_width), height))
    else:
        new = (min(math.ceil(image.width * by_height), width), height)
    canvas = Image.new("RGB", size, (0, 0, 0))
    canvas.paste(image.resize(new, resample), ((width - new[0]) // 2, (height - new[1]) // 2))
    return canvas
