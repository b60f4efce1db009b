"""Image files: pixels as people see them, whatever bit depth, palette or orientation a file has.

* 8 bits: Pillow's ``convert("RGB")``, as CLIP's preprocessing and the tools of COCO do. Alpha is
  dropped, so a transparent pixel has the colour that is stored for it.
* 16 bits: the upper 8 bits, as Pillow itself reads 16-bit colour and OpenCV reads everything.
* Other integers and floating-point numbers are refused: their range is unknown.
* EXIF orientation: the image is turned as a viewer shows it, so boxes are in displayed pixels,
  unless width and height are stated as stored, before turning; then it is read as stored.
* Several frames: the first.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from lpovod.exceptions import LpovodError

Size = tuple[int, int]
"""Width and height."""

FaultKind = Literal["missing", "not_an_image", "damaged", "depth", "too_large", "size", "swapped"]
WITH_ALPHA = frozenset({"LA", "PA", "RGBA", "RGBa"})
EIGHT_BITS = WITH_ALPHA | {"1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "LAB"}
REFUSED = {"I": "signed or 32-bit integers", "F": "floating-point numbers"}
TURNS = {
    1: (False, ()),
    2: (False, (1,)),
    3: (False, (0, 1)),
    4: (False, (0,)),
    5: (True, ()),
    6: (True, (1,)),
    7: (True, (0, 1)),
    8: (True, (0,)),
}
"""By EXIF orientation: whether rows and columns are exchanged, and the axes flipped after that."""

TIFF_WIDTH, TIFF_HEIGHT, TIFF_BITS, TIFF_PHOTOMETRIC = 256, 257, 258, 262
TIFF_OFFSETS, TIFF_LENGTHS = (273, 324), (279, 325)  # of strips, of tiles


class ImageFault(LpovodError):
    """An image that is not read: the kind of its fault, and the fault without its remedy."""

    def __init__(self, kind: FaultKind, fault: str, remedy: str = "") -> None:
        super().__init__(f"{fault}. {remedy}" if remedy else fault)
        self.kind = kind
        self.fault = fault


@dataclass(frozen=True)
class Header:
    """What an image file says before its pixels.

    Attributes:
        path: the file.
        stored: size of the pixels as stored.
        orientation: EXIF's, 1 to 8.
        bits: per channel, 8 or 16; 12 for a packed TIFF.
        alpha: whether pixels have a transparency, which is dropped.
        complete: False if the file visibly lacks its end: it may still be decoded.
    """

    path: Path
    stored: Size
    orientation: int
    bits: int
    alpha: bool
    complete: bool

    @property
    def displayed(self) -> Size:
        """Size after turning as EXIF says."""
        width, height = self.stored
        return (height, width) if TURNS[self.orientation][0] else (width, height)

    def read_as_stored(self, size: Size) -> bool:
        """Whether a stated size is that of the stored pixels, and not of the displayed ones.

        Where both are equal, the displayed pixels are meant.

        Raises:
            ImageFault: if it is neither.
        """
        if size == self.displayed:
            return False
        if size == self.stored:
            return True
        sizes = f"{self.path} is {_by(self.displayed)} pixels"
        if self.displayed != self.stored:
            sizes += f" ({_by(self.stored)} before it is turned as its EXIF orientation says)"
        if size[::-1] == self.displayed:
            remedy = "Exchange width and height in the json"
            raise ImageFault("swapped", f"{sizes}, the json states {_by(size)}", remedy)
        remedy = "Correct the json, or take the image that was annotated"
        raise ImageFault("size", f"{sizes}, the json states {_by(size)}", remedy)


def read_image(path: Path, size: Size | None = None) -> np.ndarray:
    """Decode an image.

    Args:
        path: the file.
        size: width and height as annotated; None for those of the displayed pixels.

    Returns:
        (height, width, 3) uint8 RGB; grey images have equal channels.

    Raises:
        ImageFault: if the file is missing or damaged, has another size, or pixels of unknown range.
    """
    with _opened(path) as file:
        header = _header(path, file)
        as_stored = size is not None and header.read_as_stored(size)
        try:
            pixels = _rgb(file, header.bits)
        except MemoryError:
            raise
        except Exception as error:  # Pillow's readers raise whatever comes: SyntaxError, EOFError …
            fault = f"{path} cannot be decoded ({error})"
            raise ImageFault("damaged", fault, _REPLACE) from None
        turned = file.format == "TIFF"  # Pillow turns TIFF files itself
    if turned == as_stored:
        pixels = (_turn_back if as_stored else _turn)(pixels, header.orientation)
    return np.array(pixels, order="C")


def read_header(path: Path) -> Header:
    """Read what a file says about its image, without decoding it.

    Raises:
        ImageFault: if the file is missing, no image, too large, or has pixels of unknown range.
    """
    with _opened(path) as file:
        return _header(path, file)


_REPLACE = "Replace the file, or leave it out with dataset.bad_images: skip"


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    try:
        file = Image.open(path)
    except FileNotFoundError:
        raise ImageFault("missing", f"{path}: no such file") from None
    except Image.DecompressionBombError:
        largest = 2 * (Image.MAX_IMAGE_PIXELS or 0) // 1_000_000
        fault = f"{path} has more than {largest} million pixels"
        raise ImageFault("too_large", fault, "Divide it into tiles") from None
    except MemoryError:
        raise
    except Exception as error:  # Pillow's readers raise whatever comes: SyntaxError, zlib.error …
        reason = str(error)
        if isinstance(error, UnidentifiedImageError):
            reason = "no image format known to Pillow" if path.stat().st_size else "it is empty"
        fault = f"{path} cannot be decoded ({reason})"
        raise ImageFault("not_an_image", fault, _REPLACE) from None
    with file:
        yield file


def _header(path: Path, file: Image.Image) -> Header:
    tags = getattr(file, "tag_v2", {}) if file.format == "TIFF" else {}
    bits = _bits(path, file, tags)
    stored = (tags[TIFF_WIDTH], tags[TIFF_HEIGHT]) if tags else file.size
    alpha = file.mode in WITH_ALPHA or "transparency" in file.info
    return Header(path, stored, _orientation(file), bits, alpha, _complete(path, file.format, tags))


def _bits(path: Path, file: Image.Image, tags: dict) -> int:
    # Netpbm's integers are scaled to 16 bits; before version 11.3, so were PNG's.
    sixteen = file.mode.startswith("I;16") or file.mode == "I" and file.format in ("PNG", "PPM")
    if sixteen and tags.get(TIFF_PHOTOMETRIC) != 0:
        return tags[TIFF_BITS][0] if tags else 16
    if file.mode in EIGHT_BITS:
        return 8
    pixels = "16 bits where white is zero" if sixteen else REFUSED.get(file.mode, file.mode)
    raise ImageFault(
        "depth",
        f"{path} has pixels of an unknown range ({pixels}); 8 or 16 bits per channel are expected",
        "Convert it to one of these",
    )


def _orientation(file: Image.Image) -> int:
    try:
        # PNG's own method would decode the image to look for EXIF data behind the pixels, where
        # browsers do not look either.
        orientation = Image.Image.getexif(file).get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged EXIF data, which viewers ignore
        return 1
    return orientation if orientation in TURNS else 1


def _complete(path: Path, file_format: str | None, tags: dict) -> bool:
    # A shortened WebP or AVIF cannot even be opened.
    with open(path, "rb") as stream:
        start = stream.read(8)
        length = stream.seek(0, os.SEEK_END)
        stream.seek(max(0, length - 12))
        ending = stream.read()
    if file_format in ("JPEG", "MPO"):
        return ending.endswith(b"\xff\xd9")
    if file_format == "PNG":
        return ending[4:8] == b"IEND"
    if file_format == "GIF":
        return ending.endswith(b";")
    if file_format == "BMP":
        return length >= int.from_bytes(start[2:6], "little")
    ends = [
        offset + size
        for offsets, lengths in zip(TIFF_OFFSETS, TIFF_LENGTHS, strict=True)
        for offset, size in zip(tags.get(offsets, ()), tags.get(lengths, ()), strict=False)
    ]
    return length >= max(ends, default=0)


def _rgb(file: Image.Image, bits: int) -> np.ndarray:
    if bits > 8:
        grey = (np.asarray(file) >> (bits - 8)).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    # Loading may find a transparency; converting would warn that a palette's is lost.
    file.load()
    file.info.pop("transparency", None)
    return np.asarray(file.convert("RGB"))


def _turn(stored: np.ndarray, orientation: int) -> np.ndarray:
    exchanged, axes = TURNS[orientation]
    return np.flip(stored.swapaxes(0, 1) if exchanged else stored, axes)


def _turn_back(displayed: np.ndarray, orientation: int) -> np.ndarray:
    exchanged, axes = TURNS[orientation]
    stored = np.flip(displayed, axes)
    return stored.swapaxes(0, 1) if exchanged else stored


def _by(size: Size) -> str:
    return f"{size[0]} x {size[1]}"
