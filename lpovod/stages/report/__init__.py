"""Stage `report`: all results of a run on one page that opens offline.

This package gathers numbers, crops and overlays; its `template.html.jinja` lays them out. Images
are inline JPEGs under SVG overlays, charts are SVG or plain boxes: the page loads nothing and needs
no script, and the same inputs give the same bytes. Needs no torch.
"""

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from lpovod import __version__
from lpovod.artifacts import atomic
from lpovod.config import ReportSettings
from lpovod.drawing import choose_images
from lpovod.formats.benchmarks import stage_times
from lpovod.formats.coco import read_dataset
from lpovod.measures.mistakes import KINDS
from lpovod.progress import log
from lpovod.stages.report.numbers import (
    class_rows,
    loss_curves,
    mistake_columns,
    read_measured,
    table_rows,
)
from lpovod.stages.report.retrieved import retrieved
from lpovod.stages.report.scenes import draw_scene, read_detections

TEMPLATE = "template.html.jinja"


def write_report(
    metrics: Path,
    detections: Path,
    val: Path,
    train: Path,
    truth: Path,
    pseudo_labels: list[Path],
    detector_history: Path,
    benchmarks: Path,
    settings: ReportSettings,
    output: Path,
    proposals_history: Path | None = None,
) -> None:
    """Write the page.

    Args:
        metrics: json of stage `evaluation`, in percent.
        detections: COCO results of the full method on `val`.
        val: json of the evaluated split, with all classes annotated.
        train: json of the training split; retrieved regions are cropped from its images.
        truth: annotations of all classes in the training images, to judge retrieved regions.
        pseudo_labels: one file per novel class; empty if nothing was retrieved.
        detector_history: one JSON line per epoch: ``epoch`` and named losses.
        benchmarks: folder with Snakemake's benchmark files (seconds, MiB), read recursively.
        settings: settings of this stage.
        output: one html file.
        proposals_history: history of the proposal network, if one was trained.

    Raises:
        LpovodError: if files contradict one another or cannot be read.
    """
    measured = read_measured(metrics, val)
    data = read_dataset(val)
    novel, base = measured["classes"]["novel"], measured["classes"]["base"]
    by_image = read_detections(detections, data)
    page = {
        "run": metrics.resolve().parent.parent.name,
        "measured": measured,
        "rows": table_rows(measured),
        "classes": class_rows(measured),
        "recall": measured.get("proposal_recall", {}),
        "mistakes": mistake_columns(measured),
        "kinds": KINDS,
        "curves": [
            ("Proposal network", loss_curves(proposals_history) if proposals_history else []),
            ("Detector", loss_curves(detector_history)),
        ],
        "retrieved": retrieved(pseudo_labels, novel, train, truth, settings.crops_per_class),
        "anything_found": bool(by_image),
        "scenes": [
            draw_scene(data, image_id, by_image.get(image_id, []), base, novel)
            for image_id in choose_images(data, base, novel, settings.images)
        ],
        "val_images": len(data.images),
        "stages": stage_times(benchmarks),
        "version": __version__,
    }
    with atomic(output) as partial:
        partial.write_text(render(page), encoding="utf-8")
    log.info(f"{output}: {output.stat().st_size / 1e6:.1f} MB")


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
