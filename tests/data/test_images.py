"""Images of every format, read and laid out in tiles as the reference does; what is no image is refused."""

import io
import json
import re
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image

from helpers import GOLDEN, golden_json, image_file, load_golden
from llava_jax import config as c
from llava_jax.console import InputError, run_main
from llava_jax.data import images
from llava_jax.data.images import TileLayout, image_size, open_image, read_tiles, tile_image, tile_layout
from llava_jax.data.splice import NEWLINE, count_features, merge_rows
from llava_jax.models.clip import normalise

IMAGE_FILES = sorted((GOLDEN / "images").iterdir())


@pytest.mark.parametrize("name", ["v1-linear-llama", "v1.5-llama", "v1.6-mistral"])
def test_tiles_equal_the_reference(name):
    config = load_golden(name)[0].config
    expected = np.load(GOLDEN / "tiles.npz")
    for path in IMAGE_FILES:
        image = open_image(path)
        got = tile_image(image, tile_layout(image.size, config), config)
        np.testing.assert_array_equal(read_tiles(path, tile_layout(image.size, config), config), got)
        got = np.asarray(normalise(got, config.vision)).transpose(0, 3, 1, 2)
        want = expected[f"{config.aspect_ratio}_{path.name[0]}"]
        want = want if want.ndim == 4 else want[None]
        assert got.shape == want.shape
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-6, err_msg=path.name)


def test_anyres_layout_equals_the_reference():
    golden = golden_json("anyres.json")
    config = c.preset("v1.6-vicuna-7b").replace(grid_pinpoints=tuple(map(tuple, golden["pinpoints_wh"])))
    for case in golden["cases"]:
        place = tile_layout(tuple(case["size_wh"]), config)
        assert list(place.grid) == case["grid_wh"], case
        assert count_features(place, config) == case["n_features_spatial_unpad"], case
        rows = (merge_rows(place, config) == NEWLINE).sum()
        columns = (count_features(place, config) - 576) // rows - 1 if rows else 24 * case["grid_wh"][0]
        assert [rows, columns] == case["unpadded_rows_cols"], case


def test_very_long_image_may_leave_no_rows():
    config = c.preset("v1.6-vicuna-7b")
    assert count_features(TileLayout((10_000, 100), (3, 1)), config) == 576


def test_pad_colour_and_place():
    config = c.tiny(aspect_ratio="pad", merge="flat")
    image = Image.new("RGB", (28, 14), (255, 255, 255))
    [tile] = tile_image(image, tile_layout(image.size, config), config)
    assert tuple(tile[0, 0]) == (122, 116, 104)
    assert (tile[9:19] == 255).all()


