"""Stage `report`: all results of a run on one page that opens offline.

This package gathers facts, numbers, crops and overlays; its `template.html.jinja` lays them out.
Images are inline JPEGs under SVG overlays, charts are SVG or plain boxes: the page loads nothing
and needs no script. With many classes, `classes.js` makes their tables sortable and searchable;
crops and pictures have a budget, and the tables hold all classes. The same inputs give the same
bytes, except for what the page says of its own making (`made`). Needs no torch.
"""

from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any

from lpovod.artifacts import atomic
from lpovod.config import Config
from lpovod.formats.benchmarks import stage_times
from lpovod.formats.coco import CocoDataset, read_dataset
from lpovod.measures.mistakes import KINDS
from lpovod.pages import templates
from lpovod.progress import log
from lpovod.stages.report.facts import box_counts, changed_settings, measured_on, run_facts
from lpovod.stages.report.made import Made, made_now
from lpovod.stages.report.numbers import (
    class_rows,
    loss_curves,
    mistake_columns,
    read_measured,
    recall_table,
    table_rows,
)
from lpovod.stages.report.retrieved import choose_classes, draw_crops, read_labels, retrieved
from lpovod.stages.report.scenes import (
    OPEN_SCENES,
    WITHOUT_OBJECTS,
    choose_scenes,
    detected_in,
    draw_scenes,
    drawn_names,
    read_detections,
)

TEMPLATE = "template.html.jinja"
SCRIPT = "classes.js"
OPEN_CLASSES = 30  # of each list of classes; a page with more folds the others away


def write_report(
    run: Config,
    train: Path,
    truth: Path,
    pseudo_labels: list[Path],
    detector_history: Path,
    benchmarks: Path,
    output: Path,
    metrics: Path | None = None,
    detections: Path | None = None,
    val: Path | None = None,
    proposals_history: Path | None = None,
) -> None:
    """Write the page.

    Args:
        run: the run's configuration.
        train: json of the training split; retrieved regions are cropped from its images.
        truth: annotations of all classes in the training images, to judge retrieved regions.
        pseudo_labels: the file of stage `pseudo_labels`; empty if nothing was retrieved.
        detector_history: one JSON line per epoch: ``epoch`` and named losses.
        benchmarks: folder with Snakemake's benchmark files (seconds, MiB), read recursively.
        output: one html file.
        metrics: json of stage `evaluation`, in percent. This and the next two are given together,
            or not at all: a run without a validation split measures nothing.
        detections: COCO results of the full method on `val`.
        val: json of the validation split, with all classes annotated.
        proposals_history: history of the proposal network, if one was trained.

    Raises:
        LpovodError: if files contradict one another or cannot be read.
    """
    base, novel = run.classes.base, run.classes.novel
    annotated = read_dataset(truth)
    known = annotated.of_classes(base, novel)
    data = read_dataset(val).of_classes(base, novel) if val else None
    measured = read_measured(metrics, val, base, novel) if metrics and val else None
    in_train, in_val = box_counts(known), box_counts(data) if data else Counter()
    by_class = measured.get("per_class", {}) if measured else {}
    judged = retrieved(read_labels(pseudo_labels, train), novel, annotated)
    pictures = _pictures(run, data, detections) if data and detections else None
    page = {
        "run": run,
        "facts": run_facts(run, known, data),
        "changed": changed_settings(run),
        "classes": {
            split: class_rows(names, by_class, in_train, in_val)
            for split, names in (("novel", novel), ("base", base))
        },
        "regions": {c["name"]: {"count": len(c["regions"]), "purity": c["purity"]} for c in judged},
        "measured": _measurement(run, measured) if measured else None,
        "pictures": pictures,
        "curves": {
            "Proposal network": loss_curves(proposals_history) if proposals_history else None,
            "Detector": loss_curves(detector_history),
        },
        "retrieved": _retrieved(run, judged, train),
        "stages": stage_times(benchmarks),
    }
    with atomic(output) as partial:
        partial.write_text(render(page, made_now(run.gpu)), encoding="utf-8")
    log.info(f"{output}: {output.stat().st_size / 1e6:.1f} MB")


def _measurement(run: Config, measured: dict[str, Any]) -> dict[str, Any]:
    heads, recall = recall_table(measured.get("proposal_recall", {}), run.proposals.per_image)
    return {
        "means": measured["rows"]["full"],
        "on": measured_on(measured.get("evaluated", {})),
        "rows": table_rows(measured),
        "temperature": measured.get("temperature"),
        "recall_heads": heads,
        "recall": recall,
        "mistakes": mistake_columns(measured),
        "kinds": KINDS,
        "made_from": measured.get("made_from", {}),
    }


def _pictures(run: Config, data: CocoDataset, detections: Path) -> dict[str, Any]:
    base, novel = run.classes.base, run.classes.novel
    by_image = read_detections(detections, data)
    scenes = choose_scenes(data, by_image, base, novel, run.report.images)
    # What many classes add to the pictures of the setting is smaller: a photograph has 100 kB.
    large = min(OPEN_SCENES, run.report.images) if len(novel) > OPEN_CLASSES else OPEN_SCENES
    detected, drawn = detected_in(data, by_image), drawn_names(data, scenes)
    return {
        "scenes": draw_scenes(data, scenes, novel, large),
        "open": OPEN_SCENES,
        "without_objects": WITHOUT_OBJECTS,
        "anything": bool(by_image),
        "detected": detected,
        "undetected": [name for name in novel if name not in detected],
        "not_drawn": sum(name in detected and name not in drawn for name in novel),
    }


def _retrieved(run: Config, judged: list[dict[str, Any]], train: Path) -> dict[str, Any]:
    groups = choose_classes(judged, OPEN_CLASSES)
    chosen = [c for group in groups.values() for c in group]
    purities = [c["purity"] for c in judged if c["purity"] is not None]
    return {
        "groups": groups,
        "crops": draw_crops(read_dataset(train), chosen, run.report.crops_per_class),
        "classes": len(judged),
        "regions": sum(len(c["regions"]) for c in judged),
        "without_region": sum(not c["regions"] for c in judged),
        "median_purity": median(purities) if purities else None,
    }


def render(page: dict[str, Any], made: Made) -> str:
    """Fill the template.

    Args:
        page: what `write_report` gathers.
        made: date, code and machine; equal values give an equal page.
    """
    environment = templates(Path(__file__).parent)
    environment.filters |= {"number": number, "signed": signed, "duration": duration}
    many = any(len(listed) > OPEN_CLASSES for listed in page["classes"].values())
    script = (Path(__file__).parent / SCRIPT).read_text(encoding="utf-8") if many else None
    return environment.get_template(TEMPLATE).render(
        page, made=made, shown=OPEN_CLASSES, script=script
    )


def number(value: float | None, digits: int = 1) -> str:
    """A number, or a dash if there is none."""
    return "–" if value is None else f"{value:.{digits}f}"


def signed(value: float | None) -> str:
    """A difference with its sign; zero has no sign."""
    if value is None:
        return "–"
    rounded = round(value, 1)
    return f"{abs(rounded):.1f}" if rounded == 0 else f"{'+' if rounded > 0 else '−'}{abs(rounded)}"


def duration(seconds: float) -> str:
    """Seconds in the one or two largest units that fit."""
    if seconds < 59.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02} s"
    return f"{minutes // 60} h {minutes % 60:02} min"
