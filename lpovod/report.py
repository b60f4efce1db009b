"""Stage `report`: everything that a run found out, on one page that opens offline.

This module gathers numbers, crops and overlays; `report_template.html.jinja` beside it lays them
out. Images are inline JPEGs under SVG overlays, charts are SVG or plain boxes: the page loads
nothing, needs no script, and the same inputs give the same bytes. Needs no torch.
"""

import base64
import io
import json
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from lpovod import __version__, config
from lpovod.artifacts import LpovodError, atomic, check_made_from, read_json
from lpovod.dataset import CocoDataset, read_dataset
from lpovod.overlaps import overlaps
from lpovod.progress import progress, say

TEMPLATE = "report_template.html.jinja"

ROWS = {
    "AP50": ("Full method", "probe and CLIP head, with objectness, on refined boxes"),
    "without_probe": ("CLIP head alone", "novel scores from the distilled CLIP head (beta = 0)"),
    "without_probe_best_temperature": (
        "CLIP head alone, tuned",
        "at the best of several temperatures, picked on these very images",
    ),
    "without_clip_head": ("Probe alone", "novel scores from the linear probe (beta = 1)"),
    "without_objectness": ("Without objectness", "scores say nothing of how well a box fits"),
    "without_probe_and_objectness": (
        "CLIP head alone, without objectness",
        "what objectness does for the CLIP head",
    ),
    "without_box_refinement": ("Without box refinement", "proposals as they are"),
    "without_probe_and_box_refinement": (
        "CLIP head alone, without box refinement",
        "what box refinement does for the CLIP head",
    ),
    "true_clip_without_probe": (
        "CLIP itself, no probe",
        "CLIP on the crops, in place of the head that imitates it",
    ),
    "true_clip_with_probe": ("CLIP itself and probe", "the same, joined with the probe"),
}
"""Rows of the AP table by their name in the metrics: order, plain name, explanation."""

ERRORS = {
    "correct": "the first detection of an object, IoU of at least 0.5",
    "duplicate": "well placed on an object that is already found",
    "too tight": "a part of an object",
    "too loose": "around an object, with much beside it",
    "group": "around several objects",
    "shifted": "overlaps an object otherwise",
    "other class": "well placed on an object of another class",
    "background": "on nothing that is annotated",
}
"""Kinds of mistakes, as `lpovod.errors` counts them."""

METHODS = {
    "full": "Full method",
    "without_probe": "CLIP head alone",
    "without_clip_head": "Probe alone",
}
"""Whose mistakes are shown, by their name in the metrics."""

RIGHT, BADLY_PLACED, WRONG, UNKNOWN = "right", "badly placed", "wrong", "unknown"

CROP_PIXELS = 160
SCENE_PIXELS = 960
SCENE_UNITS = 400  # width of a scene's overlay: lines and letters are sized in these
LABEL_HEIGHT = 15
JPEG_QUALITY = 84
READABLE_OBJECTS = 15  # an image with more is shown only where there is no other
NO_NUMBER = ("-", "NA", "")  # Snakemake's benchmark of a job that was too short to measure


def write_report(
    metrics: Path,
    detections: Path,
    val: Path,
    train: Path,
    truth: Path,
    pseudo_labels: list[Path],
    detector_history: Path,
    benchmarks: Path,
    settings: config.Report,
    output: Path,
    proposals_history: Path | None = None,
) -> None:
    """Write the page.

    Args:
        metrics: json of stage `evaluation`, in percent.
        detections: COCO results of the full method on `val`.
        val: the split that was measured, with all classes annotated.
        train: the training split; retrieved regions are cut out of its images.
        truth: annotations of the training images for all classes, to tell right from wrong.
        pseudo_labels: a file per novel class; none, if nothing was retrieved.
        detector_history: one JSON line per epoch: ``epoch`` and named losses.
        benchmarks: folder of Snakemake's benchmark files (seconds, MiB), searched with all below.
        settings: of this stage.
        output: one html file.
        proposals_history: the same of the proposal network, if there is one.

    Raises:
        LpovodError: if files contradict one another or cannot be read.
    """
    measured = read_metrics(metrics, val)
    data = read_dataset(val)
    novel, base = measured["classes"]["novel"], measured["classes"]["base"]
    found = read_detections(detections, data)
    page = {
        "run": metrics.resolve().parent.parent.name,
        "measured": measured,
        "rows": table_rows(measured),
        "classes": class_rows(measured),
        "recall": measured.get("proposal_recall", {}),
        "errors": error_columns(measured),
        "kinds": ERRORS,
        "curves": [
            ("Proposal network", loss_curves(proposals_history) if proposals_history else []),
            ("Detector", loss_curves(detector_history)),
        ],
        "retrieved": retrieved(pseudo_labels, novel, train, truth, settings.crops_per_class),
        "anything_found": bool(found),
        "scenes": [
            draw_scene(data, image_id, found.get(image_id, []), base, novel)
            for image_id in choose_images(data, base, novel, settings.images)
        ],
        "val_images": len(data.images),
        "stages": stage_times(benchmarks),
        "version": __version__,
    }
    with atomic(output) as partial:
        partial.write_text(render(page), encoding="utf-8")
    say(f"{output}: {output.stat().st_size / 1e6:.1f} MB")


