"""The numbers of the report: metrics, mistakes and losses."""

import json
from pathlib import Path
from typing import Any

from lpovod.artifacts import check_made_from
from lpovod.exceptions import LpovodError, existing
from lpovod.measures.ablations import ROWS, read_metrics
from lpovod.measures.mistakes import KINDS

METHODS = ("full", "without_probe", "without_clip_head")
"""Rows of the metrics whose mistakes are shown."""

# --- numbers


def read_measured(path: Path, val: Path) -> dict[str, Any]:
    """Read metrics and check that they were measured on this split."""
    content = read_metrics(path)
    if made_from := content.get("made_from"):
        ident = {"stage": "evaluation", "inputs": made_from}
        check_made_from(path, ident, "dataset", val)
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


def class_rows(measured: dict[str, Any]) -> dict[str, list[tuple[str, float | None]]]:
    """AP50 by split and class, best first; None for a class without objects."""
    by_class = measured.get("per_class", {})
    return {
        split: sorted(
            ((name, by_class.get(name)) for name in measured["classes"][split]),
            key=lambda item: (-(-1 if item[1] is None else item[1]), item[0]),
        )
        for split in ("novel", "base")
        if by_class
    }


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
