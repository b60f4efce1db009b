"""Images of every kind against what Pillow and NumPy put into them."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps

from lpovod.exceptions import LpovodError
from lpovod.formats.images import ImageFault, read_header, read_image

WIDTH, HEIGHT = 7, 5


def colours(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)


def greys(kind: type = np.uint16, top: int = 1 << 16) -> np.ndarray:
    return np.random.default_rng(1).integers(0, top, (HEIGHT, WIDTH)).astype(kind)


def read(path: Path, size: tuple[int, int] = (WIDTH, HEIGHT)) -> np.ndarray:
    pixels = read_image(path, size)
    assert pixels.dtype == np.uint8 and pixels.flags.writeable and pixels.flags.c_contiguous
    return pixels


def grey_rgb(grey: np.ndarray) -> np.ndarray:
    return np.stack([grey] * 3, axis=2)


def png_16_bit(path: Path, pixels: np.ndarray, colour_type: int) -> Path:
    """A PNG of 16 bits per channel, (h, w, channels) uint16, which Pillow cannot write."""

    def chunk(name: bytes, data: bytes) -> bytes:
        checked = name + data
        return struct.pack(">I", len(data)) + checked + struct.pack(">I", zlib.crc32(checked))

    height, width = pixels.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )
    return path


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.pgm"])
def test_16_bits_keep_their_upper_8(tmp_path, name):
    grey = greys()
    Image.fromarray(grey).save(tmp_path / name)
    assert read_header(tmp_path / name).bits == 16
    assert np.array_equal(read(tmp_path / name), grey_rgb(grey // 256))


def test_8_bits_written_as_16_come_back(tmp_path):
    """White is white and every grey is itself: the usual way from 8 to 16 bits is times 257."""
    grey = np.arange(256, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(grey * 257).save(tmp_path / "a.png")
    assert np.array_equal(read(tmp_path / "a.png", (16, 16)), grey_rgb(grey))


def test_16_bit_tiff_of_the_other_byte_order(tmp_path):
    grey = greys()
    image = Image.frombytes("I;16B", (WIDTH, HEIGHT), grey.astype(">u2").tobytes())
    image.save(tmp_path / "a.tif")
    assert np.array_equal(read(tmp_path / "a.tif"), grey_rgb(grey // 256))


@pytest.mark.parametrize(("channels", "colour_type"), [(2, 4), (3, 2), (4, 6)])
def test_16_bit_colours_are_read_alike(tmp_path, channels, colour_type):
    pixels = np.random.default_rng(2).integers(0, 1 << 16, (HEIGHT, WIDTH, channels), np.uint16)
    path = png_16_bit(tmp_path / "a.png", pixels, colour_type)
    expected = np.repeat(pixels[..., :1], 3, axis=2) if channels == 2 else pixels[..., :3]
    assert np.array_equal(read(path), expected // 256)


def test_12_bits_packed_in_a_tiff(tmp_path):
    grey = np.array([[0, 0x123, 0xFFF, 0x800]], np.uint16)
    bits = "".join(f"{value:012b}" for value in grey[0])
    data = int(bits, 2).to_bytes(6, "big")
    entries = [(256, 3, 4), (257, 3, 1), (258, 3, 12), (259, 3, 1), (262, 3, 1), (273, 4, 8)]
    entries += [(277, 3, 1), (278, 3, 1), (279, 4, 6)]
    directory = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in entries)
    head = b"II*\0" + struct.pack("<I", 14) + data + struct.pack("<H", len(entries))
    (tmp_path / "a.tif").write_bytes(head + directory + bytes(4))
    assert np.array_equal(read(tmp_path / "a.tif", (4, 1)), grey_rgb(grey >> 4))


@pytest.mark.parametrize(
    ("name", "pixels", "reason"),
    [
        ("a.tif", greys(np.int32, 1 << 20), "32-bit integers"),
        ("a.tif", greys(np.float32), "floating-point"),
        ("a.pfm", greys(np.float32), "floating-point"),
    ],
)
def test_an_unknown_range_is_refused(tmp_path, name, pixels, reason):
    Image.fromarray(pixels).save(tmp_path / name)
    for attempt in (lambda p: read_image(p, (WIDTH, HEIGHT)), read_header):
        with pytest.raises(ImageFault, match=f"{name} .*{reason}.*expected. Convert") as error:
            attempt(tmp_path / name)
        assert error.value.kind == "depth"


def test_a_16_bit_negative_is_refused(tmp_path):
    Image.fromarray(greys()).save(tmp_path / "a.tif", tiffinfo={262: 0})
    content = (tmp_path / "a.tif").read_bytes()
    entry = struct.pack("<HHI", 262, 3, 1)
    assert content.count(entry) == 1
    content = content.replace(entry + struct.pack("<I", 1), entry + struct.pack("<I", 0))
    (tmp_path / "a.tif").write_bytes(content)
    with pytest.raises(ImageFault, match="16 bits where white is zero"):
        read_header(tmp_path / "a.tif")


def test_alpha_is_dropped(tmp_path):
    rgb, alpha = colours(), np.random.default_rng(3).integers(0, 256, (HEIGHT, WIDTH, 1), np.uint8)
    rgba, la = np.concatenate([rgb, alpha], axis=2), np.concatenate([rgb[..., :1], alpha], axis=2)
    Image.fromarray(rgba).save(tmp_path / "rgba.png")
    Image.fromarray(la).save(tmp_path / "la.png")
    Image.fromarray(rgb).save(tmp_path / "key.png", transparency=tuple(map(int, rgb[0, 0])))
    assert np.array_equal(read(tmp_path / "rgba.png"), rgb)
    assert np.array_equal(read(tmp_path / "la.png"), grey_rgb(rgb[..., 0]))
    assert np.array_equal(read(tmp_path / "key.png"), rgb)
    assert all(read_header(path).alpha for path in tmp_path.iterdir())


@pytest.mark.parametrize("transparency", [None, 3, bytes([0, 128, 255, 7])])
@pytest.mark.filterwarnings("error")
def test_palettes(tmp_path, transparency):
    palette = colours()[0, :4]
    index = np.random.default_rng(4).integers(0, 4, (HEIGHT, WIDTH), np.uint8)
    image = Image.fromarray(index, "P")
    image.putpalette(palette.tobytes())
    extra = {} if transparency is None else {"transparency": transparency}
    image.save(tmp_path / "a.png", **extra)
    assert np.array_equal(read(tmp_path / "a.png"), palette[index])
    assert read_header(tmp_path / "a.png").alpha == (transparency is not None)


def test_black_and_white(tmp_path):
    bits = greys(np.uint8, 2).astype(bool)
    Image.fromarray(bits).save(tmp_path / "a.png")
    assert np.array_equal(read(tmp_path / "a.png"), grey_rgb(bits * np.uint8(255)))


def test_cmyk_as_pillow_converts_it(tmp_path):
    Image.fromarray(colours()).convert("CMYK").save(tmp_path / "a.jpg")
    with Image.open(tmp_path / "a.jpg") as file:
        assert file.mode == "CMYK"
        expected = np.asarray(file.convert("RGB"))
    assert np.array_equal(read(tmp_path / "a.jpg"), expected)


def with_orientation(path: Path, orientation: int, size: tuple[int, int], **options) -> np.ndarray:
    """Write an image whose EXIF data turn it; return its stored pixels."""
    pixels = np.random.default_rng(5).integers(0, 256, (size[1], size[0], 3), np.uint8)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    Image.fromarray(pixels).save(path, exif=exif, **options)
    if path.suffix == ".jpg":  # its compression changed them
        content = path.read_bytes()
        start = content.index(b"\xff\xe1")
        length = int.from_bytes(content[start + 2 : start + 4], "big")
        plain = content[:start] + content[start + 2 + length :]
        pixels = np.asarray(Image.open(io.BytesIO(plain)).convert("RGB"))
    return pixels


FORMATS = [
    ("a.jpg", {}),
    ("a.png", {}),
    ("a.webp", {"lossless": True}),
    ("a.tif", {}),
    ("a.tif", {"compression": "tiff_lzw"}),
]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(("name", "options"), FORMATS)
def test_boxes_are_in_displayed_pixels(tmp_path, name, options, orientation):
    stored = with_orientation(tmp_path / name, orientation, (WIDTH, HEIGHT), **options)
    with Image.open(tmp_path / name) as file:
        displayed = np.asarray(ImageOps.exif_transpose(file))
    size = displayed.shape[1::-1]
    assert read_header(tmp_path / name).displayed == size
    assert np.array_equal(read(tmp_path / name, size), displayed)
    if orientation < 5:  # the size does not say which is meant
        assert size == (WIDTH, HEIGHT)
        return
    assert not read_header(tmp_path / name).read_as_stored(size)
    assert read_header(tmp_path / name).read_as_stored((WIDTH, HEIGHT))
    assert np.array_equal(read(tmp_path / name, (WIDTH, HEIGHT)), stored)


def test_a_square_image_is_turned(tmp_path):
    stored = with_orientation(tmp_path / "a.png", 6, (4, 4))
    assert np.array_equal(read(tmp_path / "a.png", (4, 4)), np.rot90(stored, -1))


def test_an_orientation_that_does_not_exist_turns_nothing(tmp_path):
    for orientation in (0, 9):
        stored = with_orientation(tmp_path / "a.png", orientation, (WIDTH, HEIGHT))
        assert np.array_equal(read(tmp_path / "a.png"), stored)


def test_damaged_exif_data_turn_nothing(tmp_path):
    Image.fromarray(colours()).save(tmp_path / "a.png", exif=b"Exif\0\0MM\0*\0\0")
    assert np.array_equal(read(tmp_path / "a.png"), colours())


@pytest.mark.parametrize(
    ("size", "kind", "message"),
    [
        ((WIDTH + 1, HEIGHT), "size", "is 7 x 5 pixels, the json states 8 x 5. Correct the json"),
        ((HEIGHT, WIDTH), "swapped", "is 7 x 5 pixels, the json states 5 x 7. Exchange width"),
    ],
)
def test_another_size_is_refused(tmp_path, size, kind, message):
    Image.fromarray(colours()).save(tmp_path / "a.png")
    with pytest.raises(ImageFault, match=message) as error:
        read_image(tmp_path / "a.png", size)
    assert error.value.kind == kind


def test_both_sizes_of_a_turned_image_are_named(tmp_path):
    with_orientation(tmp_path / "a.jpg", 6, (WIDTH, HEIGHT))
    message = r"is 5 x 7 pixels \(7 x 5 before it is turned .*\), the json states 9 x 9"
    with pytest.raises(ImageFault, match=message):
        read_image(tmp_path / "a.jpg", (9, 9))


def test_faulty_files_are_named(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    Image.fromarray(colours()).save(path)
    content = path.read_bytes()
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "empty.png").touch()
    (tmp_path / "page.png").write_text("<html>not found</html>")
    (tmp_path / "start.png").write_bytes(content[:20])
    (tmp_path / "half.png").write_bytes(content[: len(content) // 2])
    for name, kind, message in (
        ("none.png", "missing", "none.png: no such file"),
        ("folder.png", "not_an_image", "folder.png cannot be decoded .*directory"),
        ("empty.png", "not_an_image", "empty.png cannot be decoded .it is empty"),
        ("page.png", "not_an_image", "page.png cannot be decoded .no image format"),
        ("start.png", "not_an_image", "start.png cannot be decoded"),
        ("half.png", "damaged", "half.png cannot be decoded .*Replace the file"),
    ):
        with pytest.raises(LpovodError, match=message) as error:
            read_image(tmp_path / name, (WIDTH, HEIGHT))
        assert error.value.kind == kind
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(ImageFault, match="million pixels. Divide it into tiles"):
        read_image(path, (WIDTH, HEIGHT))


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.gif", "a.bmp", "a.tif"])
def test_a_file_that_lacks_its_end_looks_incomplete(tmp_path, name):
    pixels = np.random.default_rng(6).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / name)
    assert read_header(tmp_path / name).complete
    content = (tmp_path / name).read_bytes()
    if name == "a.tif":  # Pillow puts the directory in front of the pixels
        assert content.index(pixels.tobytes()[:64]) > int.from_bytes(content[4:8], "little")
    (tmp_path / name).write_bytes(content[:-100])
    assert not read_header(tmp_path / name).complete