def render(page: dict[str, Any]) -> str:
    """Fill the template."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "signed": signed, "duration": duration}
    return environment.get_template(TEMPLATE).render(page)


def number(value: float | None, digits: int = 1) -> str:
    """A number, or a dash where there is none."""
    return "–" if value is None else f"{value:.{digits}f}"


def signed(value: float | None) -> str:
    """A difference with its sign; a zero has none."""
    if value is None:
        return "–"
    rounded = round(value, 1)
    return f"{abs(rounded):.1f}" if rounded == 0 else f"{'+' if rounded > 0 else '−'}{abs(rounded)}"


def duration(seconds: float) -> str:
    """Seconds in the two units that fit."""
    if seconds < 59.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02} s"
    return f"{minutes // 60} h {minutes % 60:02} min"


# --- numbers


def read_metrics(path: Path, val: Path) -> dict[str, Any]:
    """Metrics, checked to be of this split."""
    content = read_json(path)
    for name, keys in (("AP50", {"novel", "base", "all"}), ("classes", {"novel", "base"})):
        found = content.get(name) if isinstance(content, dict) else None
        if not isinstance(found, dict) or not keys <= set(found):
            raise LpovodError(
                f"{path} has no {name!r} with {', '.join(sorted(keys))}. Make it again: "
                "snakemake --forcerun evaluation"
            )
    if made_from := content.get("made_from"):
        ident = {"stage": "evaluation", "inputs": made_from}
        check_made_from(path, ident, "dataset", val)
    return content


def table_rows(measured: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of the AP table: name, why, novel, base, all, and the difference in novel AP50.

    Rows that the metrics lack are left out; rows that only the metrics know come last.
    """
    there = {
        name: row
        for name, row in measured.items()
        if isinstance(row, dict) and {"novel", "base", "all"} <= set(row)
    }
    full, rows = there["AP50"]["novel"], []
    for name in [*(n for n in ROWS if n in there), *sorted(set(there) - set(ROWS))]:
        plain, why = ROWS.get(name, (name.replace("_", " ").capitalize(), ""))
        row = there[name]
        if "temperature" in row:
            why = f"temperature {row['temperature']:g}: {why}"
        less = None if full is None or row["novel"] is None else row["novel"] - full
        rows.append({**row, "key": name, "name": plain, "why": why, "difference": less})
    return rows


def class_rows(measured: dict[str, Any]) -> dict[str, list[tuple[str, float | None]]]:
    """AP50 by split and class, best first; None for a class without an object."""
    by_class = measured.get("per_class", {})
    return {
        split: sorted(
            ((name, by_class.get(name)) for name in measured["classes"][split]),
            key=lambda item: (-(-1 if item[1] is None else item[1]), item[0]),
        )
        for split in ("novel", "base")
        if by_class
    }


def error_columns(measured: dict[str, Any]) -> list[tuple[str, dict[str, float]]]:
    """Percent of every kind of mistake, for each method that was measured."""
    counted = measured.get("novel_errors", {})
    return [
        (plain, {kind: counted[name].get(kind, 0.0) for kind in ERRORS})
        for name, plain in METHODS.items()
        if sum(counted.get(name, {}).values()) > 0
    ]


def loss_curves(history: Path) -> list[dict[str, Any]]:
    """One curve per named loss, after their sum if there are several.

    Returns:
        name, values by epoch, epochs, and points of the unit square (y downwards, zero at 1).
    """
    lines = _read_lines(history)
    names = [name for name in (lines[0] if lines else {}) if name != "epoch"]
    losses = {name: [line[name] for line in lines] for name in names}
    if len(losses) > 1:
        losses = {"sum": [sum(values) for values in zip(*losses.values(), strict=True)]} | losses
    epochs = [line["epoch"] for line in lines]
    return [
        {"name": name.replace("_", " "), "values": v, "epochs": epochs, "points": _unit_square(v)}
        for name, v in losses.items()
    ]


