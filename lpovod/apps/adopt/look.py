"""What a folder holds: images, and labels in COCO's, YOLO's, Pascal VOC's or LabelMe's format."""

import os
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lpovod.artifacts import read_json
from lpovod.exceptions import LpovodError, UsageError
from lpovod.formats.coco import read_dataset
from lpovod.formats.labelme import is_labelme, read_labelme
from lpovod.formats.labels import (
    SPLIT_WORDS,
    SUFFIXES,
    Findings,
    Labels,
    as_coco,
    split_of,
)
from lpovod.formats.voc import is_voc, read_voc
from lpovod.formats.yolo import is_yolo, read_yolo, read_yolo_folder

UNREADABLE = {".heic", ".heif", ".avif", ".cr2", ".nef", ".arw", ".dng"}
OTHER_TASKS = ("captions_", "person_keypoints_", "stuff_", "panoptic_", "image_info_")
"""Of COCO's annotation files, those without boxes of classes."""

SHOWN = 3  # items of each kind of finding


@dataclass
class Content:
    """Images and annotations of a split.

    Attributes:
        root: folder of the images; the file names in `coco` are relative to it.
        coco: images, annotations and categories, as in COCO's json.
        json: the file that holds them; None if it is still to be written.
        unlabelled: ids of images in which nobody looked for objects.
    """

    root: Path
    coco: dict[str, Any]
    json: Path | None = None
    unlabelled: frozenset[int] = frozenset()

    def paths(self) -> list[Path]:
        """The image files."""
        return [self.root / image["file_name"] for image in self.coco["images"]]

    def counts(self) -> dict[str, tuple[int, int]]:
        """Numbers of images and boxes of every annotated class, in the order of categories."""
        images: dict[int, set[Any]] = defaultdict(set)
        boxes: Counter[int] = Counter()
        for annotation in self.coco["annotations"]:
            if not annotation.get("iscrowd", 0):
                images[annotation["category_id"]].add(annotation["image_id"])
                boxes[annotation["category_id"]] += 1
        return {
            c["name"]: (len(images[c["id"]]), boxes[c["id"]])
            for c in self.coco["categories"]
            if boxes[c["id"]]
        }


@dataclass
class Found:
    """What a folder holds.

    Attributes:
        format: of the labels.
        labels: the files or the folder that they are in.
        splits: by "train", "val" and "test".
        errors: what must be corrected first, by kind: the items.
        notes: oddities, by kind: the items.
    """

    format: str
    labels: list[Path]
    splits: dict[str, Content]
    errors: Findings = field(default_factory=lambda: defaultdict(list))
    notes: Findings = field(default_factory=lambda: defaultdict(list))


@dataclass
class Files:
    """The files below a folder that matter, in order."""

    images: list[Path] = field(default_factory=list)
    unreadable: list[Path] = field(default_factory=list)
    json: list[Path] = field(default_factory=list)
    yaml: list[Path] = field(default_factory=list)
    xml: list[Path] = field(default_factory=list)
    classes: list[Path] = field(default_factory=list)

    def add(self, path: Path) -> None:
        """Put a file into its list, if it matters."""
        suffix = path.suffix.lower()
        if suffix in SUFFIXES:
            self.images.append(path)
        elif suffix in UNREADABLE:
            self.unreadable.append(path)
        elif suffix in (".yaml", ".yml"):
            self.yaml.append(path)
        elif path.name == "classes.txt":
            self.classes.append(path)
        elif suffix in (".json", ".xml"):
            getattr(self, suffix[1:]).append(path)


def look(folder: Path, labels: tuple[Path, ...]) -> Found:
    """Read what a folder holds.

    Args:
        folder: that holds the images.
        labels: files or a folder to read labels from; empty to look for them in `folder`.

    Raises:
        LpovodError: if there are no images or no labels, if labels are incomplete, or if several
            files could be meant.
    """
    files = _files(folder)
    if not files.images:
        raise LpovodError(f"{folder}: no images{_why_not(files)}")
    labelled = _of_labels(labels) if labels else files
    found = _read(folder, files.images, labelled, named=bool(labels))
    if found is None:
        raise LpovodError(_without_labels(folder, files, labels))
    if files.unreadable:
        found.notes["images of formats that cannot be read are left out: convert them"] += [
            str(path) for path in files.unreadable
        ]
    return found


def _files(folder: Path) -> Files:
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder")
    files, seen = Files(), set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        folders[:] = sorted(n for n in folders if not n.startswith(".")) if real not in seen else []
        for name in sorted(names) if real not in seen else []:
            if not name.startswith("."):
                files.add(Path(parent, name))
        seen.add(real)
    return files


