"""`lpovod detect`: a trained model on images, folders of images and data sets."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from lpovod.apps.export import model_path
from lpovod.artifacts import write_json
from lpovod.devices import own_device, usable_cores
from lpovod.drawing import draw_detections
from lpovod.exceptions import LpovodError, UsageError
from lpovod.formats.coco import read_dataset
from lpovod.formats.images import ImageFault, read_image
from lpovod.formats.labels import SUFFIXES, Box, LabelledImage
from lpovod.formats.yolo import write_yolo
from lpovod.model import Detections, Model, Source, alike, load
from lpovod.progress import log, progress
from lpovod.views import leave_signals

DRAWN_WIDTH = 800  # smallest width of a drawn image in pixels
DRAWN_ABOVE = 0.3  # the low threshold that AP wants fills a picture with boxes
LOADING = 8  # processes that decode images beside a GPU, at most
WAITING = 4  # batches of decoded images that wait for others of their shape, at most


@dataclass(frozen=True)
class Named:
    """An image to detect in.

    Attributes:
        image_id: in COCO's results.
        name: its path below the folder that holds all images.
        path: of the file.
        size: width and height as a json states them; None for those of the displayed pixels.
    """

    image_id: int
    name: str
    path: Path
    size: tuple[int, int] | None = None


def detect(
    sources: Annotated[tuple[str, ...], tyro.conf.Positional],
    run: Path | None = None,
    model: Path | None = None,
    classes: tuple[str, ...] = (),
    threshold: float | None = None,
    output: Path = Path("detections"),
    draw: bool = False,
    yolo: bool = False,
    device: str | None = None,
    batch_size: int | None = None,
) -> None:
    """Detect objects in images, with the code that the run's evaluation measured.

    Writes detections.json: COCO's results, with the class name and the file name beside the ids.
    Images are turned as their EXIF orientation says, as a viewer shows them.

    Args:
        sources: images, folders, globs, text files with a path per line, and COCO's jsons
        run: folder of a finished run: results/mini
        model: a model file, in place of a run
        classes: names to detect, by default all that the model knows; other words are scored by the
            CLIP head alone
        threshold: lowest score, 0 to 1; by default the run's
        output: folder of detections.json, drawn/ and yolo/
        draw: also draw the detections: those above 0.3, unless --threshold says otherwise
        yolo: also write YOLO's data.yaml, and a text file for each image with detections
        device: cpu or cuda; by default the GPU if there is one
        batch_size: images per pass; by default 1 on a CPU, 8 on a GPU
    """
    if not sources:
        raise UsageError("name something to detect in: lpovod detect photograph.jpg --run ...")
    if threshold is not None and not 0 <= threshold <= 1:
        raise UsageError(f"--threshold {threshold}: expected a number from 0 to 1")
    if batch_size is not None and batch_size < 1:
        raise UsageError(f"--batch-size {batch_size}: expected at least 1")
    images = list_images(sources)
    loaded = load(model_path(run, model), own_device(device))
    if added := loaded.add_names(classes):
        log.info(
            f"{', '.join(added)}: no linear probe; scored by the CLIP head alone. `lpovod learn` "
            "adds a class"
        )
    drawn_above = (DRAWN_ABOVE if threshold is None else threshold) if draw else None
    writer = _Writer(loaded, output, drawn_above)
    with progress(None, "detections", "image", len(images)) as bar:
        readable = _readable(images, loaded.device, bar)
        for image, pixels, found in _detect_all(readable, loaded, classes, threshold, batch_size):
            writer.add(image, found, pixels)
            bar.update(1)
    written = [writer.written[i.image_id] for i in images if i.image_id in writer.written]
    results = [entry for entries, _ in written for entry in entries]
    write_json(output / "detections.json", results)
    if yolo:
        (output / "yolo").mkdir(exist_ok=True)
        write_yolo(output / "yolo", loaded.vocabulary, [labelled for _, labelled in written])
    log.info(f"{len(results)} detections in {len(written)} images: {output}")
    if len(written) < len(images):
        raise LpovodError(f"{len(images) - len(written)} of {len(images)} images could not be read")


def list_images(sources: Iterable[str]) -> list[Named]:
    """The images that sources name; ids of a json's images are the json's, others count from 1.

    Raises:
        LpovodError: if a source does not exist or holds no image.
        UsageError: if a json is not the only source, because its ids could be those of others.
    """
    sources = list(sources)
    if jsons := [source for source in sources if source.endswith(".json")]:
        if len(sources) > 1:
            raise UsageError(f"{jsons[0]} has image ids of its own: detect in it alone")
        return _of_json(Path(jsons[0]))
    files = list(dict.fromkeys(file for source in sources for file in _files(source)))
    return [
        Named(number, *named)
        for number, named in enumerate(zip(_names(files), files, strict=True), 1)
    ]


def _names(files: list[Path]) -> list[str]:
    """Paths below the folder that holds all files; so a drawing never lands on its original."""
    absolute = [os.path.abspath(file) for file in files]
    folder = os.path.commonpath([os.path.dirname(path) for path in absolute])
    return [os.path.relpath(path, folder) for path in absolute]


def _of_json(path: Path) -> list[Named]:
    data = read_dataset(path)
    if not data.images:
        raise LpovodError(f"{path} lists no image")
    files = [data.image_path(i) for i in data.images]
    return [
        Named(i, name, file, (stated["width"], stated["height"]))
        for (i, stated), name, file in zip(data.images.items(), _names(files), files, strict=True)
    ]


def _files(source: str) -> list[Path]:
    path = Path(source)
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES)
    elif path.suffix == ".txt" and path.is_file():
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError:
            raise LpovodError(f"{path} is no text in UTF-8, with a path on each line") from None
        files = [path.parent / line.strip() for line in lines if line.strip()]
    elif path.is_file():
        files = [path]
    else:
        files = sorted(map(Path, glob(source, recursive=True)))
    if not files:
        kind = "no image in this folder" if path.is_dir() else "no such image, folder or glob"
        raise LpovodError(f"{source}: {kind}")
    return files


class _Reading(Dataset):
    """Each image with its pixels, or with the fault of its file."""

    def __init__(self, images: list[Named]):
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, place: int) -> tuple[Named, Tensor | str]:
        image = self._images[place]
        try:
            return image, torch.from_numpy(read_image(image.path, image.size))
        except ImageFault as error:
            return image, error.fault  # without its remedy, which is one for the workflow's data


def _readable(images: list[Named], device: str, bar: tqdm) -> Iterator[tuple[Named, np.ndarray]]:
    """The images that can be read, in order, with their pixels; the others are named.

    Beside a GPU, processes of their own decode, and what they decoded is sent from pinned memory.
    """
    loader = DataLoader(
        _Reading(images),
        batch_size=None,
        num_workers=0 if device == "cpu" else min(LOADING, usable_cores() - 1, len(images) - 1),
        worker_init_fn=leave_signals,
        pin_memory=torch.device(device).type == "cuda",
    )
    for image, read in loader:
        if isinstance(read, str):
            log.warning(f"skipped: {read}")
            bar.update(1)
        else:
            yield image, read.numpy()


def _detect_all(
    readable: Iterable[tuple[Named, np.ndarray]],
    model: Model,
    classes: tuple[str, ...],
    threshold: float | None,
    batch_size: int | None,
) -> Iterator[tuple[Named, np.ndarray, Detections]]:
    """Each image with its pixels and its detections, as batches of one shape become full."""
    size = batch_size or model.batch_size

    def shape_of(item: tuple[Named, np.ndarray]) -> tuple[int, int]:
        height, width = item[1].shape[:2]
        return model.batch_shape((height, width))

    for together in alike(readable, shape_of, size, WAITING * size):
        shown: list[Source] = [pixels for _, pixels in together]
        detected = model.detect(shown, threshold, classes or None, size)
        for (image, pixels), found in zip(together, detected, strict=True):
            yield image, pixels, found


class _Writer:
    """Draws each image, and keeps what is written of all.

    Attributes:
        written: by image id, COCO's results, and what YOLO's text file says.
    """

    def __init__(self, model: Model, output: Path, drawn_above: float | None):
        self._output, self._drawn_above = output, drawn_above
        self._base = set(model.content.of_split("base"))
        self.written: dict[int, tuple[list[dict[str, Any]], LabelledImage]] = {}

    def add(self, image: Named, found: Detections, pixels: np.ndarray) -> None:
        """Add an image's detections, and draw them."""
        entries = [e | {"file_name": image.name} for e in found.to_coco(image.image_id)]
        corners = [tuple(box) for box in found.xyxy.tolist()]
        boxes = [
            Box(name, corner, score=score)
            for name, corner, score in zip(
                found.class_name, corners, found.confidence.tolist(), strict=True
            )
        ]
        height, width = pixels.shape[:2]
        labelled = LabelledImage(Path(image.name), width, height, boxes)
        self.written[image.image_id] = entries, labelled
        if self._drawn_above is not None:
            self._draw(image, found.above(self._drawn_above), pixels)

    def _draw(self, image: Named, found: Detections, pixels: np.ndarray) -> None:
        labels = [
            f"{name} {score:.2f}"
            for name, score in zip(found.class_name, found.confidence.tolist(), strict=True)
        ]
        novel = [name not in self._base for name in found.class_name]
        boxes = [entry["bbox"] for entry in found.to_coco()]
        width = max(DRAWN_WIDTH, pixels.shape[1])
        drawn = draw_detections(pixels, boxes, labels, novel, width)
        # b.png is drawn as b.png.jpg: there may be a b.jpg beside it.
        name = image.name if image.name.endswith(".jpg") else f"{image.name}.jpg"
        path = self._output / "drawn" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        drawn.save(path, quality=90)