def _read_lines(path: Path) -> list[dict[str, float]]:
    try:
        text = path.read_text()
    except FileNotFoundError:
        raise LpovodError(f"{path}: no such file") from None
    lines: list[dict[str, float]] = []
    for place, line in enumerate(filter(str.strip, text.splitlines()), start=1):
        try:
            read = {name: float(value) for name, value in json.loads(line).items()}
        except (ValueError, AttributeError, TypeError):
            raise LpovodError(f"{path}: line {place} is no history: {line[:60]!r}") from None
        if "epoch" not in read or (lines and read.keys() != lines[0].keys()):
            raise LpovodError(f"{path}: line {place} has other entries than an epoch's losses")
        lines.append(read)
    return lines


def _unit_square(values: list[float]) -> list[tuple[float, float]]:
    top = max(max(values), 1e-12)
    last = max(1, len(values) - 1)
    return [(n / last, 1 - max(0.0, value) / top) for n, value in enumerate(values)]


def stage_times(folder: Path) -> list[dict[str, Any]]:
    """Rule, jobs, seconds in total and largest memory (MiB), the longest first.

    Raises:
        LpovodError: naming a file that is no benchmark of Snakemake's.
    """
    stages: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.rglob("*.tsv")):
        rule = path.relative_to(folder).parts[0].removesuffix(".tsv")
        stage = stages.setdefault(rule, {"rule": rule, "jobs": 0, "seconds": 0.0, "peak": None})
        for seconds, peak in _read_benchmark(path):
            stage["jobs"] += 1
            stage["seconds"] += seconds or 0.0
            if peak is not None:
                stage["peak"] = max(peak, stage["peak"] or 0.0)
    ran = [stage for stage in stages.values() if stage["jobs"]]
    return sorted(ran, key=lambda stage: (-stage["seconds"], stage["rule"]))


def _read_benchmark(path: Path) -> list[tuple[float | None, float | None]]:
    header, *lines = path.read_text().splitlines() or [""]
    columns = header.split("\t")
    try:
        rows = [dict(zip(columns, line.split("\t"), strict=True)) for line in lines if line]
        return [tuple(_value(row[name]) for name in ("s", "max_rss")) for row in rows]
    except (KeyError, ValueError) as error:
        raise LpovodError(
            f"{path} is no benchmark file of Snakemake's ({error}). Remove it"
        ) from None


def _value(text: str) -> float | None:
    return None if text in NO_NUMBER else float(text)


# --- retrieved regions


def retrieved(
    pseudo_labels: Iterable[Path], novel: list[str], train: Path, truth: Path, shown: int
) -> list[dict[str, Any]]:
    """What was retrieved for each novel class, and how much of it is right.

    Args:
        pseudo_labels: files of stage `pseudo_labels`.
        novel: names of the classes.
        train: the training split, for its images.
        truth: annotations of all classes in the same images.
        shown: crops per class.

    Returns:
        by class: name, regions (best cosine first), counts by mark, purity in percent (None if
        it cannot be told) and the first crops.
    """
    labels = _labels_by_class(pseudo_labels, train)
    images, known = read_dataset(train), read_dataset(truth)
    classes = []
    for name in progress(novel, "retrieved regions", "class"):
        regions = sorted(labels.get(name, []), key=lambda r: (-r["cosine"], r["id"]))
        judge = _Judge(known, name)
        marks = [judge(region) for region in regions]
        counts = Counter(mark for mark, _ in marks)
        told = judge.can_tell and bool(regions)
        pairs = list(zip(regions, marks, strict=True))[:shown]
        classes.append(
            {
                "name": name,
                "regions": regions,
                "counts": {mark: counts[mark] for mark in (RIGHT, BADLY_PLACED, WRONG)},
                "purity": 100 * counts[RIGHT] / len(regions) if told else None,
                "crops": [draw_crop(images, name, region, *mark) for region, mark in pairs],
            }
        )
    return classes


def _labels_by_class(paths: Iterable[Path], train: Path) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for path in paths:
        if ident := read_json(path).get("info", {}).get("identity"):
            check_made_from(path, ident, "dataset", train)
        content = read_dataset(path)
        of_images = content.annotations.values()
        for label in (a for kept in of_images for a in kept if not a.get("iscrowd", 0)):
            if "cosine" not in label:
                raise LpovodError(
                    f"{path}: annotation {label['id']} has no cosine. Make it again: "
                    "snakemake --forcerun pseudo_labels"
                )
            found[content.categories[label["category_id"]]["name"]].append(label)
    return found


