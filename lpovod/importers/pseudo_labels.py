"""Imports pseudo-labels in the layout of the original's file."""

from pathlib import Path

from lpovod.artifacts import identity, write_json
from lpovod.config import PseudoLabelsSettings
from lpovod.exceptions import LpovodError
from lpovod.formats.coco import NUMBER, corners, read_dataset
from lpovod.formats.pseudo_labels import Retrieved, as_coco
from lpovod.progress import log


def import_pseudo_labels(
    names: list[str], file: Path, dataset: Path, settings: PseudoLabelsSettings, output: Path
) -> None:
    """Write the pseudo-labels of a file, instead of retrieving them.

    Args:
        names: the novel classes; labels of other classes are left out.
        file: COCO json in the original's layout, whose annotations have ``score`` and ``cosine``.
        dataset: json with the training images, which must list the images of the labels.
        settings: recorded in the artifact's identity.
        output: COCO json.

    Raises:
        LpovodError: if the file has no label of a class, or if the image of a label is not in the
            dataset, has a different size there, or does not contain the label's box.
    """
    content, images = read_dataset(file), read_dataset(dataset).images
    labels: dict[int, list[dict]] = {category: [] for category in content.category_ids(names)}
    for image_id, annotations in content.annotations.items():
        for label in (a for a in annotations if a["category_id"] in labels):
            place = (content.images[image_id], images.get(image_id))
            labels[label["category_id"]].append(_checked_label(label, file, *place, dataset))
    if absent := [
        name for name, of_class in zip(names, labels.values(), strict=True) if not of_class
    ]:
        raise LpovodError(f"{file} has no label of class {absent[0]!r}")
    retrieved = {
        name: Retrieved(sorted(of_class, key=lambda label: -label["cosine"]))
        for name, of_class in zip(names, labels.values(), strict=True)
    }
    ident = identity("pseudo_labels", settings, dataset=dataset, file=file)
    write_json(output, as_coco(retrieved, dataset) | {"info": {"identity": ident}})
    count = sum(len(of_class.regions) for of_class in retrieved.values())
    log.info(f"{count} regions of {len(retrieved)} classes of {file}")


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
