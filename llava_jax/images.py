"""From a picture to uint8 tiles, exactly as the reference makes them (host only: Pillow and NumPy).

The reference (llava/mm_utils.py `process_images`, and the CLIP image processor behind it) knows three ways:

    square   the shortest side to the tower's size, bicubic; centre crop
    pad      pad to a square with the mean colour, then as `square`
    anyres   the best of a few grids of tiles: fit, pad with black, cut; before them the whole picture squashed
             into one tile

All arithmetic on pixels happens in Pillow on uint8, so tiles are uint8 here and the subtraction of the mean
waits for the device (`vision.normalise`): a quarter of the bytes to send.

Which pixels a file holds is decided in `open_image`:

- EXIF rotation is applied. The reference ignores it, and so sees phone pictures lying on their side; what a
  person sees is what the question is about. Its training data holds hardly any such picture.
- Alpha is dropped, palettes, grey and CMYK are converted by Pillow's `convert("RGB")`: as the reference does.
- 16-bit grey is scaled to 8 bits. Pillow's own conversion clips at 255, which turns such a picture white.
- Of an animation the first frame is taken.
"""

import base64
import dataclasses
import http.client
import io
import math
import os
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path, PurePath

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from llava_jax.config import BICUBIC, LlavaConfig, VisionConfig
from llava_jax.console import InputError, shorten

MAX_PIXELS = 178_956_970  # twice Pillow's own warning threshold, where it too speaks of a decompression bomb
MAX_ASPECT = 200
MAX_DOWNLOAD = 256 * 2**20
TIMEOUT = 30.0


@dataclasses.dataclass(frozen=True)
class TileLayout:
    """How a picture lies in its tiles: all that splicing needs to know of it."""

    size: tuple[int, int]  # width, height in pixels
    grid: tuple[int, int] | None = None  # columns, rows of tiles after the first; None: one tile, no grid

    @property
    def tiles(self) -> int:
        return 1 + self.grid[0] * self.grid[1] if self.grid else 1


# ---------------------------------------------------------------- files


def open_image(source: str | os.PathLike | bytes | Image.Image) -> Image.Image:
    """A picture as RGB, as a person sees it.

    Args:
      source: a path, an `http(s):`, `data:` or `file:` URL, the bytes of a file, or a Pillow image.

    Raises:
      InputError: no such file, not an image, truncated, or of a size that no LLaVA can look at.
    """
    what, image = _open(source)
    try:
        image.load()
        image = ImageOps.exif_transpose(image)
        return _to_rgb(image, what)
    except InputError:
        raise
    except MemoryError:
        raise InputError(f"{what}: not enough memory for {image.width}x{image.height} pixels") from None
    except Exception as error:  # Pillow's decoders raise whatever they like on a broken file
        raise InputError(f"{what}: broken image ({_reason(error)})") from None


def image_size(source: str | os.PathLike | bytes | Image.Image) -> tuple[int, int]:
    """Width and height that `open_image` will give, from the file's header alone.

    Raises:
      InputError: as `open_image`, but for damage behind the header.
    """
    what, image = _open(source)
    try:
        turned = image.format != "TIFF" and image.getexif().get(0x0112, 1) in (5, 6, 7, 8)  # TIFFs come turned
    except Exception as error:
        raise InputError(f"{what}: broken image ({_reason(error)})") from None
    return (image.height, image.width) if turned else image.size


def _open(source) -> tuple[str, Image.Image]:
    if isinstance(source, Image.Image):
        what, image = "image", source
    else:
        source = fetch(source)
        if isinstance(source, bytes):
            what, file = getattr(source, "name", "image"), io.BytesIO(source)
        elif isinstance(source, (str, os.PathLike)):
            file = os.fspath(source)
            what = shorten(file)
        else:
            raise InputError(f"an image is a path, a URL, bytes or a Pillow image, not {type(source).__name__}")
        try:
            image = Image.open(file)
        except FileNotFoundError:
            raise InputError(f"{what}: no such image") from None
        except IsADirectoryError:
            raise InputError(f"{what}: a directory, not an image") from None
        except UnidentifiedImageError:
            raise InputError(f"{what}: not an image, or of a format that Pillow does not read") from None
        except Image.DecompressionBombError:
            raise InputError(f"{what}: more than {MAX_PIXELS:,} pixels; scale it down first") from None
        except Exception as error:
            raise InputError(f"{what}: cannot be read ({_reason(error)})") from None
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise InputError(f"{what}: {width}x{height} is more than {MAX_PIXELS:,} pixels; scale it down first")
    if min(width, height) < 2 or max(width, height) > MAX_ASPECT * min(width, height):
        raise InputError(
            f"{what}: {width}x{height} pixels cannot be looked at: each side needs at least 2 pixels, "
            f"and the longer one at most {MAX_ASPECT} times the shorter"
        )
    return what, image


class Fetched(bytes):
    """The bytes of a file, and what errors call it."""

    name: str


def fetch(source):
    """A picture behind a URL, to be read more than once: an `http(s):` or `data:` URL as the `Fetched` bytes of a file,
    a `file:` URL as a path. Anything else as it is.

    Raises:
      InputError: it cannot be fetched, or is no URL of an image.
    """
    if not isinstance(source, str):
        return source
    scheme, colon, rest = source[:9].partition(":")
    scheme = scheme.lower() if colon else ""
    if scheme == "file" and rest.startswith("/"):
        return _path_of(source)
    if scheme not in ("http", "https", "data") or (scheme != "data" and not rest.startswith("//")):
        return source
    data = Fetched(_decode(source) if scheme == "data" else _download(source))
    data.name = shorten(source)
    return data


