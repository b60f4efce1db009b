"""The miniature world: drawn images of pictograms with exact boxes, in place of COCO.

An image holds a few *items* on a cluttered ground. An item is one pictogram, or a cluster of two to
four touching pictograms of one class; some pictograms carry a smaller copy of themselves. So the
world has every kind of badly placed box that a detector meets in photographs: too tight (the copy,
or one part), too loose, and around a group.

Novel classes consist of parts that look like whole base objects: a house is a square under a
triangle, a fish a disk before a triangle. A class-agnostic proposal network that was trained on
base objects therefore fires on the parts of novel objects, as OLN does on photographs.

Imports only numpy and Pillow, because Snakemake imports it while it builds the graph.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from lpovod.miniature.pictograms import (
    ACCENT,
    CLASSES,
    DISTRACTORS,
    MAIN,
    PICTOGRAMS,
    POINTS,
    STARTS,
    TONES,
    turned,
)

Box = tuple[float, float, float, float]
Colour = tuple[float, float, float]
IMAGE_SIZE = 160
CLUSTER_PROBABILITY = 0.52  # half of the items in the end, since some members find no room
SINGLE_SIDES = (28, 72)  # longest side in pixels
MEMBER_SIDES = (22, 44)
LARGEST_OCCLUSION = 0.08  # fraction of a cluster member that later members may hide
PLACEMENT_TRIES = 14
CONTRAST = 170  # sum over RGB of the absolute difference between neighbouring colours

# Scenes are drawn at twice the resolution and averaged at the end, which smooths the outlines.
_SUPERSAMPLING = 2

_CANVAS = IMAGE_SIZE * _SUPERSAMPLING


# -------------------------------------------------------------------------------------- one scene


@dataclass(frozen=True)
class DrawnObject:
    """One pictogram of a scene. Boxes are xyxy, whole pixels of the image, half-open."""

    name: str
    box: Box  # tight around the visible pixels of the object
    area: float  # visible area in pixels of the image, in steps of 0.25
    item: int  # number of the item; objects of one cluster share it
    parts: tuple[Box, ...]  # of the drawn polygons, without holes; empty for classes of one part
    copy: Box | None  # of the smaller copy inside the object
    colour: Colour  # RGB of the main part


@dataclass(frozen=True)
class Scene:
    image: np.ndarray  # (IMAGE_SIZE, IMAGE_SIZE, 3) uint8 RGB
    objects: tuple[DrawnObject, ...]
    visible: np.ndarray  # (2 IMAGE_SIZE, 2 IMAGE_SIZE) uint8: 1 + index of the object, 0 = ground


class _Stamp(NamedTuple):
    """A pictogram rasterised at canvas resolution, not placed yet."""

    tones: np.ndarray  # (h, w) uint8: 0 transparent, 1-3 the object's tones, 4-7 the copy's
    parts: np.ndarray  # (parts, 4) xyxy within the stamp
    copy: np.ndarray | None


def _canvas_points(
    name: str, side: float, rotation: float, aspect: float, flipped: bool
) -> np.ndarray:
    """All corners of a rotated pictogram, (n, 2), from the origin; its longest side is `side`."""
    stretch = np.array([aspect * (-1 if flipped else 1), 1 / aspect])
    points = turned(POINTS[name] * stretch, rotation)
    points -= points.min(0)
    points *= side / points.max()
    return points


def _fill(name: str, points: np.ndarray) -> np.ndarray:
    """The tone of each pixel, (h, w) uint8; parts are drawn in order."""
    width, height = points.max(0).tolist()
    tones = Image.new("L", (math.ceil(width) + 1, math.ceil(height) + 1))
    brush = ImageDraw.Draw(tones)
    flat, ends = points.ravel().tolist(), pairwise([*STARTS[name], len(points)])
    for part, (start, end) in zip(PICTOGRAMS[name], ends, strict=True):
        brush.polygon(flat[2 * start : 2 * end], fill=part.tone)
    return np.array(tones)


def _part_boxes(name: str, points: np.ndarray) -> np.ndarray:
    """xyxy of each part except holes and details, (parts, 4), in the coordinates of `points`."""
    low = np.floor(np.minimum.reduceat(points, STARTS[name]))
    high = np.floor(np.maximum.reduceat(points, STARTS[name])) + 1
    solid = [part.tone in (MAIN, ACCENT) for part in PICTOGRAMS[name]]
    return np.concatenate([low, high], axis=1)[solid]


def _stamp(
    rng: np.random.Generator, name: str, side: float, nested: bool, nuisance: float
) -> _Stamp:
    side *= _SUPERSAMPLING
    rotation, flipped = nuisance * rng.uniform(-30, 30), bool(rng.random() < 0.5)
    aspect = math.exp(nuisance * rng.uniform(-0.22, 0.22))
    points = _canvas_points(name, side, rotation, aspect, flipped)
    tones = _fill(name, points)
    copy = None
    if nested:
        turn = rotation + rng.uniform(-15, 15)
        small = _canvas_points(name, side * rng.uniform(0.36, 0.5), turn, aspect, flipped)
        copy = _nest(rng, tones, _fill(name, small))
    return _Stamp(tones, _part_boxes(name, points), copy)


def _nest(rng: np.random.Generator, tones: np.ndarray, small: np.ndarray) -> np.ndarray:
    """Draw the copy into `tones` near the middle and return its xyxy within the stamp."""
    room = np.array(tones.shape) - small.shape
    # Near the middle, so that the copy never reaches the object's outline, which defines its box.
    y, x = (np.maximum(room, 2) * rng.uniform(0.35, 0.65, 2)).astype(int)
    window = tones[y : y + small.shape[0], x : x + small.shape[1]]
    small = small[: window.shape[0], : window.shape[1]]
    window[small > 0] = small[small > 0] + TONES
    return np.array([x, y, x + small.shape[1], y + small.shape[0]], dtype=np.float64)


def _contrasting(rng: np.random.Generator, *others: Colour) -> Colour:
    """A random RGB colour in contrast to all `others`: the first of ten, or the best of them."""
    best, widest = (0, 0, 0), -1.0
    for candidate in rng.integers(0, 256, (10, 3)).tolist():
        r, g, b = candidate
        gap = min(abs(r - x) + abs(g - y) + abs(b - z) for x, y, z in others)
        if gap > widest:
            best, widest = (r, g, b), gap
        if gap >= CONTRAST:
            break
    return best


def _palette(rng: np.random.Generator, ground: Colour) -> np.ndarray:
    """Colours of the tones, (2 * TONES, 4) uint8 RGBA; the second half colours the copy."""
    main = _contrasting(rng, ground)
    accent = _contrasting(rng, ground, main)
    detail = _contrasting(rng, main, accent)
    copy = _contrasting(rng, main, accent, ground)
    copy_accent = _contrasting(rng, copy, main, ground)
    none = (0, 0, 0)
    tones = [none, main, accent, detail, none, copy, copy_accent, main]
    return np.array([(*tone, 255) for tone in tones], dtype=np.uint8)


def _shading(
    rng: np.random.Generator, shape: tuple[int, int], nuisance: float
) -> np.ndarray | None:
    """A texture that multiplies the colours, (h, w, 1) float32: stripes or a gradient; or None."""
    kind = rng.random()
    if kind < 1 - 0.55 * nuisance:
        return None
    angle = rng.uniform(0, np.pi)
    y = np.arange(shape[0], dtype=np.float32)[:, None] * np.float32(np.sin(angle))
    x = np.arange(shape[1], dtype=np.float32)[None] * np.float32(np.cos(angle))
    depth = np.float32(rng.uniform(0.12, 0.35))
    if kind < 1 - 0.25 * nuisance:
        return (1 - depth * (((x + y) / rng.uniform(5, 11)) % 2 >= 1))[..., None]
    along = x + y
    along = (along - along.min()) / np.float32(np.ptp(along) + 1)
    return (1 - 1.6 * depth * along)[..., None]


def _draw_ground(rng: np.random.Generator, nuisance: float) -> Image.Image:
    """A colour gradient with cluttering lines and irregular blobs, all unlabelled."""
    # With less nuisance the ground is darker, so most objects are lighter than the ground.
    patches = 40 + nuisance * (rng.uniform(40, 215, 3) - 40 + rng.normal(0, 26, (3, 3, 3)))
    ground = Image.fromarray(np.clip(patches, 0, 255).astype(np.uint8))
    ground = ground.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BILINEAR)
    ground = ground.resize((_CANVAS, _CANVAS), Image.Resampling.NEAREST)
    brush = ImageDraw.Draw(ground)
    for _ in range(round(nuisance * int(rng.integers(2, 6)))):
        colour = tuple(rng.integers(0, 256, 3).tolist())
        brush.line(rng.integers(0, _CANVAS, 4).tolist(), colour, int(rng.integers(2, 8)))
    for _ in range(round(nuisance * int(rng.integers(1, 4)))):
        colour = tuple(rng.integers(0, 256, 3).tolist())
        brush.polygon(_blob(rng).ravel().tolist(), fill=colour)
    return ground


def _blob(rng: np.random.Generator) -> np.ndarray:
    """A lobed outline that resembles no pictogram, (n, 2) canvas coordinates."""
    angles = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    lobes = rng.uniform(0.1, 0.35, 3)[:, None] * np.sin(
        np.arange(2, 5)[:, None] * angles + rng.uniform(0, 2 * np.pi, 3)[:, None]
    )
    radius = rng.uniform(8, 34) * np.maximum(1 + lobes.sum(0), 0.15)
    centre = rng.uniform(0, _CANVAS, 2)
    return centre + radius[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _beside(
    rng: np.random.Generator, neighbour: np.ndarray, shape: tuple[int, int]
) -> tuple[int, int]:
    """The x and y at which a stamp of `shape` (h, w) touches a random side of a neighbour's box."""
    x1, y1, x2, y2 = neighbour
    height, width = shape
    overlap = rng.uniform(0, 0.12) * min(height, width)
    along_x = rng.uniform(-0.35, 0.35) * width + (x1 + x2 - width) / 2
    along_y = rng.uniform(-0.35, 0.35) * height + (y1 + y2 - height) / 2
    x, y = [
        (x2 - overlap, along_y),
        (x1 + overlap - width, along_y),
        (along_x, y2 - overlap),
        (along_x, y1 + overlap - height),
    ][rng.integers(4)]
    return int(x), int(y)


