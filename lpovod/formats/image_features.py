"""Region features of single images: a folder with a safetensors file for each image.

A file holds ``box`` (n, 4) and ``objectness`` (n,) float32, ``feature`` (n, dimension) and
``embedding`` (n, D) float16, and ``refined`` (n, 4) float32. One file per image, so that images can
be kept, shared and left out one by one; the bytes of a file do not depend on the others.
"""

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from lpovod.artifacts import Identity, atomic, read_tensors
from lpovod.exceptions import LpovodError

STAGE = "region_features"


def paths_in(folders: Iterable[Path]) -> dict[int, Path]:
    """The files in the folders that together hold all images, by image id."""
    return {
        int(path.stem): path
        for folder in folders
        for path in sorted(Path(folder).glob("*.safetensors"))
    }


class ImageFeatures:
    """Reads the features of images.

    Args:
        paths: file of each image.

    Raises:
        LpovodError: if there is no file, or a folder holds images of another detector.
    """

    def __init__(self, paths: dict[int, Path]):
        self._paths = paths
        if not self._paths:
            raise LpovodError("there are no region features of retrieved images")
        firsts = {path.parent: path for path in reversed(self._paths.values())}
        detectors = {self._identity(path)["inputs"]["detector"] for path in firsts.values()}
        if len(detectors) > 1:
            raise LpovodError(
                f"{' and '.join(map(str, firsts))} come from different detectors. Make them "
                "again: snakemake --forcerun retrieved_region_features"
            )
        (self.detector,) = detectors

    @property
    def image_ids(self) -> list[int]:
        """Ids of the images."""
        return list(self._paths)

    def read(self, image_id: int) -> dict[str, np.ndarray]:
        """The arrays of an image.

        Raises:
            LpovodError: if the image is absent, or was seen by another detector.
        """
        if image_id not in self._paths:
            raise LpovodError(
                f"image {image_id} has pseudo-labels and no features. Make them again: snakemake "
                "--forcerun retrieved_region_features"
            )
        path = self._paths[image_id]
        arrays, ident = read_tensors(path, STAGE)
        if ident["inputs"]["detector"] != self.detector or ident["image_id"] != image_id:
            raise LpovodError(f"{path} holds another image, or comes from another detector")
        return arrays

    def _identity(self, path: Path) -> Identity:
        return read_tensors(path, STAGE)[1]


def link_images(paths: dict[int, Path], folder: Path) -> None:
    """Make a folder of images from files that are kept elsewhere, without copying where possible.

    Args:
        paths: file of each image.
        folder: to make; images already there are replaced or, if they are none of these, removed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.safetensors"):
        old.unlink()
    for image_id, path in paths.items():
        target = folder / f"{image_id}.safetensors"
        try:
            os.link(path, target)
        except FileNotFoundError:
            raise LpovodError(
                f"{path} was deleted while this job ran. Run the same command again"
            ) from None
        except OSError:  # another file system, or one without hard links
            with atomic(target) as partial:
                shutil.copyfile(path, partial)