def _of_labels(labels: tuple[Path, ...]) -> Files:
    files = Files()
    for path in labels:
        if path.is_dir():
            inner = _files(path)
            for name in ("json", "yaml", "xml", "classes"):
                getattr(files, name).extend(getattr(inner, name))
        elif path.is_file():
            files.add(path)
        else:
            raise UsageError(f"--labels: {path}: no such file or folder")
    return files


def _why_not(files: Files) -> str:
    if not files.unreadable:
        return ". Name the folder that holds them"
    kinds = sorted({path.suffix for path in files.unreadable})
    return f" but {len(files.unreadable)} of {', '.join(kinds)}: convert them to JPEG or PNG"


def _without_labels(folder: Path, files: Files, labels: tuple[Path, ...]) -> str:
    if labels:
        return f"--labels: no labels in {', '.join(map(str, labels))}"
    return (
        f"{folder}: {len(files.images)} images, and no labels. Novel classes need names alone, but "
        "the detector learns what an object is from boxes of a few base classes.\n"
        "  1. Label part of the images: some 50 boxes of each of a few classes are a start. Any "
        "tool will do\n     that writes COCO, YOLO, Pascal VOC or LabelMe files.\n"
        "  2. Put the files into this folder, or name them (--labels PATH).\n"
        "  3. Run the same command again.\n"
        "Nothing was written."
    )


def _read(folder: Path, images: list[Path], files: Files, named: bool) -> Found | None:
    """Read the labels of the one format that there is; None without any."""
    yamls = [path for path in files.yaml if is_yolo(path)]
    xmls = files.xml if any(is_voc(path) for path in files.xml[:3]) else []
    labelme = [path for path in files.json if is_labelme(path)]
    cocos = _coco_files([path for path in files.json if path not in {*labelme}])
    candidates = {
        "COCO": cocos,
        # labelImg writes classes.txt where data.yaml is missing.
        "YOLO": yamls or files.classes[:1],
        "Pascal VOC": [xmls[0].parent] if xmls else [],
        "LabelMe": [labelme[0].parent] if labelme else [],
    }
    present = [name for name, paths in candidates.items() if paths]
    if not present:
        return None
    if len(present) > 1:
        places = "\n".join(f"  {name}: --labels {candidates[name][0]}" for name in present)
        raise UsageError(f"labels in {len(present)} formats. Which ones are meant?\n{places}")
    if cocos:
        return _read_coco(folder, images, _coco_splits(folder, cocos, named))
    if present == ["YOLO"]:
        first, *others = candidates["YOLO"]
        if others:
            options = " or ".join(f"--labels {path}" for path in (first, *others))
            raise UsageError(f"several data sets. Which one is meant? {options}")
        if yamls:
            return _found("YOLO", first, read_yolo(yamls[0]))
        return _found("YOLO", first, read_yolo_folder(folder, images, first))
    if xmls:
        base = _voc_base(folder, xmls)
        return _found("Pascal VOC", xmls[0].parent, read_voc(base, xmls, images))
    return _found("LabelMe", labelme[0].parent, read_labelme(folder, labelme, images))


def _voc_base(folder: Path, xmls: list[Path]) -> Path:
    """The folder of Annotations/: VOC's files may lie deeper than the folder that was named."""
    bases = {
        Path(*path.parts[: path.parts.index("Annotations")])
        for path in xmls
        if "Annotations" in path.parts
    }
    if len(bases) > 1:
        names = " or ".join(f"lpovod adopt {base}" for base in sorted(bases))
        raise UsageError(f"several folders Annotations/. Which one is meant? {names}")
    return bases.pop() if bases else folder


def _found(kind: str, place: Path, labels: Labels) -> Found:
    splits = dict(labels.splits)
    if "" in splits:
        splits["train"] = splits.get("train", []) + splits.pop("")
    contents = {}
    for split in sorted(splits, key=("train", "val", "test").index):
        images = splits[split]
        ordered = sorted(images, key=lambda image: image.path)
        root = Path(os.path.commonpath([image.path.parent for image in ordered]))
        unlabelled = frozenset(n for n, image in enumerate(ordered, 1) if not image.labelled)
        coco = as_coco(ordered, labels.classes, root)
        contents[split] = Content(root, coco, unlabelled=unlabelled)
    return Found(kind, [place], contents, labels.errors, labels.notes)