class _Judge:
    """Tells right from wrong among the regions of a class: the mark, and a word on why."""

    def __init__(self, truth: CocoDataset, name: str) -> None:
        self.truth = truth
        self.names = {i: category["name"] for i, category in truth.categories.items()}
        self.category = next((i for i, known in self.names.items() if known == name), None)
        self.can_tell = any(
            a["category_id"] == self.category for kept in truth.annotations.values() for a in kept
        )

    def __call__(self, region: dict[str, Any]) -> tuple[str, str]:
        if not self.can_tell:
            return UNKNOWN, "no annotation to compare with"
        if region["image_id"] not in self.truth.images:
            raise LpovodError(f"{self.truth.path} has no image {region['image_id']}")
        boxes, categories = self.truth.boxes(region["image_id"])
        own = categories == self.category
        iou, inside, covered = overlaps(_xyxy(region), boxes)
        if iou[own].max(initial=0) >= 0.5:
            return RIGHT, f"IoU {iou[own].max():.2f}"
        if iou[~own].max(initial=0) >= 0.5:
            return WRONG, self.names[int(categories[np.where(own, 0, iou).argmax()])]
        if iou[own].max(initial=0) > 0:
            return BADLY_PLACED, _placement(inside[own], covered[own])
        return WRONG, "background"


def _xyxy(annotation: dict[str, Any]) -> np.ndarray:
    x, y, width, height = annotation["bbox"]
    return np.array([x, y, x + width, y + height])


def _placement(inside: np.ndarray, covered: np.ndarray) -> str:
    """The word for a badly placed box, by the thresholds of `lpovod.errors`."""
    if (covered >= 0.7).sum() >= 2:
        return "group"
    if (inside >= 0.9).any():
        return "too tight"
    return "too loose" if (covered >= 0.9).any() else "shifted"


def draw_crop(
    images: CocoDataset, name: str, region: dict[str, Any], mark: str, why: str
) -> dict[str, Any]:
    """A square around a region, with its box in percent of the square, and what to say of it."""
    if region["image_id"] not in images.images:
        raise LpovodError(
            f"{images.path} has no image {region['image_id']}, which the pseudo-labels of "
            f"{name!r} name. Make them again: snakemake --forcerun pseudo_labels"
        )
    pixels = images.load(region["image_id"])
    left, top, side = _window(_xyxy(region), pixels.shape[1], pixels.shape[0])
    square = Image.new("RGB", (side, side), (128, 128, 128))
    square.paste(Image.fromarray(pixels), (-left, -top))
    x, y, width, height = region["bbox"]
    box = [100 * v / side for v in (x - left, y - top, width, height)]
    return {
        "uri": jpeg_uri(square, CROP_PIXELS),
        "box": box,
        "mark": mark,
        "why": why,
        "cosine": region["cosine"],
        "image_id": region["image_id"],
    }


def _window(box: np.ndarray, width: int, height: int) -> tuple[int, int, int]:
    """Left, top and side of a square around a box, kept inside the image where it fits in."""
    side = max(8, round(1.35 * float((box[2:] - box[:2]).max())))
    corner = (box[:2] + box[2:] - side) / 2
    limits = [(size - side) for size in (width, height)]
    left, top = (
        round(min(max(low, 0), limit)) if limit >= 0 else round(limit / 2)
        for low, limit in zip(corner.tolist(), limits, strict=True)
    )
    return left, top, side


def jpeg_uri(image: Image.Image, longest: int) -> str:
    """An image as a data URI, shrunk to `longest` pixels if it is larger."""
    image = image.copy()
    image.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=JPEG_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()


# --- detections on images


def read_detections(path: Path, data: CocoDataset) -> dict[int, list[dict[str, Any]]]:
    """Detections by image id, best first.

    Raises:
        LpovodError: if one names an image or a category that the split does not have.
    """
    content = read_json(path)
    keys = {"image_id", "category_id", "bbox", "score"}
    found: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for place, result in enumerate(content if isinstance(content, list) else [content]):
        if not isinstance(result, dict) or not keys <= set(result):
            raise LpovodError(
                f"{path}: detection {place} is no COCO result with {', '.join(sorted(keys))}. "
                "Make it again: snakemake --forcerun evaluation"
            )
        for name, known in (("image_id", data.images), ("category_id", data.categories)):
            if result[name] not in known:
                raise LpovodError(
                    f"{path}: detection {place} has {name} {result[name]}, which {data.path} "
                    "lacks. Make it again: snakemake --forcerun evaluation"
                )
        found[result["image_id"]].append(result)
    return {i: sorted(kept, key=lambda r: -r["score"]) for i, kept in found.items()}


