"""The pictograms of the miniature world: polygons in unit coordinates, filled with tones.

Imports only numpy, because Snakemake reads the class names while it builds the graph.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

HOLE, MAIN, ACCENT, DETAIL = range(4)
TONES = 4


# ------------------------------------------------------------------------------------ pictograms


class Part(NamedTuple):
    """One polygon of a pictogram: unit coordinates with y down, (n, 2), and the tone that fills it.

    Later parts cover earlier ones; the tone `HOLE` is transparent.
    """

    outline: np.ndarray
    tone: int


def _polygon(*points: tuple[float, float]) -> np.ndarray:
    return np.array(points, dtype=np.float64)


def _ellipse(x: float, y: float, rx: float, ry: float | None = None) -> np.ndarray:
    return _arc(x, y, rx, rx if ry is None else ry, 0, 360)


def _arc(x: float, y: float, rx: float, ry: float, start: float, end: float) -> np.ndarray:
    angles = np.deg2rad(np.linspace(start, end, 29))
    return np.stack([x + rx * np.cos(angles), y + ry * np.sin(angles)], axis=1)


def _rectangle(x1: float, y1: float, x2: float, y2: float) -> np.ndarray:
    return _polygon((x1, y1), (x2, y1), (x2, y2), (x1, y2))


def turned(outline: np.ndarray, degrees: float) -> np.ndarray:
    angle = np.deg2rad(degrees)
    cosine, sine = np.cos(angle), np.sin(angle)
    return outline @ np.array([[cosine, sine], [-sine, cosine]])


def _heart() -> np.ndarray:
    t = np.linspace(0, 2 * np.pi, 40)
    x = 16 * np.sin(t) ** 3
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    return np.stack([x, y], axis=1) / 16


def _moon() -> np.ndarray:
    return np.concatenate([_arc(0, 0, 1, 1, -120, 120)[::-1], _arc(-0.75, 0, 0.9, 0.9, -74, 74)])


def _flower() -> list[Part]:
    petals = [Part(turned(_ellipse(0.62, 0, 0.4, 0.26), 60 * k), MAIN) for k in range(6)]
    return [*petals, Part(_ellipse(0, 0, 0.3), ACCENT)]


def _tree() -> list[Part]:
    crown = [(-0.45, -0.1, 0.45), (0.45, -0.1, 0.45), (0, -0.55, 0.45), (0, 0, 0.4)]
    leaves = [Part(_ellipse(x, y, r), MAIN) for x, y, r in crown]
    return [Part(_rectangle(-0.16, 0.1, 0.16, 1), ACCENT), *leaves]


def _star() -> list[Part]:
    ray = _polygon((-0.34, -0.42), (0.34, -0.42), (0, -1.05))
    rays = [Part(turned(ray, 72 * k), ACCENT) for k in range(5)]
    return [*rays, Part(_ellipse(0, 0, 0.5), MAIN)]


PICTOGRAMS: dict[str, list[Part]] = {
    "square": [Part(_rectangle(-1, -1, 1, 1), MAIN)],
    "triangle": [Part(_polygon((-1, 0.85), (1, 0.85), (0, -0.85)), MAIN)],
    "disk": [Part(_ellipse(0, 0, 1), MAIN)],
    "cross": [
        Part(_rectangle(-0.32, -1, 0.32, 1), MAIN),
        Part(_rectangle(-1, -0.32, 1, 0.32), MAIN),
    ],
    "heart": [Part(_heart(), MAIN)],
    "arrow": [
        Part(_rectangle(-1, -0.22, 0.2, 0.22), MAIN),
        Part(_polygon((0.1, -0.75), (1, 0), (0.1, 0.75)), MAIN),
    ],
    "moon": [Part(_moon(), MAIN)],
    "crown": [
        Part(
            _polygon((-1, 0.7), (-1, -0.7), (-0.5, 0), (0, -0.8), (0.5, 0), (1, -0.7), (1, 0.7)),
            MAIN,
        ),
        Part(_rectangle(-1, 0.4, 1, 0.7), ACCENT),
    ],
    "flower": _flower(),
    "tree": _tree(),
    "key": [
        Part(_rectangle(-0.2, -0.14, 1, 0.14), MAIN),
        Part(_rectangle(0.72, 0, 0.92, 0.5), MAIN),
        Part(_rectangle(0.36, 0, 0.56, 0.42), MAIN),
        Part(_ellipse(-0.5, 0, 0.5), MAIN),
        Part(_ellipse(-0.5, 0, 0.22), HOLE),
    ],
    "mushroom": [
        Part(_polygon((-0.25, 0), (0.25, 0), (0.36, 0.9), (-0.36, 0.9)), ACCENT),
        Part(_arc(0, 0.1, 1, 1, 180, 360), MAIN),
        Part(_ellipse(-0.4, -0.3, 0.15), DETAIL),
        Part(_ellipse(0.35, -0.4, 0.18), DETAIL),
    ],
    # Novel. Every part covers less than half of the object's box: detecting a part is a mistake.
    "star": _star(),
    "ring": [
        Part(_ellipse(0, 0.25, 0.78), MAIN),
        Part(_ellipse(0, 0.25, 0.46), HOLE),
        Part(_ellipse(0, -0.62, 0.4), ACCENT),
    ],
    "bolt": [
        Part(_polygon((0.4, -1), (-0.75, 0.15), (0.2, 0.15)), MAIN),
        Part(_polygon((-0.4, 1), (0.75, -0.15), (-0.2, -0.15)), ACCENT),
    ],
    "house": [
        Part(_rectangle(-0.56, -0.12, 0.56, 0.95), MAIN),
        Part(_rectangle(-0.17, 0.4, 0.17, 0.95), DETAIL),
        Part(_polygon((-1, -0.1), (1, -0.1), (0, -1)), ACCENT),
    ],
    "fish": [
        Part(_polygon((0.2, 0), (1, -0.72), (1, 0.72)), ACCENT),
        Part(_ellipse(-0.35, 0, 0.65, 0.48), MAIN),
        Part(_ellipse(-0.62, -0.12, 0.12), DETAIL),
    ],
    "cup": [
        Part(_ellipse(0.5, -0.15, 0.5, 0.45), ACCENT),
        Part(_ellipse(0.5, -0.15, 0.28, 0.23), HOLE),
        Part(_ellipse(-0.1, 0.68, 0.92, 0.24), ACCENT),
        Part(_rectangle(-0.65, -0.75, 0.35, 0.55), MAIN),
        Part(_rectangle(-0.65, -0.5, 0.35, -0.32), DETAIL),
    ],
}

# Things of no class, never annotated, like most things in a photograph. They share their parts with
# the novel classes. CLIP has never seen them and still gives them one of its names.
_DISTRACTORS: dict[str, list[Part]] = {
    "cone": [
        Part(_polygon((-0.6, -0.1), (0.6, -0.1), (0, 1)), ACCENT),
        Part(_ellipse(0, -0.4, 0.66), MAIN),
    ],
    "frame": [
        Part(_rectangle(-1, -0.8, 1, 0.8), MAIN),
        Part(_rectangle(-0.6, -0.4, 0.6, 0.4), HOLE),
    ],
    "hourglass": [
        Part(_polygon((-0.7, -1), (0.7, -1), (0, 0.1)), MAIN),
        Part(_polygon((-0.7, 1), (0.7, 1), (0, -0.1)), ACCENT),
    ],
    "gear": [
        *(Part(turned(_rectangle(-0.18, -1, 0.18, 1), 45 * k), ACCENT) for k in range(4)),
        Part(_ellipse(0, 0, 0.68), MAIN),
        Part(_ellipse(0, 0, 0.24), HOLE),
    ],
    "bottle": [
        Part(_rectangle(-0.2, -1, 0.2, -0.2), ACCENT),
        Part(_rectangle(-0.48, -0.3, 0.48, 1), MAIN),
        Part(_rectangle(-0.48, 0.1, 0.48, 0.6), DETAIL),
    ],
    "dumbbell": [
        Part(_rectangle(-0.6, -0.12, 0.6, 0.12), ACCENT),
        Part(_ellipse(-0.62, 0, 0.38, 0.5), MAIN),
        Part(_ellipse(0.62, 0, 0.38, 0.5), MAIN),
    ],
}

CLASSES, DISTRACTORS = tuple(PICTOGRAMS), tuple(_DISTRACTORS)
PICTOGRAMS |= _DISTRACTORS

# Gaps, as in COCO: code that mistakes an id for a row number fails here, not at full scale.
CATEGORY_IDS = {name: 3 * position + 2 for position, name in enumerate(CLASSES)}

# One array of corners per pictogram, so that one operation rotates or scales all of it.
POINTS = {
    name: np.concatenate([part.outline for part in parts]) for name, parts in PICTOGRAMS.items()
}

STARTS = {
    name: np.cumsum([0] + [len(part.outline) for part in parts[:-1]]).tolist()
    for name, parts in PICTOGRAMS.items()
}

BASE_CLASSES, NOVEL_CLASSES = CLASSES[:12], CLASSES[12:]
