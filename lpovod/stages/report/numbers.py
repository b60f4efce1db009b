"""The numbers of the report: metrics, mistakes and losses."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from lpovod.artifacts import check_made_from
from lpovod.exceptions import LpovodError, existing
from lpovod.measures.ablations import ROWS, read_metrics
from lpovod.measures.mistakes import KINDS

METHODS = ("full", "without_probe", "without_clip_head")
"""Rows of the metrics whose mistakes are shown."""

# --- numbers


def read_measured(path: Path, val: Path, base: list[str], novel: list[str]) -> dict[str, Any]:
    """Read metrics and check that they were measured on this split, with these classes."""
    content = read_metrics(path)
    if made_from := content.get("made_from"):
        ident = {"stage": "evaluation", "inputs": made_from}
        check_made_from(path, ident, "dataset", val)
    classes = content.get("classes", {})
    if any(set(classes.get(s, ())) != set(n) for s, n in (("base", base), ("novel", novel))):
        raise LpovodError(
            f"{path} was measured with other classes than this run has. Make it again: "
            "snakemake --forcerun evaluation"
        )
    return content


def table_rows(measured: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of the AP table: name, explanation, novel, base, all, and the difference in novel AP50.

    Rows that the metrics lack are left out; rows without an entry in `ROWS` come last.
    """
    measured_rows = measured["rows"]
    full, rows = measured_rows["full"]["novel"], []
    unknown = sorted(set(measured_rows) - set(ROWS))
    for key in [*(k for k in ROWS if k in measured_rows), *unknown]:
        name, why = ROWS.get(key, (key.replace("_", " "), ""))
        row = measured_rows[key]
        if "temperature" in row:
            why = f"temperature {row['temperature']:g}: {why}"
        difference = None if full is None or row["novel"] is None else row["novel"] - full
        labels = {"key": key, "name": _title(name), "why": why}
        rows.append({**row, **labels, "difference": difference})
    return rows


def _title(name: str) -> str:
    return name[:1].upper() + name[1:]


def class_rows(
    names: list[str], by_class: dict[str, float], train: Counter[str], val: Counter[str]
) -> list[dict[str, Any]]:
    """The classes, best first: name, AP50 (None if it was not measured) and annotated boxes.

    Args:
        names: of the classes.
        by_class: AP50 of the classes that have an object.
        train: annotated training boxes by class.
        val: annotated validation boxes by class.
    """
    ranked = sorted(names, key=lambda name: (-by_class.get(name, -1.0), name))
    return [
        {"name": name, "ap": by_class.get(name), "train": train[name], "val": val[name]}
        for name in ranked
    ]


def recall_table(
    recall: dict[str, dict[str, float]], per_image: int
) -> tuple[list[str], dict[str, list[float | None]]]:
    """Recall of the proposals that are used: heads of the columns, and values of each split.

    Args:
        recall: percent by split and number of proposals; without a split that has no object.
        per_image: number of proposals per image that are used. A column beyond it shows them all.

    Returns:
        no columns if there is no recall at all; None for a value that was not measured.
    """
    heads: dict[str, str] = {}
    for n in sorted({int(n) for values in recall.values() for n in values}):
        heads.setdefault(f"n = {n}" if n < per_image else f"all {per_image}", str(n))
    rows = {
        split: [recall.get(split, {}).get(n) for n in heads.values()] for split in ("novel", "base")
    }
    return list(heads), rows


def mistake_columns(measured: dict[str, Any]) -> list[tuple[str, dict[str, float]]]:
    """Percent of every kind of mistake, for each measured method."""
    counted = measured.get("novel_mistakes", {})
    return [
        (_title(ROWS[name][0]), {kind: counted[name].get(kind, 0.0) for kind in KINDS})
        for name in METHODS
        if sum(counted.get(name, {}).values()) > 0
    ]


def loss_curves(history: Path) -> list[dict[str, Any]]:
    """One curve per named loss, preceded by their sum if there are several.

    Returns:
        name, values by epoch, epochs, and points in the unit square (y downwards, zero at 1).
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
    text = existing(path).read_text()
    lines: list[dict[str, float]] = []
    for place, line in enumerate(filter(str.strip, text.splitlines()), start=1):
        try:
            losses = {name: float(value) for name, value in json.loads(line).items()}
        except (ValueError, AttributeError, TypeError):
            raise LpovodError(
                f"{path}: line {place} is not an epoch's json: {line[:60]!r}"
            ) from None
        if "epoch" not in losses or (lines and losses.keys() != lines[0].keys()):
            raise LpovodError(
                f"{path}: line {place} lacks the epoch or has other losses than line 1"
            )
        lines.append(losses)
    return lines


def _unit_square(values: list[float]) -> list[tuple[float, float]]:
    top = max(max(values), 1e-12)
    last = max(1, len(values) - 1)
    return [(n / last, 1 - max(0.0, value) / top) for n, value in enumerate(values)]