class _Canvas:
    """The image under construction, and a map of the object visible at each pixel."""

    def __init__(self, rng: np.random.Generator, nuisance: float) -> None:
        self.rng, self.nuisance = rng, nuisance
        # With four bytes per pixel numpy copies each as one word, in a third of the time.
        self.pixels = np.array(_draw_ground(rng, nuisance).convert("RGBA"))
        self.visible = np.zeros((_CANVAS, _CANVAS), dtype=np.uint8)
        self.placed: list[tuple[str, int, _Stamp, int, int]] = []
        self.colours: list[Colour] = []
        # Areas, drawn and still visible: of the ground (unused, 0) and of each placed object.
        self.drawn = np.zeros(1, dtype=np.int64)
        self.seen = np.zeros(1, dtype=np.int64)

    def place(self, name: str, item: int, stamp: _Stamp, neighbour: int | None) -> bool:
        """Place the stamp anywhere, or touching object `neighbour`; False if there is no room."""
        height, width = stamp.tones.shape
        limit = 0 if neighbour is None else LARGEST_OCCLUSION
        for _ in range(PLACEMENT_TRIES):
            if neighbour is None:
                x = int(self.rng.integers(0, _CANVAS - width))
                y = int(self.rng.integers(0, _CANVAS - height))
            else:
                x, y = _beside(self.rng, self.extent(neighbour), (height, width))
                if x < 0 or y < 0 or x + width > _CANVAS or y + height > _CANVAS:
                    continue
            if self._put(stamp.tones, x, y, limit):
                self.placed.append((name, item, stamp, x, y))
                return True
        return False

    def _put(self, tones: np.ndarray, x: int, y: int, limit: float) -> bool:
        """Add the stamp to the map unless it hides more than `limit` of an earlier object."""
        window = self.visible[y : y + tones.shape[0], x : x + tones.shape[1]]
        # Counting every other pixel of every other row costs a quarter.
        covered = np.bincount(window[::2, ::2][tones[::2, ::2] > 0], minlength=len(self.seen))
        hit = covered > 0
        hit[0] = False
        if np.any((self.seen - covered < (1 - limit) * self.drawn)[hit]):
            return False
        window[tones > 0] = len(self.seen)
        area = covered.sum()
        self.drawn = np.append(self.drawn, area)
        self.seen = np.append(self.seen - covered, area)
        return True

    def extent(self, index: int) -> np.ndarray:
        _, _, stamp, x, y = self.placed[index]
        height, width = stamp.tones.shape
        return np.array([x, y, x + width, y + height])

    def paint(self, index: int, palette: np.ndarray) -> None:
        _, _, stamp, x, y = self.placed[index]
        tones = stamp.tones
        pixels = self.pixels.view(np.uint32)[..., 0]
        window = pixels[y : y + tones.shape[0], x : x + tones.shape[1]]
        self.colours.append(tuple(palette[MAIN, :3].tolist()))
        shading = _shading(self.rng, tones.shape, self.nuisance)
        colours = palette.take(tones, axis=0)
        if shading is not None:
            colours = (colours * shading).astype(np.uint8)
        np.copyto(window, colours.view(np.uint32)[..., 0], where=tones > 0)

    def ground_colour(self, index: int) -> Colour:
        x1, y1, x2, y2 = self.extent(index)
        corners = self.pixels[[y1, y1, y2 - 1, y2 - 1], [x1, x2 - 1, x1, x2 - 1]]
        return tuple(corners[:, :3].mean(0).tolist())


