"""Pseudo-labels retrieved elsewhere, in the layout of the original's file."""

from pathlib import Path

from lpovod.artifacts import identity, write_json
from lpovod.config import PseudoLabelsSettings
from lpovod.exceptions import LpovodError
from lpovod.formats.coco import read_dataset
from lpovod.formats.pseudo_labels import as_coco
from lpovod.progress import log


def import_pseudo_labels(
    name: str, file: Path, dataset: Path, settings: PseudoLabelsSettings, output: Path
) -> None:
    """Write one class's pseudo-labels out of a file of all classes, in place of retrieval.

    Args:
        name: the class.
        file: COCO json in the original's layout, annotations with ``score`` and ``cosine``.
        dataset: the training json, which must hold the images of the labels.
        settings: for the artefact's identity.
        output: COCO json of the class alone.

    Raises:
        LpovodError: if the file has no label of the class, or if the image of one is not in the
            dataset, is of another size there, or does not hold the label's box.
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


def _checked_label(annotation: dict, file: Path, theirs: dict, ours: dict, dataset: Path) -> dict:
    where = f"{file}: annotation {annotation['id']}"
    missing = [key for key in ("score", "cosine") if key not in annotation]
    if missing:
        raise LpovodError(f"{where} has no {missing[0]}: these are no pseudo-labels")
    if ours is None:
        raise LpovodError(f"{where}: {dataset} has no image {annotation['image_id']}")
    if any(theirs[side] != ours[side] for side in ("width", "height")):
        raise LpovodError(
            f"{where}: its image is {theirs['width']} x {theirs['height']}, that of {dataset} "
            f"{ours['width']} x {ours['height']}"
        )
    x, y, width, height = annotation["bbox"]
    # Sums of single-precision corners may end a hair outside.
    if min(x, y) < -0.01 or x + width > ours["width"] + 0.01 or y + height > ours["height"] + 0.01:
        raise LpovodError(f"{where}: bbox {annotation['bbox']} lies outside of its image")
    return {key: annotation[key] for key in ("image_id", "bbox", "score", "cosine")} | {
        "area": width * height
    }
