"""Imports proposals: OpenMMLab's pickles, or COCO's results format."""

from pathlib import Path
from typing import Any

import numpy as np

from lpovod.artifacts import identity, read_json
from lpovod.config import ProposalsSettings
from lpovod.exceptions import LpovodError, some
from lpovod.formats.coco import CocoDataset, corners, read_dataset, read_results
from lpovod.formats.regions import Shard, write_regions
from lpovod.importers.pickles import read_pickled_arrays
from lpovod.progress import log, progress

TOLERANCE = 1.0
"""Pixels by which rounding may push a box over the image's edge; the box is then clipped."""

COUNTS = "num_proposal"
"""Key that LP-OVOD's maps have beside the image ids: how many boxes each array of the list has."""


def import_proposals(
    dataset: Path,
    file: Path,
    settings: ProposalsSettings,
    output: list[Path],
    id_map: Path | None = None,
) -> None:
    """Write the proposals of a file as the artifacts of stage `proposals`, all shards of a split.

    The best `per_image` are kept, best first; boxes thinner than a pixel are dropped and counted.
    Images without proposals are counted and named in a warning.

    Args:
        dataset: json of the split.
        file: ``.pkl``, a list with a float array (n, 5) for each image: x1 y1 x2 y2 objectness in
            pixels of the original image; or ``.json``, a list of image_id, bbox xywh and score.
        settings: largest number of proposals per image.
        output: the shards of a region store without vectors, in their order.
        id_map: json {image id: position in the pickle's list}, for at least half of the images;
            it may have `COUNTS`. Without it, the list has the order of the images in `dataset`.

    Raises:
        LpovodError: naming the first image whose boxes are not finite, inverted or outside the
            image, or whose objectness is outside [0, 1]; and as `read_proposal_file` does.
    """
    data = read_dataset(dataset)
    rows = read_proposal_file(file, data, id_map)
    if without := [str(image_id) for image_id, boxes in rows.items() if not len(boxes)]:
        log.warning(
            f"{len(without)} of {len(rows)} images of {data.path} have no proposals in {file}: "
            f"{some(without)}"
        )
    inputs = {"dataset": dataset, "file": file} | ({"id_map": id_map} if id_map else {})
    ident = identity("proposals", {"per_image": settings.per_image}, **inputs)
    total, thin = 0, 0
    with progress(None, "proposals", "image", len(data.images)) as bar:
        for number, path in enumerate(output):
            shard = Shard(number, len(output))
            with write_regions(path, ident, shard) as writer:
                for image_id in shard.of(data.images):
                    box, objectness, dropped = _checked(rows[image_id], data.images[image_id], file)
                    best = np.argsort(-objectness, kind="stable")[: settings.per_image]
                    writer.add(image_id, box[best], objectness[best])
                    total, thin = total + len(best), thin + dropped
                    bar.update()
    log.info(
        f"{total} proposals of {len(data.images)} images from {file}; {thin} boxes thinner than a "
        "pixel dropped"
    )


def read_proposal_file(
    file: Path, data: CocoDataset, id_map: Path | None = None
) -> dict[int, np.ndarray]:
    """Rows x1 y1 x2 y2 objectness, (n, 5) float32, by image id, for every image of `data`.

    An image that is not in the file, or not in the map, has no rows.

    Raises:
        LpovodError: if file or map are those of other images, or have a different layout.
    """
    if file.suffix == ".json":
        if id_map:
            raise LpovodError(f"{file} contains image ids: remove its proposals.id_maps")
        return _from_results(file, data)
    content = read_pickled_arrays(file)
    if not isinstance(content, list):
        raise LpovodError(f"{file} holds a {type(content).__name__}, expected a list of arrays")
    places = _places(file, content, data, id_map)
    nothing = np.empty((0, 5), np.float32)
    return {i: _rows(file, content, places[i], i) if i in places else nothing for i in data.images}


