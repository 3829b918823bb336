import base64
import io
import json
import struct
import threading
import zlib
from http.server import BaseHTTPRequestHandler, HTTPServer
from urllib.parse import quote

import numpy as np
import pytest
from conftest import GOLDEN, golden_json, load_golden
from PIL import Image

from llava_jax import config as c
from llava_jax.console import InputError
from llava_jax.images import ImageFolder, TileLayout, image_size, layout, open_image, tiles
from llava_jax.splice import NEWLINE, count_features, merge_rows
from llava_jax.vision import normalise

PICTURES = sorted((GOLDEN / "images").iterdir())


@pytest.mark.parametrize("name", ["v1-linear-llama", "v1.5-llama", "v1.6-mistral"])
def test_tiles_equal_the_reference(name):
    config = load_golden(name)[0].config
    expected = np.load(GOLDEN / "tiles.npz")
    for path in PICTURES:
        image = open_image(path)
        got = tiles(image, layout(image.size, config), config)
        got = np.asarray(normalise(got, config.vision)).transpose(0, 3, 1, 2)
        want = expected[f"{config.aspect_ratio}_{path.name[0]}"]
        want = want if want.ndim == 4 else want[None]
        assert got.shape == want.shape
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-6, err_msg=path.name)


def test_anyres_layout_equals_the_reference():
    golden = golden_json("anyres.json")
    config = c.preset("v1.6-vicuna-7b").replace(grid_pinpoints=tuple(map(tuple, golden["pinpoints_wh"])))
    for case in golden["cases"]:
        place = layout(tuple(case["size_wh"]), config)
        assert list(place.grid) == case["grid_wh"], case
        assert count_features(place, config) == case["n_features_spatial_unpad"], case
        rows = (merge_rows(place, config) == NEWLINE).sum()
        columns = (count_features(place, config) - 576) // rows - 1 if rows else 24 * case["grid_wh"][0]
        assert [rows, columns] == case["unpadded_rows_cols"], case


def test_very_long_picture_may_leave_no_rows():
    config = c.preset("v1.6-vicuna-7b")
    assert count_features(TileLayout((10_000, 100), (3, 1)), config) == 576


def save(image: Image.Image, format: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


@pytest.fixture
def scene():
    """A small picture in which every corner has its own colour."""
    x, y = np.meshgrid(np.linspace(0, 255, 40), np.linspace(0, 255, 30))
    return Image.fromarray(np.stack([x, y, 255 - x], axis=-1).astype(np.uint8))


@pytest.mark.parametrize("format", ["PNG", "WEBP", "BMP", "TIFF", "GIF", "JPEG"])
def test_formats(scene, format):
    data = save(scene, format, **({"lossless": True} if format == "WEBP" else {}))
    got = open_image(data)
    assert got.mode == "RGB"
    exact = format not in ("GIF", "JPEG")
    difference = np.abs(np.asarray(got, int) - np.asarray(scene, int))
    assert difference.max() == 0 if exact else difference.mean() < 12
    assert image_size(data) == got.size == scene.size


@pytest.mark.parametrize("mode", ["L", "P", "1", "LA", "RGBA", "CMYK", "YCbCr"])
def test_modes_are_converted_as_pillow_and_the_reference_do(scene, mode):
    image = scene.convert(mode)
    np.testing.assert_array_equal(open_image(image), image.convert("RGB"))


def test_transparency_is_dropped(scene):
    image = scene.convert("RGBA")
    image.putalpha(0)
    np.testing.assert_array_equal(open_image(save(image, "PNG")), scene)
    palette = scene.quantize(16)
    np.testing.assert_array_equal(open_image(save(palette, "PNG", transparency=3)), palette.convert("RGB"))


@pytest.mark.parametrize("dtype", ["<u2", ">u2"])
def test_16_bit_grey_is_scaled_not_clipped(dtype):
    values = np.linspace(0, 65535, 256).astype(dtype).reshape(16, 16)
    mode = {"<u2": "I;16", ">u2": "I;16B"}[dtype]
    image = Image.frombytes(mode, (16, 16), values.tobytes())
    got = np.asarray(open_image(image))
    np.testing.assert_array_equal(got[..., 0], values.astype(int) >> 8)
    if dtype == "<u2":
        np.testing.assert_array_equal(np.asarray(open_image(save(image, "PNG"))), got)


def test_16_bit_colour(scene):
    """Pillow writes no such file, so this one is made by hand."""
    rows = np.asarray(scene).astype(">u2") * 257
    raw = b"".join(b"\0" + row.tobytes() for row in rows)

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", *scene.size, 16, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")
    np.testing.assert_array_equal(open_image(png), scene)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(scene, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = save(scene, "PNG", exif=exif)
    got = open_image(data)
    turn = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}[orientation]
    want = scene if turn is None else scene.transpose(Image.Transpose(turn))
    np.testing.assert_array_equal(got, want)
    assert image_size(data) == want.size