def test_config_of_golden_is_what_the_tests_assume():
    config = json.loads((GOLDEN / "checkpoints/v1.6-mistral/config.json").read_text())
    assert config["image_grid_pinpoints"] == [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("format", ["PNG", "WEBP", "BMP", "TIFF", "GIF", "JPEG"])
def test_formats(scene, format):
    data = image_file(scene, format, **({"lossless": True} if format == "WEBP" else {}))
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
    np.testing.assert_array_equal(open_image(image_file(image, "PNG")), scene)
    palette = scene.quantize(16)
    np.testing.assert_array_equal(open_image(image_file(palette, "PNG", transparency=3)), palette.convert("RGB"))


@pytest.mark.parametrize("dtype", ["<u2", ">u2"])
def test_16_bit_grey_is_scaled_not_clipped(dtype):
    values = np.linspace(0, 65535, 256).astype(dtype).reshape(16, 16)
    mode = {"<u2": "I;16", ">u2": "I;16B"}[dtype]
    image = Image.frombytes(mode, (16, 16), values.tobytes())
    got = np.asarray(open_image(image))
    np.testing.assert_array_equal(got[..., 0], values.astype(int) >> 8)
    if dtype == "<u2":
        np.testing.assert_array_equal(np.asarray(open_image(image_file(image, "PNG"))), got)


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
    data = image_file(scene, "PNG", exif=exif)
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
    data = image_file(scene.resize((40, 12)), format, exif=exif)
    assert image_size(data) == open_image(data).size


def test_32_bit_files_that_hold_8_or_16_bits():
    values = np.arange(200, dtype=np.int32).reshape(10, 20)
    for scale in (1, 256):
        data = image_file(Image.fromarray(values * scale, "I"), "TIFF")
        np.testing.assert_array_equal(np.asarray(open_image(data))[..., 0], values)


def test_what_is_no_image_is_named():
    for what in (None, 3, np.zeros((4, 4, 3), np.uint8)):
        with pytest.raises(InputError, match=f"not {type(what).__name__}"):
            open_image(what)


def test_a_square_around_a_long_image_has_a_limit():
    config = c.tiny(aspect_ratio="pad", merge="flat")
    tile_layout((13000, 100), config)
    with pytest.raises(InputError, match="too long to be padded"):
        tile_layout((20000, 100), config)


def test_first_frame_of_an_animation(scene):
    data = image_file(scene.quantize(64), "GIF", save_all=True, append_images=[Image.new("L", scene.size, 255)] * 3)
    assert np.abs(np.asarray(open_image(data), int) - np.asarray(scene, int)).mean() < 20


@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "WEBP"])
def test_truncated(scene, format):
    data = image_file(scene.resize((300, 200)), format)
    with pytest.raises(InputError, match="broken|not an image|cannot be read"):
        open_image(data[: len(data) // 2])


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_broken_bytes_never_escape_as_anything_but_an_input_error(scene):
    random = np.random.default_rng(0)
    files = [image_file(scene, f) for f in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF")]
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
        (lambda d: write(d / "a.png", image_file(Image.new("RGB", (1, 1)), "PNG")), "1x1 pixels"),
        (lambda d: write(d / "a.png", image_file(Image.new("RGB", (1, 20000)), "PNG")), "1x20000 pixels"),
        (lambda d: write(d / "a.png", image_file(Image.new("RGB", (2000, 2)), "PNG")), "200 times"),
        (lambda d: write(d / "a.png", image_file(Image.new("1", (20000, 20000)), "PNG")), "178,956,970 pixels"),
        (lambda d: write(d / "a.tif", image_file(Image.new("F", (20, 20)), "TIFF")), "floating-point"),
        (lambda d: write(d / "a.tif", image_file(Image.new("I", (20, 20), 10**6), "TIFF")), "32-bit"),
    ],
)
def test_images_nobody_can_look_at(tmp_path, make, says):
    with pytest.raises(InputError, match=says):
        open_image(make(tmp_path))


def write(path, data):
    path.write_bytes(data)
    return path


def test_an_image_of_another_size_than_it_was_laid_out_for(scene):
    config = CONFIGS["anyres"]
    with pytest.raises(InputError, match=r"has \(40, 30\) pixels, but its header gave \(30, 40\)"):
        read_tiles(scene, tile_layout((30, 40), config), config)


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


# ---------------------------------------------------------------- formats and memory


@pytest.mark.parametrize("format", ["EPS", "PDF", "PPM", "TGA", "ICO", "PCX", "JPEG2000", "DDS", "SGI"])
def test_other_formats_are_refused_whatever_the_file_is_called(scene, tmp_path, format):
    """Pillow hands EPS to another program."""
    path = write(tmp_path / "photo.jpg", image_file(scene, format))
    for ask in (open_image, image_size):
        with pytest.raises(InputError, match=r"in a supported format \(JPEG, PNG, WebP, GIF, BMP, TIFF\)$"):
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
        data = image_file(scene.resize(size).convert(mode), "PNG")
        place = tile_layout(image_size(data), config)
        np.testing.assert_array_equal(read_tiles(data, place, config), tile_image(open_image(data), place, config))


def test_16_bit_images_are_converted_in_strips(monkeypatch):
    values = np.arange(2000 * 1500).astype("<u2").reshape(1500, 2000)
    data = image_file(Image.frombytes("I;16", (2000, 1500), values.tobytes()), "PNG", compress_level=0)
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
    jpeg, png = image_file(large, "JPEG", exif=exif, quality=95), image_file(large, "PNG", exif=exif)
    seen, cut = [], images.tile_image
    monkeypatch.setattr(images, "tile_image", lambda image, *others: (seen.append(image.size), cut(image, *others))[1])
    place = tile_layout(image_size(jpeg), config)
    want = read_tiles(jpeg, place, config).astype(int)
    monkeypatch.setattr(images, "FULL_PIXELS", 801 * 600 - 1)
    got = read_tiles(jpeg, place, config)
    read_tiles(png, place, config)
    assert seen == [(600, 801), (300, 401), (600, 801)]
    assert np.abs(got - want).max() <= 3
    assert open_image(jpeg).size == image_size(jpeg) == (600, 801)


def test_webp_has_a_limit_of_its_own(scene, monkeypatch):
    monkeypatch.setattr(images, "FULL_PIXELS", 1000)
    with pytest.raises(InputError, match="40x30 is more than 1,000 pixels"):
        open_image(image_file(scene, "WEBP"))
    open_image(image_file(scene, "PNG"))


def test_a_jpeg_of_empty_scans_is_not_decoded():
    """Thirty bytes each, and a pass over all pixels."""
    data = image_file(Image.new("L", (64, 64)), "JPEG", progressive=True)
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
    data = image_file(scene.resize((300, 200)), "JPEG", progressive=progressive, comment=b"\xff\xda" * 999)
    (tmp_path / "film.jpg").write_bytes(data + b"\xff\xda\x00" * 999)
    assert open_image(tmp_path / "film.jpg") == open_image(data)