def _places(file: Path, content: list, data: CocoDataset, id_map: Path | None) -> dict[int, int]:
    """Positions in the list by image id, of the images that it has."""
    if id_map is None:
        if len(content) != len(data.images):
            raise LpovodError(
                f"{file} has {len(content)} arrays, {data.path} {len(data.images)} images: name "
                "the json of image ids that belongs to it (proposals.id_maps)"
            )
        return {image_id: place for place, image_id in enumerate(data.images)}
    known = _read_id_map(id_map, file, content)
    places = {i: known[str(i)] for i in data.images if str(i) in known}
    if 2 * len(places) < len(data.images):
        raise LpovodError(
            f"{id_map} has {len(places)} of the {len(data.images)} images of {data.path}: it is "
            "the map of another split (proposals.id_maps)"
        )
    for image_id, place in places.items():
        if not 0 <= place < len(content):
            raise LpovodError(
                f"image {image_id} has place {place} in {id_map}, {file} has {len(content)} arrays"
            )
    if len(set(places.values())) < len(places):
        raise LpovodError(f"{id_map} gives several images one place")
    return places


def _read_id_map(path: Path, file: Path, content: list) -> dict[str, int]:
    places = read_json(path)
    counts = places.pop(COUNTS, None) if isinstance(places, dict) else None
    if not isinstance(places, dict) or not all(type(p) is int for p in places.values()):
        raise LpovodError(f"{path} is not of the form {{image id: place}}")
    if counts is not None and counts != [len(rows) for rows in content]:
        raise LpovodError(
            f"{path} belongs to another file: its {COUNTS!r} are not those of {file}. If its "
            f"places are right all the same, remove {COUNTS!r} from it"
        )
    return places


def _rows(file: Path, content: list, place: int, image_id: int) -> np.ndarray:
    rows = content[place]
    if not isinstance(rows, np.ndarray) or rows.dtype.kind != "f":
        raise LpovodError(f"{file}: entry {place} (image {image_id}) is not an array of floats")
    if rows.ndim != 2 or rows.shape[1] != 5:
        raise LpovodError(
            f"{file}: entry {place} (image {image_id}) has shape {rows.shape}, expected (n, 5): "
            "x1 y1 x2 y2 objectness"
        )
    return rows.astype(np.float32)


def _from_results(file: Path, data: CocoDataset) -> dict[int, np.ndarray]:
    rows: dict[int, list[list[float]]] = {i: [] for i in data.images}
    for item in read_results(file, data):
        rows[item["image_id"]].append([*corners(item["bbox"]).tolist(), item["score"]])
    return {i: np.array(of_image, np.float32).reshape(-1, 5) for i, of_image in rows.items()}


def _checked(
    rows: np.ndarray, image: dict[str, Any], file: Path
) -> tuple[np.ndarray, np.ndarray, int]:
    """Boxes clipped to the image, their objectness, and the number of boxes dropped as too thin."""
    box, objectness = rows[:, :4], rows[:, 4]
    limit = np.array([image["width"], image["height"]] * 2, np.float32)
    faults = {
        "is not finite": ~np.isfinite(rows).all(axis=1),
        "is inverted": (box[:, 2:] < box[:, :2]).any(axis=1),
        f"lies outside the image, {image['width']} x {image['height']} pixels": (
            (box < -TOLERANCE) | (box > limit + TOLERANCE)
        ).any(axis=1),
        "has an objectness outside [0, 1]": (objectness < 0) | (objectness > 1),
    }
    for fault, flags in faults.items():
        if flags.any():
            first = int(flags.argmax())
            raise LpovodError(
                f"{file}: image {image['id']}: proposal {first}, {rows[first].tolist()}, {fault} "
                f"({int(flags.sum())} of {len(rows)} proposals have this fault). Are the boxes "
                "x1 y1 x2 y2 in pixels of the original image?"
            )
    box = box.clip(0, limit)
    solid = ((box[:, 2:] - box[:, :2]) >= 1).all(axis=1)
    return box[solid], objectness[solid], int((~solid).sum())