def compose_scene(
    rng: np.random.Generator,
    classes: tuple[str, ...] = CLASSES,
    nuisance: float = 1.0,
    nested: float = 0.4,
    distractors: float = 0.0,
) -> Scene:
    """Draw one image and return it with all annotations; `draw_scene` returns the short form.

    Args:
        rng: the only source of randomness; equal states give equal scenes.
        classes: classes to draw; each item has one of them with equal probability.
        nuisance: strength, 0 to 1, of rotation, aspect, texture, ground and clutter.
        nested: probability that an object carries a smaller copy of itself.
        distractors: probability of each of three further items, which are drawn from
            `DISTRACTORS`.

    Raises:
        ValueError: if a class is not one of `CLASSES`.
    """
    unknown = sorted(set(classes) - set(CLASSES))
    if unknown or not classes:
        raise ValueError(f"cannot draw {unknown or 'no class at all'}; choose from {CLASSES}")
    canvas = _Canvas(rng, nuisance)
    items = int(rng.integers(2, 5))
    for item in range(items):
        _place_item(rng, canvas, item, str(rng.choice(classes)), nested)
    # Draw no random number without distractors, so that a world without them does not change.
    for item in range(items, items + (int(rng.binomial(3, distractors)) if distractors else 0)):
        _place_item(rng, canvas, item, str(rng.choice(DISTRACTORS)), nested)
    _paint_all(rng, canvas)
    image = Image.fromarray(canvas.pixels).convert("RGB").reduce(_SUPERSAMPLING)
    noise = rng.integers(-6, 7, (IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.int16)
    pixels = np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8)
    objects = tuple(_describe(canvas, index) for index in range(len(canvas.placed)))
    return Scene(pixels, objects, canvas.visible)


