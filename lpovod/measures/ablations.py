"""The full method and its ablations: their names, their settings, and the table of their AP50.

Needs no torch: the workflow prints the table at its end.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lpovod.artifacts import read_json
from lpovod.config import EvaluationSettings
from lpovod.exceptions import LpovodError

SPLITS = ("novel", "base", "all")

ROWS = {
    "full": ("full method", "probe and CLIP head, with objectness, on refined boxes"),
    "without_probe": ("CLIP head alone", "novel scores from the distilled CLIP head (beta = 0)"),
    "without_probe_best_temperature": (
        "CLIP head alone, best temperature",
        "the best of several temperatures, chosen on these very images",
    ),
    "without_clip_head": ("probe alone", "novel scores from the linear probe (beta = 1)"),
    "without_objectness": ("no objectness", "scores ignore how well a box fits"),
    "without_probe_and_objectness": (
        "CLIP head alone, no objectness",
        "the effect of objectness on the CLIP head",
    ),
    "without_box_refinement": ("raw boxes", "unrefined proposals"),
    "without_probe_and_box_refinement": (
        "CLIP head alone, raw boxes",
        "the effect of box refinement on the CLIP head",
    ),
    "true_clip_without_probe": (
        "CLIP itself on crops",
        "CLIP on the crops, in place of the head that imitates it",
    ),
    "true_clip_with_probe": ("CLIP itself and probe", "CLIP on the crops, with the probe"),
}
"""Name and explanation of every row of the metrics, in the order of the table."""


@dataclass(frozen=True)
class Variant:
    """The settings that turn raw scores into detections: the full method, or one of its ablations.

    Attributes:
        alpha: weight of the CLIP head in base scores.
        beta: weight of the probe in novel scores.
        temperature: softmax temperature over cosines.
        objectness: whether the score includes objectness.
        refined: whether boxes are refined.
        true_clip: whether CLIP on crops replaces the CLIP head.
    """

    alpha: float
    beta: float
    temperature: float
    objectness: bool = True
    refined: bool = True
    true_clip: bool = False

    def probe_weights(self, base: int, novel: int) -> list[float]:
        """Weight of the linear classifier in the score of each class: base classes, then novel."""
        return [1 - self.alpha] * base + [self.beta] * novel


def variants(
    settings: EvaluationSettings, temperature: float, true_clip: bool
) -> dict[str, Variant]:
    """The method and its ablations, by their names in the metrics."""
    full = Variant(settings.alpha, settings.beta, temperature)
    rows = {
        "full": full,
        "without_probe": replace(full, beta=0.0),
        "without_clip_head": replace(full, beta=1.0),
        "without_objectness": replace(full, objectness=False),
        "without_probe_and_objectness": replace(full, beta=0.0, objectness=False),
        "without_box_refinement": replace(full, refined=False),
        "without_probe_and_box_refinement": replace(full, beta=0.0, refined=False),
    }
    if true_clip:
        rows["true_clip_without_probe"] = replace(full, beta=0.0, true_clip=True)
        rows["true_clip_with_probe"] = replace(full, true_clip=True)
    return rows


def read_metrics(path: Path) -> dict[str, Any]:
    """The metrics that stage `evaluation` wrote.

    Raises:
        LpovodError: if the file has a different layout.
    """
    content = read_json(path)
    rows = content.get("rows") if isinstance(content, dict) else None
    full = rows.get("full") if isinstance(rows, dict) else None
    if not isinstance(full, dict) or not set(SPLITS) <= set(full):
        raise LpovodError(
            f"{path} has no rows.full with {', '.join(SPLITS)}. Make it again: "
            "snakemake --forcerun evaluation"
        )
    return content


def table(metrics: dict[str, Any]) -> str:
    """AP50 of the method and its ablations, in percent."""
    lines = [f"{'AP50':36}" + "".join(f"{split:>8}" for split in SPLITS)]
    for key, (name, _) in ROWS.items():
        if row := metrics["rows"].get(key):
            cells = ("-" if row[s] is None else f"{row[s]:.1f}" for s in SPLITS)
            lines.append(f"{name:36}" + "".join(f"{cell:>8}" for cell in cells))
    return "\n".join(lines)