@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 11))
def test_the_header_gives_the_size_that_the_pixels_have(scene, format, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = save(scene.resize((40, 12)), format, exif=exif)
    assert image_size(data) == open_image(data).size


def test_32_bit_files_that_hold_8_or_16_bits():
    values = np.arange(200, dtype=np.int32).reshape(10, 20)
    for scale in (1, 256):
        data = save(Image.fromarray(values * scale, "I"), "TIFF")
        np.testing.assert_array_equal(np.asarray(open_image(data))[..., 0], values)


def test_what_is_no_image_is_named():
    for what in (None, 3, np.zeros((4, 4, 3), np.uint8)):
        with pytest.raises(InputError, match=f"not {type(what).__name__}"):
            open_image(what)


def test_a_square_around_a_long_picture_has_a_limit():
    config = c.tiny(aspect_ratio="pad", merge="flat")
    layout((13000, 100), config)
    with pytest.raises(InputError, match="too long to be padded"):
        layout((20000, 100), config)


def test_first_frame_of_an_animation(scene):
    data = save(scene.quantize(64), "GIF", save_all=True, append_images=[Image.new("L", scene.size, 255)] * 3)
    assert np.abs(np.asarray(open_image(data), int) - np.asarray(scene, int)).mean() < 20


@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "WEBP"])
def test_truncated(scene, format):
    data = save(scene.resize((300, 200)), format)
    with pytest.raises(InputError, match="broken|not an image|cannot be read"):
        open_image(data[: len(data) // 2])


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_broken_bytes_never_escape_as_anything_but_an_input_error(scene):
    random = np.random.default_rng(0)
    files = [save(scene, f) for f in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF")]
    broken = 0
    for _ in range(300):
        data = bytearray(files[random.integers(len(files))])
        for at in random.integers(0, len(data), random.integers(1, 8)):
            data[at] = random.integers(256)
        try:
            open_image(bytes(data))
        except InputError:
            broken += 1
    assert broken > 50


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda d: d / "no.png", "no such image"),
        (lambda d: d, "a directory"),
        (lambda d: write(d / "a.png", b"hello, world"), "not an image"),
        (lambda d: write(d / "a.png", b""), "not an image"),
        (lambda d: write(d / "a.png", save(Image.new("RGB", (1, 1)), "PNG")), "1x1 pixels"),
        (lambda d: write(d / "a.png", save(Image.new("RGB", (1, 20000)), "PNG")), "1x20000 pixels"),
        (lambda d: write(d / "a.png", save(Image.new("RGB", (2000, 2)), "PNG")), "200 times"),
        (lambda d: write(d / "a.png", save(Image.new("1", (20000, 20000)), "PNG")), "178,956,970 pixels"),
        (lambda d: write(d / "a.tif", save(Image.new("F", (20, 20)), "TIFF")), "floating-point"),
        (lambda d: write(d / "a.tif", save(Image.new("I", (20, 20), 10**6), "TIFF")), "32-bit"),
    ],
)
def test_pictures_nobody_can_look_at(tmp_path, make, says):
    with pytest.raises(InputError, match=says):
        open_image(make(tmp_path))


def write(path, data):
    path.write_bytes(data)
    return path


@pytest.fixture
def server(scene):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path == "/a.png" else 404)
            self.end_headers()
            self.wfile.write(save(scene, "PNG"))

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()


def test_urls(server, scene):
    np.testing.assert_array_equal(open_image(f"{server}/a.png"), scene)
    with pytest.raises(InputError, match="404"):
        open_image(f"{server}/b.png")


@pytest.mark.parametrize("url", ["http://h:1/a b.png", "http://[::1", "http://127.0.0.1:1/x.png"])
def test_urls_that_are_none(url):
    with pytest.raises(InputError, match="cannot be fetched"):
        open_image(url)


def test_url_that_nobody_answers():
    with pytest.raises(InputError, match="cannot be fetched"):
        open_image("http://127.0.0.1:9/a.png")


# ---------------------------------------------------------------- data: and file: URLs


