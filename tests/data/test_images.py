import base64
import io
import json
import re
import struct
import threading
import time
import tracemalloc
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import quote

import numpy as np
import pytest
from PIL import Image

from helpers import GOLDEN, golden_json, load_golden
from llava_jax import config as c
from llava_jax.console import InputError, run_main
from llava_jax.data import images, urls
from llava_jax.data.images import ImageFolder, TileLayout, image_size, layout, open_image, read_tiles, tiles
from llava_jax.data.splice import NEWLINE, count_features, merge_rows
from llava_jax.models.clip import normalise

PICTURES = sorted((GOLDEN / "images").iterdir())


@pytest.mark.parametrize("name", ["v1-linear-llama", "v1.5-llama", "v1.6-mistral"])
def test_tiles_equal_the_reference(name):
    config = load_golden(name)[0].config
    expected = np.load(GOLDEN / "tiles.npz")
    for path in PICTURES:
        image = open_image(path)
        got = tiles(image, layout(image.size, config), config)
        np.testing.assert_array_equal(read_tiles(path, layout(image.size, config), config), got)
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


# ---------------------------------------------------------------- formats and memory


@pytest.mark.parametrize("format", ["EPS", "PDF", "PPM", "TGA", "ICO", "PCX", "JPEG2000", "DDS", "SGI"])
def test_other_formats_are_refused_whatever_the_file_is_called(scene, tmp_path, format):
    """Pillow hands EPS to another program."""
    path = write(tmp_path / "photo.jpg", save(scene, format))
    for ask in (open_image, image_size):
        with pytest.raises(InputError, match=r"format that is read \(JPEG, PNG, WebP, GIF, BMP, TIFF\)$"):
            ask(path)


CONFIGS = {
    "square": c.tiny(aspect_ratio="square", merge="flat"),
    "pad": c.tiny(aspect_ratio="pad", merge="flat"),
    "anyres": load_golden("v1.6-mistral")[0].config,
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "RGBA", "LA"])
def test_grey_images_have_the_tiles_of_coloured_ones(scene, mode, config):
    for size in ((40, 30), (30, 30)):
        data = save(scene.resize(size).convert(mode), "PNG")
        place = layout(image_size(data), config)
        np.testing.assert_array_equal(read_tiles(data, place, config), tiles(open_image(data), place, config))


