"""Training crops of the small CLIP, cut from drawn scenes, from tight to loose."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lpovod.miniature.pictograms import CLASSES
from lpovod.miniature.scenes import IMAGE_SIZE, Box, DrawnObject, Scene, compose_scene
from lpovod.miniature.split import scene_rng
from lpovod.progress import progress
from lpovod.stages.small_clip.captions import BACKGROUND, COLOUR_VALUES

# ------------------------------------------------------------------------------------- crops


@dataclass(frozen=True)
class Crops:
    pixels: Tensor  # (N, 3, S, S) uint8
    classes: Tensor  # (N,) int64 index into CLASSES, or BACKGROUND
    colours: Tensor  # (N,) int64 index into COLOURS, -1 on the background


def crop(image: Image.Image, box: Box, size: int) -> np.ndarray:
    """CLIP's preprocessing of a box, (size, size, 3) uint8.

    Whole pixels around the box, clipped to the image; bicubic with antialias to shorter side
    `size`; the middle square.
    """
    x1, y1 = (max(math.floor(value), 0) for value in box[:2])
    x2, y2 = min(math.ceil(box[2]), image.width), min(math.ceil(box[3]), image.height)
    width, height = x2 - x1, y2 - y1
    shorter = min(width, height)
    new = (int(size * width / shorter), int(size * height / shorter))
    resized = image.crop((x1, y1, x2, y2)).resize(new, Image.Resampling.BICUBIC)
    left, top = round((new[0] - size) / 2), round((new[1] - size) / 2)
    return np.asarray(resized.crop((left, top, left + size, top + size)))


def scaled(box: Box, scale: float, shift: tuple[float, float] = (0.0, 0.0)) -> Box:
    """The box scaled about its centre, then shifted by fractions of its original size."""
    width, height = box[2] - box[0], box[3] - box[1]
    x = (box[0] + box[2]) / 2 + shift[0] * width
    y = (box[1] + box[3]) / 2 + shift[1] * height
    width, height = width * scale, height * scale
    return (x - width / 2, y - height / 2, x + width / 2, y + height / 2)


def _random_tightness(rng: np.random.Generator, box: Box) -> Box:
    """0.4 to 2 times the box, placed so that it holds the object or lies on it."""
    scale = math.exp(rng.uniform(math.log(0.4), math.log(2)))
    reach = abs(scale - 1) / 2 * 0.9 + 0.06
    return scaled(box, scale, tuple(rng.uniform(-reach, reach, 2)))


def _union(boxes: list[Box]) -> Box:
    corners = np.array(boxes)
    return (*corners[:, :2].min(0).tolist(), *corners[:, 2:].max(0).tolist())


def group_box(scene: Scene, drawn: DrawnObject) -> Box | None:
    """The box around the whole cluster of an object, None if it stands alone."""
    boxes = [other.box for other in scene.objects if other.item == drawn.item]
    return _union(boxes) if len(boxes) > 1 else None


def _training_box(rng: np.random.Generator, scene: Scene, drawn: DrawnObject) -> Box:
    kind = rng.random()
    group = group_box(scene, drawn)
    inner = [*drawn.parts, *([drawn.copy] if drawn.copy else [])]
    if group and kind < 0.25:
        return scaled(group, rng.uniform(0.9, 1.5))
    if inner and 0.25 <= kind < 0.4:
        return scaled(inner[rng.integers(len(inner))], rng.uniform(0.9, 1.6))
    if kind > 0.7:
        return scaled(drawn.box, rng.choice((1.0, 1.5)))  # the two scales of inference
    return _random_tightness(rng, drawn.box)


def _overlap(a: Box, b: Box) -> float:
    """Area of the intersection of two boxes, in pixels."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    return max(width, 0.0) * max(height, 0.0)


def _shows(scene: Scene, box: Box, drawn: DrawnObject) -> bool:
    """Whether the object's class fills more of the crop than any other class does."""
    areas: dict[str, float] = defaultdict(float)
    for other in scene.objects:
        areas[other.name] += _overlap(box, other.box)
    return max(areas, key=lambda name: areas[name]) == drawn.name


def _background_box(rng: np.random.Generator, scene: Scene) -> Box | None:
    for _ in range(8):
        side = rng.uniform(14, 70)
        x, y = rng.uniform(0, IMAGE_SIZE - side, 2)
        box = (x, y, x + side, y + side)
        if sum(_overlap(box, drawn.box) for drawn in scene.objects) < 0.04 * side**2:
            return box
    return None


def usable(box: Box) -> bool:
    inside = (max(box[0], 0), max(box[1], 0), min(box[2], IMAGE_SIZE), min(box[3], IMAGE_SIZE))
    return min(inside[2] - inside[0], inside[3] - inside[1]) >= 5


def _scene_crops(rng: np.random.Generator, scene: Scene) -> list[tuple[Box, int, int]]:
    """Box, class and colour of the crops of one scene: two per object, one of the background."""
    crops = []
    for drawn in (*scene.objects, *scene.objects):
        box = _training_box(rng, scene, drawn)
        if usable(box) and _shows(scene, box, drawn):
            distances = np.abs(COLOUR_VALUES - drawn.colour).sum(1)
            crops.append((box, CLASSES.index(drawn.name), int(distances.argmin())))
    ground = _background_box(rng, scene)
    return [*crops, (ground, BACKGROUND, -1)] if ground else crops


def draw_crops(count: int, seed: int, size: int) -> Crops:
    """Cut `count` training crops from scenes of the split "clip", which no dataset uses."""
    pixels = np.empty((count, size, size, 3), dtype=np.uint8)
    labels = np.empty((count, 2), dtype=np.int64)
    filled, index = 0, 0
    with progress(None, "crops", "crop", total=count) as bar:
        while filled < count:
            rng = scene_rng(seed, "clip", index)
            scene, index = compose_scene(rng, nuisance=rng.uniform(0.3, 1)), index + 1
            image = Image.fromarray(scene.image)
            for box, class_index, colour in _scene_crops(rng, scene)[: count - filled]:
                pixels[filled] = crop(image, box, size)
                labels[filled] = class_index, colour
                filled += 1
                bar.update()
    channels_first = torch.from_numpy(pixels).permute(0, 3, 1, 2)  # channels_last in memory
    return Crops(channels_first, *torch.from_numpy(labels).unbind(1))
