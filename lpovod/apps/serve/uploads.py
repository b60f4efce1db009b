"""Images that a browser sends: what is accepted, and how it is read."""

import io
import tempfile
from pathlib import Path, PureWindowsPath

import numpy as np
from PIL import Image, UnidentifiedImageError

from lpovod.exceptions import LpovodError
from lpovod.formats.images import ImageFault, read_header, read_image

MAX_BYTES = 32 << 20
MAX_PIXELS = 50_000_000
SHOWN = 2048
"""Longest side, in pixels, of an image as the page shows it."""

FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM", "JPEG2000")
"""Pillow reads more, some with the help of other programs."""


def file_name(name: str) -> str:
    """The last part of a file's name, printable and at most 100 letters."""
    last = PureWindowsPath(name).name
    return "".join(letter for letter in last if letter.isprintable())[-100:] or "image"


def read_upload(content: bytes, name: str) -> np.ndarray:
    """Decode an image as every stage does.

    Args:
        content: of the file.
        name: of the file, for messages.

    Returns:
        (height, width, 3) uint8 RGB, turned as a viewer shows it.

    Raises:
        LpovodError: if it is no image, damaged or too large.
    """
    _check_format(content, name)
    with tempfile.NamedTemporaryFile(prefix="lpovod-") as file:
        file.write(content)
        file.flush()
        path = Path(file.name)
        try:
            width, height = read_header(path).displayed
            if width * height > MAX_PIXELS:
                raise LpovodError(
                    f"{name} is {width} x {height} pixels; at most {MAX_PIXELS // 1_000_000} "
                    "million are read. Make it smaller, or divide it into tiles"
                )
            return read_image(path)
        except ImageFault as error:
            raise LpovodError(error.fault.replace(file.name, name)) from None


def _check_format(content: bytes, name: str) -> None:
    Image.init()
    try:
        Image.open(io.BytesIO(content), formats=[f for f in FORMATS if f in Image.OPEN]).close()
    except UnidentifiedImageError:
        raise LpovodError(f"{name} is not an image that can be read (JPEG, PNG, WebP …)") from None
    except Image.DecompressionBombError:
        most = MAX_PIXELS // 1_000_000
        raise LpovodError(f"{name} has far more than {most} million pixels") from None
    except Exception as error:  # Pillow's readers raise whatever comes
        raise LpovodError(f"{name} cannot be decoded ({error})") from None


def as_jpeg(image: Image.Image, longest: int, quality: int = 90) -> bytes:
    """An image as a JPEG file, shrunk to `longest` pixels if it is larger."""
    image = image.copy()
    image.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=quality)
    return stream.getvalue()