def test_data_urls(scene):
    png = save(scene, "PNG")
    text = base64.b64encode(png).decode()
    for url in (
        f"data:image/png;base64,{text}",
        f"data:image/jpeg;name=a.png;base64,{text}",  # what kind it is, its bytes say
        f"data:;base64,{text}",
        f"DATA:IMAGE/PNG;BASE64,{text}",
        f"data:image/png;base64,{text.rstrip('=')}",
        f"data:image/png;base64,{base64.urlsafe_b64encode(png).decode()}",
        f"data:image/png;base64,{quote(text, safe='')}",
        f"data:image/png;base64, {text[:60]}\r\n{text[60:]}\n",
        f"data:image/png,{quote(png)}",
        f"data:,{quote(png)}",
    ):
        np.testing.assert_array_equal(open_image(url), scene)
        assert image_size(url) == scene.size


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("data:image/png;base64", "without a comma"), ("data:", "without a comma"), ("data:,", "without data"),
        ("data:image/png;base64,", "without data"), ("data:image/png;base64,%%%", "broken base64"),
        ("data:image/png;base64,a", "broken base64"), ("data:image/png;base64,aGk=aGk=", "broken base64"),
        ("data:image/png;base64,\ud800", "broken base64"), ("data:text/html;base64,aGk=", "of text/html, not of"),
        ("data:image/png;base64,aGk=", "not an image"), ("data:image/png,hello", "not an image"),
        ("data:application/pdf,hello", "of application/pdf, not of an image"),
        ("file://", "names no file"), ("file:///", "names no file"), ("file://localhost", "names no file"),
        ("file://host/a.png", "a file of host host; only those of this machine"),
        ("file:///no/such.png", "/no/such.png: no such image"), ("file:/no/such.png", "/no/such.png: no such image"),
        ("file:///a%00.png", "cannot be read"),
    ],
)  # fmt: skip
def test_urls_that_hold_no_image(url, says):
    with pytest.raises(InputError, match=says):
        open_image(url)


def test_file_urls(scene, tmp_path):
    for name in ("a.png", "a b#1?.png", "100%.png", "\u00e4.png"):
        write(tmp_path / name, save(scene, "PNG"))
        for start in ("file://", "file://localhost", "FILE://LocalHost", "file:"):
            np.testing.assert_array_equal(open_image(f"{start}{quote(str(tmp_path / name))}"), scene)
    np.testing.assert_array_equal(open_image(f"file://{tmp_path}/a b#1?.png"), scene)  # as many write it


@pytest.mark.parametrize(
    "source",
    [
        "a" * 9999, "/" + "a/" * 4000, "x y " * 2000, "data:image/png;base64," + "A" * 9999, "data:" + "a" * 9999,
        "data:text/" + "a" * 9999 + ",b", "data:image/png;base64," + "?" * 9999, "http://h:1/" + "a b" * 3000,
        "http://[" + "a" * 9999, "file:///" + "a" * 9999, "file://" + "a" * 9999 + "/b", "http://x:1/" + "a" * 9999,
    ],
)  # fmt: skip
def test_no_error_repeats_a_long_name(source, tmp_path):
    for ask in (open_image, image_size, ImageFolder(tmp_path).find):
        try:
            ask(source)
        except InputError as error:
            assert len(str(error)) < 300
            assert not any(source[i : i + 101] in str(error) for i in range(0, len(source) - 100, 50))
        else:
            assert ask not in (open_image, image_size)


def test_transformers_rules_agree_with_its_processors():
    """Pixels, chosen resolution and number of features, over sizes on both sides of every rule."""
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    random = np.random.default_rng(0)
    config = load_golden("v1.6-mistral")[0].config.replace(image_rules="transformers")
    size = dict(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, return_tensors="np")
    pinpoints = [list(p) for p in config.grid_pinpoints]
    for _ in range(40):
        w, h = (int(x) for x in random.integers(8, 120, 2))
        image = Image.fromarray(random.integers(0, 256, (h, w, 3), dtype=np.uint8))
        theirs = LlavaNextImageProcessorPil(image_grid_pinpoints=pinpoints)(image, **size)["pixel_values"][0]
        place = layout((w, h), config)
        ours = normalise(tiles(image, place, config), config.vision).transpose(0, 3, 1, 2)
        assert ours.shape == theirs.shape, (w, h)
        np.testing.assert_allclose(ours, theirs, atol=1e-6, err_msg=str((w, h)))

        padded = config.replace(aspect_ratio="pad", merge="flat")
        theirs = LlavaImageProcessorPil(do_pad=True)(image, **size)["pixel_values"][0]
        ours = normalise(tiles(image, layout((w, h), padded), padded), config.vision)[0].transpose(2, 0, 1)
        np.testing.assert_allclose(ours, theirs, atol=1e-6, err_msg=str((w, h)))


def test_pad_colour_and_place():
    config = c.tiny(aspect_ratio="pad", merge="flat")
    image = Image.new("RGB", (28, 14), (255, 255, 255))
    [tile] = tiles(image, layout(image.size, config), config)
    assert tuple(tile[0, 0]) == (122, 116, 104)
    assert (tile[9:19] == 255).all()


def test_config_of_golden_is_what_the_tests_assume():
    config = json.loads((GOLDEN / "checkpoints/v1.6-mistral/config.json").read_text())
    assert config["image_grid_pinpoints"] == [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]