def _place_item(
    rng: np.random.Generator, canvas: _Canvas, item: int, name: str, nested: float
) -> None:
    members = int(rng.integers(2, 5)) if rng.random() < CLUSTER_PROBABILITY else 1
    low, high = SINGLE_SIDES if members == 1 else MEMBER_SIDES
    side = rng.uniform(low, high)
    first = len(canvas.placed)
    for _ in range(members):
        member_side, with_copy = side * rng.uniform(0.85, 1.15), rng.random() < nested
        stamp = _stamp(rng, name, member_side, with_copy, canvas.nuisance)
        count = len(canvas.placed)
        neighbour = int(rng.integers(first, count)) if count > first else None
        canvas.place(name, item, stamp, neighbour)


def _paint_all(rng: np.random.Generator, canvas: _Canvas) -> None:
    """Paint in order of placement; half of the further members of a cluster get a new palette."""
    shared: dict[int, np.ndarray] = {}
    for index, (_, item, *_) in enumerate(canvas.placed):
        palette = shared.get(item)
        if palette is None or rng.random() < 0.5:
            palette = shared[item] = _palette(rng, canvas.ground_colour(index))
        canvas.paint(index, palette)


def _image_box(x1: float, y1: float, x2: float, y2: float) -> Box:
    """Canvas xyxy → the whole image pixels that the box touches."""
    scale = _SUPERSAMPLING
    return (
        float(x1 // scale),
        float(y1 // scale),
        float(min(-(-x2 // scale), IMAGE_SIZE)),
        float(min(-(-y2 // scale), IMAGE_SIZE)),
    )


def _describe(canvas: _Canvas, index: int) -> DrawnObject:
    name, item, stamp, x, y = canvas.placed[index]
    x1, y1, x2, y2 = canvas.extent(index)
    mask = canvas.visible[y1:y2, x1:x2] == index + 1
    columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
    box = _image_box(x + columns[0], y + rows[0], x + columns[-1] + 1, y + rows[-1] + 1)
    shift = np.array([x, y, x, y])
    parts = [_image_box(*(part + shift)) for part in stamp.parts]
    copy = None if stamp.copy is None else _image_box(*(stamp.copy + shift))
    area = float(mask.sum()) / _SUPERSAMPLING**2
    parts = tuple(parts) if len(parts) > 1 else ()
    return DrawnObject(name, box, area, item, parts, copy, canvas.colours[index])


def draw_scene(
    rng: np.random.Generator, classes: tuple[str, ...] = CLASSES
) -> tuple[np.ndarray, list[tuple[str, Box]]]:
    """Draw one image.

    Returns:
        The image, (160, 160, 3) uint8 RGB, and for each object its class name and its box: xyxy,
        absolute pixels, half-open, tight around the visible pixels of the object.
    """
    scene = compose_scene(rng, classes)
    return scene.image, [(drawn.name, drawn.box) for drawn in scene.objects]