def test_16_bit_images_are_converted_in_strips(monkeypatch):
    values = np.arange(2000 * 1500).astype("<u2").reshape(1500, 2000)
    data = save(Image.frombytes("I;16", (2000, 1500), values.tobytes()), "PNG", compress_level=0)
    monkeypatch.setattr(images, "STRIP_PIXELS", 2**16)
    tracemalloc.start()
    try:
        got = open_image(data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    np.testing.assert_array_equal(np.asarray(got)[..., 0], values >> 8)
    assert peak < 1500 * 2000, peak  # of NumPy's arrays; an int64 copy would be eight times that


def test_only_huge_jpegs_are_scaled_while_they_are_decoded(scene, monkeypatch):
    large, config = scene.resize((801, 600), Image.Resampling.BICUBIC), CONFIGS["anyres"]
    exif = Image.Exif()
    exif[0x0112] = 6
    jpeg, png = save(large, "JPEG", exif=exif, quality=95), save(large, "PNG", exif=exif)
    seen, cut = [], images.tiles
    monkeypatch.setattr(images, "tiles", lambda image, *others: (seen.append(image.size), cut(image, *others))[1])
    place = layout(image_size(jpeg), config)
    want = read_tiles(jpeg, place, config).astype(int)
    monkeypatch.setattr(images, "FULL_PIXELS", 801 * 600 - 1)
    got = read_tiles(jpeg, place, config)
    read_tiles(png, place, config)
    assert seen == [(600, 801), (300, 401), (600, 801)]
    assert np.abs(got - want).max() <= 3
    assert open_image(jpeg).size == image_size(jpeg) == (600, 801)


def test_an_image_of_another_size_than_it_was_laid_out_for(scene):
    config = CONFIGS["anyres"]
    with pytest.raises(InputError, match=r"has \(40, 30\) pixels where its header said \(30, 40\)"):
        read_tiles(scene, layout((30, 40), config), config)


def test_webp_has_a_limit_of_its_own(scene, monkeypatch):
    monkeypatch.setattr(images, "FULL_PIXELS", 1000)
    with pytest.raises(InputError, match="40x30 is more than 1,000 pixels"):
        open_image(save(scene, "WEBP"))
    open_image(save(scene, "PNG"))


def test_a_jpeg_of_empty_scans_is_not_decoded():
    """Thirty bytes each, and a pass over all pixels."""
    data = save(Image.new("L", (64, 64)), "JPEG", progressive=True)
    at = data.rindex(b"\xff\xda")
    open_image(data[:at] + data[at:-2] * 50 + data[-2:])
    with pytest.raises(InputError, match="more than 100 scans"):
        open_image(data[:at] + data[at:-2] * 500 + data[-2:])
    comment = b"\xff\xfe\x00\x04\xff\xd9"  # which is no end
    with pytest.raises(InputError, match="more than 100 scans"):
        open_image(data[:at] + (comment + data[at:-2]) * 500 + data[-2:])
    with pytest.raises(InputError, match="more than 100 scans"):
        open_image(data[:at] + comment * 10**6 + data[at:-2] * 500 + data[-2:])


@pytest.mark.parametrize("progressive", [False, True])
def test_behind_the_end_of_a_jpeg_there_may_be_anything(scene, tmp_path, progressive):
    data = save(scene.resize((300, 200)), "JPEG", progressive=progressive, comment=b"\xff\xda" * 999)
    (tmp_path / "film.jpg").write_bytes(data + b"\xff\xda\x00" * 999)
    assert open_image(tmp_path / "film.jpg") == open_image(data)


# ---------------------------------------------------------------- downloads


@pytest.fixture
def server(scene):
    png = save(scene, "PNG")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            name = self.path.partition("?")[0].removeprefix("/")
            getattr(self, name, self.missing)()

        def answer(self, code=200, body=b"", **headers):
            self.send_response(code)
            for key, value in headers.items():
                self.send_header(key.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(body)

        def missing(self):
            self.answer(404, b"no")

        def image(self):
            self.answer(body=png)

        def drip(self):
            self.answer()
            self.slowly(self.wfile)

        def drip_headers(self):
            self.wfile.write(b"HTTP/1.1 200 OK\r\nx: ")
            self.slowly(self.wfile)

        def slowly(self, file):
            try:
                for _ in range(100):
                    file.write(b"x")
                    time.sleep(0.05)
            except OSError:  # nobody listens any more
                pass

        def large(self):
            self.answer(body=b"x", Content_Length=10**12)

        def endless(self):
            self.answer(body=b"x" * 10_000)

        def short(self):
            self.answer(body=png[:50], Content_Length=len(png))

        def to(self):
            self.answer(302, b"x" * 10_000, Location=self.path.partition("?")[2])

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        http.daemon_threads, http.block_on_close = True, False
        threading.Thread(target=http.serve_forever, args=[0.02], daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()


def test_urls(server, scene):
    for path in ("image", "to?/image", f"to?{server}/to?image"):
        np.testing.assert_array_equal(open_image(f"{server}/{path}"), scene)


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("nowhere", "the server answers 404"),
        ("drip", "too slow"),
        ("drip_headers", "0 bytes in 0 seconds: too slow"),
        ("large", "larger than 0 MiB"),
        ("endless", "larger than 0 MiB"),
        ("short", "bytes too soon"),
        ("to?ftp://127.0.0.1:1/a.png", "redirects to ftp://127.0.0.1:1/a.png; only http: and https: are followed"),
        ("to?file:///etc/hostname", "redirects to file:///etc/hostname; only"),
        ("to?data:image/png,x", "redirects to data:image/png,x; only"),
        ("to?to", "the server answers 302"),
        ("to?" + "/to?" * 20, "redirects more than 5 times"),
    ],
)
def test_servers_that_nobody_can_wait_for(server, monkeypatch, path, says):
    monkeypatch.setattr(urls, "PATIENCE", 0.3)
    monkeypatch.setattr(urls, "MAX_DOWNLOAD", 5000)
    with pytest.raises(InputError, match=says) as error:
        open_image(f"{server}/{path}")
    assert len(str(error.value)) < 300 and "\n" not in str(error.value)


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


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_deflate"])
def test_of_a_broken_file_a_command_writes_one_line(compression, capfd):
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "TIFF", compression=compression)
    data = bytearray(file.getvalue())
    data[100:2000] = bytes(1900)
    with pytest.raises(SystemExit):
        run_main(lambda: open_image(bytes(data)))
    out, err = capfd.readouterr()
    assert out == "" and re.fullmatch(r"error: image: broken image \(.*\)\n", err)