def is_url(source: str) -> bool:
    """Whether it is to be downloaded."""
    return source[:8].lower().startswith(("http://", "https://"))


def label(name: str) -> str:
    """What lists call an image: its name, but for a `data:` URL, which is the image itself."""
    return shorten(name) if name[:5].lower() == "data:" else name


def _download(url: str) -> bytes:
    name = shorten(url)
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "llava-jax"})
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
            data = answer.read(MAX_DOWNLOAD + 1)
    except urllib.error.HTTPError as error:
        raise InputError(f"{name}: the server answers {error.code} {shorten(error.reason)}") from None
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise InputError(f"{name}: cannot be fetched ({shorten(getattr(error, 'reason', error))})") from None
    if len(data) > MAX_DOWNLOAD:
        raise InputError(f"{name}: larger than {MAX_DOWNLOAD >> 20} MiB")
    return data


def _decode(url: str) -> bytes:
    """What a `data:` URL holds (RFC 2397), in base64 of either alphabet, padded or not, or percent-encoded."""
    head, comma, body = url.partition(",")
    kind, *settings = (part.strip().lower() for part in head[len("data:") :].split(";"))
    if not comma:
        raise InputError(f"{shorten(url)}: a data: URL without a comma, and so without data")
    if kind and not kind.startswith("image/"):
        raise InputError(f"{shorten(url)}: a data: URL of {shorten(kind, 40)}, not of an image")
    try:
        data = urllib.parse.unquote_to_bytes(body)
        if "base64" in settings:
            data = b"".join(data.split()).translate(bytes.maketrans(b"-_", b"+/"))
            data = base64.b64decode(data + b"=" * (-len(data) % 4), validate=True)
    except ValueError:
        raise InputError(f"{shorten(url)}: a data: URL with broken {'base64' if settings else 'text'}") from None
    if not data:
        raise InputError(f"{shorten(url)}: a data: URL without data")
    return data


def _path_of(url: str) -> str:
    """The path in a `file:` URL (RFC 8089)."""
    host, path = "", url[len("file:") :]
    if path.startswith("//"):
        host, slash, path = path[2:].partition("/")
        path = slash + path
    if host.lower() not in ("", "localhost"):
        raise InputError(f"{shorten(url)}: a file of host {shorten(host, 40)}; only those of this machine can be read")
    try:
        path = os.fsdecode(urllib.parse.unquote_to_bytes(path))
    except ValueError:
        raise InputError(f"{shorten(url)}: a file: URL that is no Unicode") from None
    if path in ("", "/"):
        raise InputError(f"{shorten(url)}: a file: URL that names no file")
    return path


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


def _to_rgb(image: Image.Image, what: str) -> Image.Image:
    if image.mode.startswith("I"):  # I;16 and its byte orders; I where a format has no narrower mode
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise InputError(f"{what}: 32-bit pixels; save it with 8 or 16 bits a channel")
        narrow = image.mode == "I" and values.max() <= 0xFF  # 8 bits in a wider format
        image = Image.fromarray((values if narrow else values >> 8).astype(np.uint8))
    elif image.mode == "F":
        raise InputError(f"{what}: floating-point pixels; save it with 8 or 16 bits a channel")
    return image.convert("RGB")


def _reason(error: BaseException) -> str:
    return shorten(getattr(error, "strerror", None) or str(error) or type(error).__name__)


# ---------------------------------------------------------------- layout


def layout(size: tuple[int, int], config: LlavaConfig) -> TileLayout:
    """How a picture of `size` (width, height) is cut into tiles.

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
    """Tiles that a picture may have, of whatever size."""
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
    """Cut an RGB picture into uint8 tiles [T, H, W, 3], H = W = the tower's image size.

    `place` is `layout(image.size, config)`. Tile 0 is the whole picture; the grid follows row by row.
    """
    tile = config.vision.image_size
    if place.grid is None:
        if config.aspect_ratio == "pad":
            image = _pad_to_square(image, tuple(int(x * 255) for x in config.vision.image_mean))
        return _resize_and_crop(image, config.vision)[None]
    # The original's grids are bicubic whatever the image processor says; transformers' are as it says.
    resample = Image.Resampling(config.vision.resample if config.image_rules == "transformers" else BICUBIC)
    columns, rows = place.grid
    whole = np.asarray(image.resize((tile, tile), resample))
    grid = np.asarray(_fit(image, (columns * tile, rows * tile), resample))
    grid = grid.reshape(rows, tile, columns, tile, 3).swapaxes(1, 2).reshape(-1, tile, tile, 3)
    return np.concatenate([whole[None], grid])


def _check_square(size: tuple[int, int]) -> None:
    if max(size) ** 2 > MAX_PIXELS:
        raise InputError(f"an image of {size[0]}x{size[1]} pixels is too long to be padded to a square; scale it down")


def _pad_to_square(image: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    """llava/mm_utils.py `expand2square`."""
    _check_square(image.size)
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
    return np.asarray(image)


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