# COCO


def _coco_files(paths: list[Path]) -> list[Path]:
    """The json files that hold images, annotations and categories."""
    listed = [p for p in paths if not p.name.startswith(OTHER_TASKS)]
    instances = [p for p in listed if p.name.startswith("instances_")]
    return [path for path in instances or listed if _is_coco(path)]


def _is_coco(path: Path) -> bool:
    try:
        content = read_json(path)
    except LpovodError:
        # Damaged labels must not be overlooked where they are COCO's by name.
        if path.name.startswith("instances_") or "coco" in path.name.lower():
            raise
        return False
    sections = ("images", "annotations", "categories")
    return isinstance(content, dict) and all(
        isinstance(content.get(section), list) for section in sections
    )


def _read_coco(folder: Path, images: list[Path], splits: dict[str, Path]) -> Found:
    found = Found("COCO", list(splits.values()), {})
    for split, path in splits.items():
        data = read_dataset(path)
        names = [image["file_name"] for image in data.images.values()]
        if not names:
            raise LpovodError(f"{path} lists no images")
        root = _image_folder(path, names, images, split)
        missing = [name for name in names if not (root / name).is_file()]
        if missing:
            found.errors[f"images that {path} lists are missing in {root}"] += missing
        content = {
            "images": list(data.images.values()),
            "annotations": [a for objects in data.annotations.values() for a in objects],
            "categories": list(data.categories.values()),
        }
        found.splits[split] = Content(root, content, path)
        _note_oddities(found, path, content)
    return found


def _coco_splits(folder: Path, files: list[Path], named: bool) -> dict[str, Path]:
    """The json file of each split; files that the user named are train and val, in this order."""
    if len(files) == 1:
        return {"train": files[0]}
    by_split: dict[str, list[Path]] = defaultdict(list)
    for path in files:
        words = "".join(c if c.isalpha() else " " for c in path.stem.lower()).split()
        stated = [SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS]
        by_split[stated[0] if stated else split_of(path, folder)].append(path)
    clear = {split: paths[0] for split, paths in by_split.items() if split and len(paths) == 1}
    if "train" in clear and len(clear) == len(by_split):
        return {split: clear[split] for split in ("train", "val", "test") if split in clear}
    if named and len(files) == 2:
        return {"train": files[0], "val": files[1]}
    listed = "\n".join(f"  {path}" for path in files[:10])
    raise UsageError(
        f"{len(files)} annotation files. Which ones are meant?\n{listed}\n"
        "Name the one with all images, or those of the training and of the validation images: "
        "--labels TRAIN.json VAL.json"
    )


def _image_folder(path: Path, names: list[str], images: list[Path], split: str) -> Path:
    """The folder below which most of the listed images are."""
    by_name: dict[str, list[Path]] = defaultdict(list)
    for image in images:
        by_name[image.name].append(image)
    folders: Counter[Path] = Counter()
    for name in names:
        depth = len(Path(name).parts)
        for image in by_name[Path(name).name]:
            if image.parts[-depth:] == Path(name).parts:
                folders[Path(*image.parts[:-depth])] += 1
    if not folders:
        raise LpovodError(
            f"{path}: none of the images that it lists (first {names[0]}) is among the "
            f"{len(images)} images of the folder"
        )

    def rank(root: Path) -> tuple[int, bool, bool]:
        return folders[root], split_of(root / "image", root.parent) == split, root == path.parent

    return max(sorted(folders), key=rank)


def _note_oddities(found: Found, path: Path, content: dict[str, Any]) -> None:
    sizes = {image["id"]: (image["width"], image["height"]) for image in content["images"]}
    names = {image["id"]: str(image["file_name"]) for image in content["images"]}
    for annotation in content["annotations"]:
        x, y, width, height = annotation["bbox"]
        image = annotation["image_id"]
        if x + width > sizes[image][0] + 1 or y + height > sizes[image][1] + 1 or min(x, y) < -1:
            found.notes[f"boxes of {path.name} reach beyond their image"].append(names[image])
        elif min(width, height) < 1:
            found.notes[f"boxes of {path.name} are thinner than a pixel"].append(names[image])


def counted(findings: Findings) -> list[str]:
    """Findings as lines: how many, what, and the first few items."""
    lines = []
    for kind, items in findings.items():
        distinct = sorted({*items})
        rest = " ..." if len(distinct) > SHOWN else ""
        lines.append(f"{len(items)} {kind}: {', '.join(distinct[:SHOWN])}{rest}")
    return lines
