"""Pascal VOC's xml: one file per image, its boxes in pixels counted from 1, both ends included.

``JPEGImages/a.jpg`` belongs to ``Annotations/a.xml``; ``ImageSets/Main/train.txt`` and ``val.txt``
list the splits by name without suffix. Xml files beside their images are read as well.
"""

from pathlib import Path
from xml.etree import ElementTree

from lpovod.exceptions import LpovodError
from lpovod.formats.labels import (
    Box,
    ImageIndex,
    LabelledImage,
    Labels,
    label_files,
    read_lines,
    split_of,
)

UNLISTED = "images have no xml file, or are in no list of ImageSets/Main, and are left out"
ANNOTATIONS, IMAGES, SETS = "Annotations", "JPEGImages", "ImageSets/Main"


def is_voc(path: Path) -> bool:
    """Whether an xml file describes an image as VOC's do."""
    try:
        return ElementTree.parse(path).getroot().tag == "annotation"
    except ElementTree.ParseError:
        return False


def read_voc(folder: Path, files: list[Path], images: list[Path]) -> Labels:
    """Read the xml files of a folder.

    Args:
        folder: that holds everything.
        files: the xml files.
        images: all images.

    Raises:
        LpovodError: if a file in ImageSets/Main names an image twice.
    """
    labels, index = Labels(), ImageIndex(images)
    splits = _splits(folder)
    names: set[str] = set()
    labelled = set()
    for file in files:
        try:
            root = ElementTree.parse(file).getroot()
        except ElementTree.ParseError as error:
            labels.errors["files are not valid xml"].append(f"{file} ({error})")
            continue
        if root.tag != "annotation":
            continue
        image = index.of_label(file, root.findtext("filename"))
        if image is None:
            labels.notes["xml files have no image and are left out"].append(str(file))
            continue
        if (split := _split(file, folder, splits)) is None:
            continue  # noted below
        if (shown := labels.size_of(image)) is None:
            continue
        boxes = _boxes(labels, root, file)
        names |= {box.name for box in boxes}
        labels.add(split, image, _size(labels, root, shown, image), boxes)
        labelled.add(image)
    if splits:  # images that are in no list were left out by whoever made the lists
        folders = {image.parent for image in labelled}  # not those of masks
        ignored = [str(i) for i in images if i not in labelled and i.parent in folders]
        if ignored:
            labels.notes[UNLISTED] += ignored
    else:
        labels.add_unlabelled(folder, images)
    labels.classes = sorted(names)
    return labels


def write_voc(folder: Path, images: list[LabelledImage]) -> None:
    """Write Annotations/*.xml of images that have boxes, and ImageSets/Main/train.txt.

    Args:
        folder: to write to.
        images: with paths relative to the folder of images.

    Raises:
        LpovodError: if two images would share an xml file.
    """
    listed = []
    for image, path in label_files(images, folder / ANNOTATIONS, ".xml"):
        tree = ElementTree.ElementTree(_element(image))
        ElementTree.indent(tree)
        tree.write(path, encoding="utf-8", xml_declaration=True)
        listed.append(image.path.with_suffix("").as_posix())
    sets = folder / SETS
    sets.mkdir(parents=True)
    (sets / "train.txt").write_text("".join(f"{name}\n" for name in listed), encoding="utf-8")


def _element(image: LabelledImage) -> ElementTree.Element:
    root = ElementTree.Element("annotation")
    _add(root, "folder", IMAGES)
    _add(root, "filename", image.path.as_posix())
    size = ElementTree.SubElement(root, "size")
    for name, value in (("width", image.width), ("height", image.height), ("depth", 3)):
        _add(size, name, value)
    _add(root, "segmented", 0)
    for box in image.boxes:
        item = ElementTree.SubElement(root, "object")
        _add(item, "name", box.name)
        _add(item, "pose", "Unspecified")
        _add(item, "truncated", 0)
        _add(item, "difficult", int(box.crowd))
        corners = ElementTree.SubElement(item, "bndbox")
        x1, y1, x2, y2 = (int(value + 0.5) for value in box.corners)
        # At least one pixel, and inside the image.
        x1, y1 = min(x1, image.width - 1), min(y1, image.height - 1)
        names = ("xmin", "ymin", "xmax", "ymax")
        values = (x1 + 1, y1 + 1, max(x2, x1 + 1), max(y2, y1 + 1))
        for name, value in zip(names, values, strict=True):
            _add(corners, name, value)
    return root


def _add(parent: ElementTree.Element, name: str, value: object) -> None:
    ElementTree.SubElement(parent, name).text = str(value)


def _splits(folder: Path) -> dict[str, str]:
    """The split of each listed name; empty without lists."""
    lists = {
        split: folder / SETS / f"{name}.txt"
        for split, name in (("test", "test"), ("val", "val"), ("train", "train"))
    }
    listed: dict[str, str] = {}
    for split, path in lists.items():
        if path.is_file():
            for line in read_lines(path):
                name = line.strip()
                if not name:
                    continue
                if listed.get(name, split) != split:
                    raise LpovodError(
                        f"{path}: {name} is in {listed[name]}.txt too. Remove it from one of them"
                    )
                listed[name] = split
    trained_and_measured = folder / SETS / "trainval.txt"
    if not {"train", "val"} & {*listed.values()} and trained_and_measured.is_file():
        lines = read_lines(trained_and_measured)
        listed |= {line.strip(): "" for line in lines if line.strip()}
    return listed


def _split(file: Path, folder: Path, listed: dict[str, str]) -> str | None:
    """The split of an xml file; None if lists leave it out."""
    if not listed:
        return split_of(file, folder)
    below = file.relative_to(folder).with_suffix("")
    inner = below.relative_to(ANNOTATIONS) if below.parts[0] == ANNOTATIONS else below
    # The lists of some tools keep suffixes, others leave folders out.
    return listed.get(inner.as_posix(), listed.get(below.name))


def _size(
    labels: Labels, root: ElementTree.Element, shown: tuple[int, int], image: Path
) -> tuple[int, int]:
    """The stated size, which tells whether boxes are of the image before or after its rotation."""
    try:
        stated = (int(root.findtext("size/width", "0")), int(root.findtext("size/height", "0")))
    except ValueError:
        stated = (0, 0)
    if stated in (shown, shown[::-1]):
        return stated
    if stated != (0, 0):
        labels.errors["xml files state a size that the image does not have"].append(
            f"{image} ({stated[0]} x {stated[1]}, not {shown[0]} x {shown[1]})"
        )
    return shown


def _boxes(labels: Labels, root: ElementTree.Element, file: Path) -> list[Box]:
    boxes = []
    for item in root.findall("object"):
        name = (item.findtext("name") or "").strip()
        try:
            x1, y1, x2, y2 = (
                float(item.findtext(f"bndbox/{side}", ""))
                for side in ("xmin", "ymin", "xmax", "ymax")
            )
        except ValueError:
            labels.errors["xml files have an object without a bndbox of four numbers"].append(
                str(file)
            )
            continue
        if not name:
            labels.errors["xml files have an object without a name"].append(str(file))
            continue
        difficult = (item.findtext("difficult") or "0").strip() == "1"
        boxes.append(Box(name, (x1 - 1, y1 - 1, x2, y2), difficult))
    return boxes