def choose_images(data: CocoDataset, base: list[str], novel: list[str], count: int) -> list[int]:
    """Ids of images whose novel objects are many and spread over the classes.

    Annotations alone decide, never detections. One after the other, the image is taken that adds
    most: an object of a class counts the less, the more of the class is already shown.
    """
    wanted, named = set(data.category_ids(novel)), set(data.category_ids([*base, *novel]))
    objects = {i: data.boxes(i)[1].tolist() for i in data.images}
    counts = {i: Counter(c for c in found if c in wanted) for i, found in objects.items()}
    readable = {
        i: sum(c in named for c in found) <= READABLE_OBJECTS for i, found in objects.items()
    }
    shown: Counter[int] = Counter()

    def worth(image_id: int) -> tuple[bool, float, int]:
        # Of a class no more than two objects count: a flock is no variety.
        added = sum(min(n, 2) / (1 + shown[c]) for c, n in counts[image_id].items())
        return readable[image_id], added, -image_id

    left = {i for i, of_image in counts.items() if of_image}
    chosen: list[int] = []
    while left and len(chosen) < count:
        chosen.append(max(left, key=worth))
        left.remove(chosen[-1])
        shown.update(counts[chosen[-1]])
    return chosen


def draw_scene(
    data: CocoDataset,
    image_id: int,
    results: list[dict[str, Any]],
    base: list[str],
    novel: list[str],
) -> dict[str, Any]:
    """An image with its annotated boxes and as many of its best detections, and two more.

    Returns:
        the image as a data URI, and boxes in the overlay's units with the places of their labels.
    """
    size = data.images[image_id]
    scale = SCENE_UNITS / size["width"]
    width, height = SCENE_UNITS, size["height"] * scale
    named = {i: c["name"] for i, c in data.categories.items() if c["name"] in {*base, *novel}}
    objects = [
        a for a in data.annotations[image_id] if a["category_id"] in named and not a.get("iscrowd")
    ]

    def box(item: dict[str, Any]) -> dict[str, Any]:
        name = named[item["category_id"]]
        return {"name": name, "novel": name in novel, "box": [scale * v for v in item["bbox"]]}

    shown = [r for r in results if r["category_id"] in named][: len(objects) + 2]
    detections = [box(r) | {"score": r["score"]} for r in shown]
    labels = place_labels(
        [d["box"] for d in detections],
        [f"{d['name']} {d['score']:.2f}" for d in detections],
        width,
        height,
    )
    counted = Counter(named[a["category_id"]] for a in objects)
    return {
        "image_id": image_id,
        "uri": jpeg_uri(Image.fromarray(data.load(image_id)), SCENE_PIXELS),
        "size": (width, height),
        "objects": [box(a) for a in objects],
        "detections": [d | {"label": label} for d, label in zip(detections, labels, strict=True)],
        "annotated": sorted(counted.items(), key=lambda item: (item[0] not in novel, item[0])),
        "novel": set(novel),
    }


Rectangle = tuple[float, float, float, float]


def place_labels(
    boxes: list[list[float]], texts: list[str], width: float, height: float
) -> list[dict[str, Any]]:
    """Where labels go: the first place at their box that covers no label placed before.

    Args:
        boxes: xywh in the overlay's units, the most important first.
        texts: what the labels say.
        width: of the overlay.
        height: of the overlay.

    Returns:
        x, y, width and text of each label.
    """
    taken: list[Rectangle] = []
    labels, up = [], LABEL_HEIGHT
    for (x, y, w, h), text in zip(boxes, texts, strict=True):
        wide = _text_width(text)
        places = [
            (min(max(0, left), width - wide), min(max(0, top), height - up))
            for top in (y - up, y, y + h, y + h - up, y + h / 2, y - 2 * up, y + h + up)
            for left in (x - 1, x + w + 1 - wide)
        ]
        rectangles = [(px, py, px + wide, py + up) for px, py in places]
        place = min(rectangles, key=lambda r: sum(_shared(r, other) for other in taken))
        taken.append(place)
        labels.append({"x": place[0], "y": place[1], "width": wide, "text": text})
    return labels


def _shared(a: Rectangle, b: Rectangle) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return max(0.0, width) * max(0.0, height)


def _text_width(text: str) -> float:
    """About the width of a text in 11 units of a bold sans serif, with its margins of 4.

    The page states it to the browser, which fits the letters of whatever font it has.
    """
    widths = dict.fromkeys("fijlrtI.:, ", 4.2) | dict.fromkeys("mwMW", 10.2)
    return 8 + sum(widths.get(c, 7.0) for c in text)
