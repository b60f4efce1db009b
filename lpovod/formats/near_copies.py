"""Groups of images that are copies of one another: rescaled, compressed again or re-encoded.

Two images are near-copies if their difference hashes differ in few bits and their thumbnails in few
grey levels. The hash alone would join images that are mostly of one colour.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from lpovod.progress import progress

SIDE = 8  # of the grid whose neighbours are compared; the hash has a bit for each cell
THUMBNAIL = 16
LARGEST_DISTANCE = 10  # of 64 bits
LARGEST_DIFFERENCE = 4.0  # of 255 grey levels, on average


def groups(paths: list[Path]) -> list[list[int]]:
    """Group images by content.

    Args:
        paths: image files.

    Returns:
        Places in the list, each in one group; in the order of their first images. An image that
        cannot be decoded is alone.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        marks = list(progress(pool.map(_marks, paths), "comparing images", "image", len(paths)))
    known = [place for place, mark in enumerate(marks) if mark is not None]
    hashes = np.array([mark[0] for mark in marks if mark is not None], np.uint64)
    thumbnails = np.stack([mark[1] for mark in marks if mark is not None]) if known else None
    heads = list(range(len(paths)))

    def head(place: int) -> int:
        while heads[place] != place:
            heads[place] = place = heads[heads[place]]
        return place

    for row, place in enumerate(known):
        assert thumbnails is not None
        near = np.flatnonzero(np.bitwise_count(hashes[row + 1 :] ^ hashes[row]) <= LARGEST_DISTANCE)
        difference = np.abs(thumbnails[near + row + 1] - thumbnails[row]).mean(axis=(1, 2, 3))
        for other in near[difference <= LARGEST_DIFFERENCE] + row + 1:
            first, second = sorted((head(place), head(known[int(other)])))
            heads[second] = first
    members: dict[int, list[int]] = {}
    for place in range(len(paths)):
        members.setdefault(head(place), []).append(place)
    return list(members.values())


def _marks(path: Path) -> tuple[np.uint64, np.ndarray] | None:
    """Difference hash and colour thumbnail, (16, 16, 3) float32, of an image as displayed."""
    try:
        with Image.open(path) as file:
            # JPEG is decoded at an eighth of its size where that is enough.
            file.draft("RGB", (8 * THUMBNAIL, 8 * THUMBNAIL))
            image = ImageOps.exif_transpose(file).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    grid = image.convert("L").resize((SIDE + 1, SIDE), Image.Resampling.BOX)
    cells = np.asarray(grid, np.int16)
    bits = np.packbits(cells[:, 1:] > cells[:, :-1])
    thumbnail = image.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
    return bits.view(np.uint64)[0], np.asarray(thumbnail, np.float32)
