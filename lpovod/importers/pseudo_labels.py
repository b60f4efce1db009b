"""Imports pseudo-labels in the layout of the original's file."""

from pathlib import Path

from lpovod.artifacts import identity, write_json
from lpovod.config import PseudoLabelsSettings
from lpovod.exceptions import LpovodError
from lpovod.formats.coco import NUMBER, corners, read_dataset
from lpovod.formats.pseudo_labels import as_coco
from lpovod.progress import log


def import_pseudo_labels(
    name: str, file: Path, dataset: Path, settings: PseudoLabelsSettings, output: Path
) -> None:
    """Write one class's pseudo-labels from a file with all classes, instead of retrieving them.

    Args:
        name: the class.
        file: COCO json in the original's layout, whose annotations have ``score`` and ``cosine``.
        dataset: the training json, which must list the images of the labels.
        settings: recorded in the artifact's identity.
        output: COCO json of this class.

    Raises:
        LpovodError: if the file has no label of the class, or if the image of a label is not in the
            dataset, has a different size there, or does not contain the label's box.
    """
    content, images = read_dataset(file), read_dataset(dataset).images
    (category,) = content.category_ids([name])
    labels = [
        _checked_label(annotation, file, content.images[image_id], images.get(image_id), dataset)
        for image_id, annotations in content.annotations.items()
        for annotation in annotations
        if annotation["category_id"] == category
    ]
    if not labels:
        raise LpovodError(f"{file} has no label of class {name!r}")
    labels.sort(key=lambda label: -label["cosine"])
    ident = identity("pseudo_labels", settings, dataset=dataset, file=file)
    write_json(output, as_coco(name, labels, dataset) | {"info": {"identity": ident}})
    log.info(
        f"{name}: {len(labels)} regions of {len({r['image_id'] for r in labels})} images of {file}"
    )


def _checked_label(
    annotation: dict, file: Path, labelled: dict, image: dict | None, dataset: Path
) -> dict:
    """A label with the keys in use, checked against its image in the dataset."""
    prefix = f"{file}: annotation {annotation['id']}"
    missing = [key for key in ("score", "cosine") if key not in annotation]
    if missing:
        raise LpovodError(f"{prefix} has no {missing[0]}: the file does not hold pseudo-labels")
    wrong = [key for key in ("score", "cosine") if type(annotation[key]) not in NUMBER]
    if wrong:
        raise LpovodError(f"{prefix}: {wrong[0]} {annotation[wrong[0]]!r} is not a number")
    if image is None:
        raise LpovodError(f"{prefix}: {dataset} has no image {annotation['image_id']}")
    if any(labelled[side] != image[side] for side in ("width", "height")):
        raise LpovodError(
            f"{prefix}: its image is {labelled['width']} x {labelled['height']}, but "
            f"{image['width']} x {image['height']} in {dataset}"
        )
    x1, y1, x2, y2 = corners(annotation["bbox"]).tolist()
    # Sums of single-precision numbers may end slightly outside.
    if min(x1, y1) < -0.01 or x2 > image["width"] + 0.01 or y2 > image["height"] + 0.01:
        raise LpovodError(f"{prefix}: bbox {annotation['bbox']} lies outside its image")
    _, _, width, height = annotation["bbox"]
    return {key: annotation[key] for key in ("image_id", "bbox", "score", "cosine")} | {
        "area": width * height
    }
