"""How well a CLIP names crops of unseen scenes, by kind of box."""

from __future__ import annotations

from itertools import product

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from lpovod.clip import Clip
from lpovod.miniature.pictograms import CLASSES
from lpovod.miniature.scenes import Box, DrawnObject, Scene, compose_scene
from lpovod.miniature.split import scene_rng
from lpovod.stages.small_clip.crops import crop, group_box, scaled, usable

# -------------------------------------------------------------------------------- zero-shot


KINDS = ("ground_truth", "tight", "loose", "part", "group")


def _kind_box(rng: np.random.Generator, scene: Scene, drawn: DrawnObject, kind: str) -> Box | None:
    if kind == "ground_truth":
        return drawn.box
    if kind == "tight":
        return scaled(drawn.box, 0.5, tuple(rng.uniform(-0.2, 0.2, 2)))
    if kind == "loose":
        return scaled(drawn.box, 2.0)
    if kind == "group":
        return group_box(scene, drawn)
    return drawn.parts[rng.integers(len(drawn.parts))] if drawn.parts else None


def zero_shot(clip: Clip, scenes: int, seed: int, nuisance: float) -> dict:
    """Zero-shot accuracy of bare class names on crops of unseen scenes, by kind of box.

    Args:
        clip: any CLIP.
        scenes: number of images to draw and measure on.
        seed: seed of the split "clip", different from the training's.
        nuisance: strength of the nuisance in the scenes, 0 to 1.

    Returns:
        For each of `KINDS`: `crops`, their number; `accuracy` over all classes; `cosine` with the
        name of the true class; and `per_class` accuracy. The kinds: the true box; half its side;
        twice its side; one part; the box of the cluster.
    """
    names = F.normalize(clip.encode_texts(list(CLASSES)), dim=1)
    crops: dict[str, list[tuple[np.ndarray, int]]] = {kind: [] for kind in KINDS}
    for index in range(scenes):
        rng = scene_rng(seed, "clip", index)
        scene = compose_scene(rng, nuisance=nuisance)
        image = Image.fromarray(scene.image)
        for drawn, kind in product(scene.objects, KINDS):
            box = _kind_box(rng, scene, drawn, kind)
            if box is not None and usable(box):
                pixels = crop(image, box, clip.image_size)
                crops[kind].append((pixels, CLASSES.index(drawn.name)))
    return {kind: _score(clip, names, pairs) for kind, pairs in crops.items() if pairs}


def _score(clip: Clip, names: Tensor, pairs: list[tuple[np.ndarray, int]]) -> dict:
    pixels = torch.from_numpy(np.stack([pixels for pixels, _ in pairs])).permute(0, 3, 1, 2)
    truth = torch.tensor([class_index for _, class_index in pairs], device=names.device)
    cosines = F.normalize(clip.encode_crops(pixels), dim=1) @ names.T
    right = (cosines.argmax(1) == truth).double()
    per_class = {
        name: round(float(right[truth == position].mean()), 3)
        for position, name in enumerate(CLASSES)
        if (truth == position).any()
    }
    return {
        "crops": len(pairs),
        "accuracy": round(float(right.mean()), 4),
        "cosine": round(float(cosines.gather(1, truth[:, None]).mean()), 4),
        "per_class": per_class,
    }
