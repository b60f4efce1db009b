"""The result of a run in a few lines of text."""

from pathlib import Path

from lpovod.artifacts import read_json

ROW_NAMES = {
    "AP50": "full method",
    "without_probe": "CLIP head alone",
    "without_probe_best_temperature": "CLIP head alone, best temperature",
    "without_clip_head": "probe alone",
    "without_objectness": "without objectness",
    "without_probe_and_objectness": "CLIP head alone, no objectness",
    "without_box_refinement": "raw boxes",
    "without_probe_and_box_refinement": "CLIP head alone, raw boxes",
    "true_clip_without_probe": "CLIP itself on crops",
    "true_clip_with_probe": "CLIP itself and probe",
}


def table(metrics: dict) -> str:
    """AP50 of the method and of its ablations, in percent."""
    lines = [f"{'AP50':36}{'novel':>8}{'base':>8}{'all':>8}"]
    for key, name in ROW_NAMES.items():
        if key in metrics:
            numbers = (metrics[key][split] for split in ("novel", "base", "all"))
            cells = ("-" if n is None else f"{n:.1f}" for n in numbers)
            lines.append(f"{name:36}" + "".join(f"{cell:>8}" for cell in cells))
    return "\n".join(lines)


def print_summary(metrics: Path, report: Path) -> None:
    """Print the table and where the page is, if the run made them."""
    if metrics.exists():
        print(table(read_json(metrics)))
    if report.exists():
        print(f"\nReport: {report}")
