"""The comparison with the original code: inputs, weights, and what this project makes of them.

The original was run on generated images with generated weights and its arrays were recorded. All of
its inputs follow from names: the CRC-32 of a name seeds numpy's generator. So anyone can make them
again, run this project on them, and compare::

    python -m tests.recorded --input A --output A.npz

writes the arrays of the evaluation mode for image A (or B) under the names they were recorded with,
`<file>/<array>`. Boxes are xyxy; RESIZED means pixels of the network's input.
"""

import argparse
import hashlib
import math
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import lpovod.boxes
import lpovod.stages.base_detector
from lpovod.config import (
    BackboneSettings,
    BaseDetectorSettings,
    EvaluationSettings,
    TrainingSettings,
)
from lpovod.formats.coco import CocoDataset
from lpovod.formats.regions import Regions
from lpovod.measures.ablations import Variant
from lpovod.networks.backbone import freeze_statistics, level_of
from lpovod.networks.detector import Detector
from lpovod.networks.detector_inference import refine
from lpovod.networks.rpn import Outputs, make_anchors, rpn_proposals
from lpovod.scoring import Scores, detect, final_scores
from lpovod.stages.base_detector import training_losses
from lpovod.training import train
from lpovod.views import MEAN, STD, LoadedView, Normalisation, View, apply_view, batch, padded

IMAGE_IDS = {"A": 101, "B": 202}
SIZES = {"A": (480, 640), "B": (427, 640)}  # height, width
FLIPPED = {"A": False, "B": True}  # in training
PROPOSALS, OBJECTS, DIMENSION = 60, 6, 512

BASE_CLASSES = 48
NOVEL = [4, 5, 11, 12, 15, 16, 21, 23, 27, 29, 32, 34, 45, 47, 54, 58, 63]
BASE = [place for place in range(65) if place not in NOVEL]
"""Places among all 65 classes in the order of COCO's ids."""

ORIGINAL = {
    "region_head.convs.": "roi_head.bbox_head.shared_convs.",
    "region_head.fc.": "roi_head.bbox_head.shared_fcs.0.",
    "clip_head.convs.": "roi_head.bbox_head.shared_convs_for_image.",
    "clip_head.fc.": "roi_head.bbox_head.shared_fcs_for_image.0.",
    "box_refinement.": "roi_head.bbox_head.fc_reg.",
    "clip_projection.": "roi_head.projection_for_image.",
    "prototypes": "roi_head.prototype",
}
"""The original's names of the heads' parameters; all others have one name."""

LOSSES = {
    "rpn_classification": "loss_rpn_cls",
    "rpn_box": "loss_rpn_bbox",
    "classification": "cls_loss",
    "box": "loss_bbox",
    "distillation": "kd_loss",
}

Arrays = dict[str, np.ndarray]


def original_name(key: str) -> str:
    for ours, theirs in ORIGINAL.items():
        key = key.replace(ours, theirs)
    return key


def generator(name: str) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(name.encode()))


# Inputs


def make_image(name: str) -> np.ndarray:
    """Colour gradients under 30 opaque rectangles, with a little noise: (H, W, 3) uint8."""
    (height, width), draw = SIZES[name], generator(f"image_{name}")
    across = np.broadcast_to(255 * np.arange(width) // (width - 1), (height, width))
    down = np.broadcast_to((255 * np.arange(height) // (height - 1))[:, None], (height, width))
    pixels = np.stack([across, down, 255 - (across + down) // 2], axis=2)
    for _ in range(30):
        left, top = (draw.integers(0, side - 20) for side in (width, height))
        right, bottom = left + draw.integers(10, width // 3), top + draw.integers(10, height // 3)
        pixels[top:bottom, left:right] = draw.integers(0, 256, 3)
    noise = draw.integers(-6, 7, pixels.shape)
    return (pixels + noise).clip(0, 255).astype(np.uint8)


def make_proposals(name: str) -> tuple[np.ndarray, np.ndarray]:
    """(60, 4) boxes of the original image, with the corner cases first, and (60,) objectness."""
    (height, width), draw = SIZES[name], generator(f"proposals_{name}")
    limit = np.array([width, height, width, height], np.float64)
    sides = [
        np.exp(draw.uniform(math.log(8), math.log(0.95 * side), PROPOSALS))
        for side in (width, height)
    ]
    centres = [draw.uniform(0, side, PROPOSALS) for side in (width, height)]
    size, centre = np.stack(sides, axis=1), np.stack(centres, axis=1)
    box = np.concatenate([centre - size / 2, centre + size / 2], axis=1).clip(0, limit)
    box[0] = limit * [0, 0, 1, 1]
    box[1] = 100, 100, 103.5, 102.25
    box[2] = width - 90, height - 70, width, height
    box[3] = box[4] + [1.5, -1, 2, 1]  # nearly the same
    box[5] = box[6]
    objectness = draw.uniform(0.3, 1, PROPOSALS)
    return box.clip(0, limit).astype(np.float32), objectness.astype(np.float32)


def make_objects(name: str) -> tuple[np.ndarray, np.ndarray]:
    """(6, 4) annotated boxes of the original image and (6,) base classes."""
    (height, width), draw = SIZES[name], generator(f"gt_{name}")
    low = [draw.uniform(0, 0.6 * side, OBJECTS) for side in (width, height)]
    sides = [draw.uniform(0.1 * side, 0.4 * side, OBJECTS) for side in (width, height)]
    high = [
        np.minimum(start + length, side)
        for start, length, side in zip(low, sides, (width, height), strict=True)
    ]
    box = np.stack([*low, *high], axis=1).round(2).astype(np.float32)
    return box, draw.integers(0, BASE_CLASSES, OBJECTS)


def unit_rows(name: str, rows: int) -> np.ndarray:
    vectors = generator(name).standard_normal((rows, DIMENSION))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def text_embeddings() -> np.ndarray:
    """(65, 512) unit rows, in the order of COCO's ids."""
    return unit_rows("text_embedding", 65)


def clip_embeddings(name: str) -> np.ndarray:
    """(60, 512) unit rows, what the CLIP head is to imitate on the proposals."""
    return unit_rows(f"clip_features_{name}", PROPOSALS)


# Weights: each a function of its name and shape


def recorded_weight(key: str, shape: tuple[int, ...]) -> np.ndarray:
    draw, leaf = generator(key), key.rsplit(".", 1)[-1]
    if leaf == "num_batches_tracked":
        return np.zeros((), np.int64)
    if leaf == "running_mean":
        return np.float32(0.1 * draw.standard_normal(shape))
    if leaf == "running_var":
        return np.float32(draw.uniform(0.5, 1.5, shape))
    if "bn" in key.split(".")[-2] or ".downsample.1." in key:
        if leaf == "bias":
            return np.float32(0.1 * draw.standard_normal(shape))
        gain = 0.3 if ".bn3." in key else 0.15 if "fpn_convs" in key else 1.0
        return np.float32(gain * draw.uniform(0.8, 1.2, shape))
    if leaf == "bias":
        return np.float32(0.05 * draw.standard_normal(shape))
    std, mean = math.sqrt(2 / np.prod(shape[1:])), 0.0
    special = {
        "rpn_cls.weight": (0.03, 0.0),
        "rpn_reg.weight": (0.005, 0.0),
        "fc_reg.weight": (0.02, 0.0),
        "prototype": (0.04, -0.0045),
        "prototype_novel": (0.04, 0.0008),
    }
    for ending, values in special.items():
        if key.endswith(ending):
            std, mean = values
    return np.float32(std * draw.standard_normal(shape) + mean)


def build_detector() -> Detector:
    """The detector at the paper's size, with its RPN and the recorded weights."""
    backbone = BackboneSettings(architecture="resnet50", channels=256)
    model = Detector(backbone, BaseDetectorSettings(regions="rpn"), BASE_CLASSES, DIMENSION)
    model.load_state_dict(
        {
            key: torch.from_numpy(np.asarray(recorded_weight(original_name(key), tensor.shape)))
            for key, tensor in model.state_dict().items()
        }
    )
    return model.eval()


def novel_weights() -> Tensor:
    return torch.from_numpy(recorded_weight("roi_head.prototype_novel", (len(NOVEL), 1024)))


# Views


def inference_view(name: str) -> LoadedView:
    return apply_view(make_image(name), View(IMAGE_IDS[name], 800, 1333))


def training_view(name: str) -> LoadedView:
    """With the proposals and the embeddings to imitate, as the stage loads them."""
    image_id = IMAGE_IDS[name]
    box, objectness = make_proposals(name)
    extra = Regions(
        np.full(PROPOSALS, image_id),
        np.arange(PROPOSALS),
        box,
        objectness,
        {"embedding": clip_embeddings(name)},
    )
    shown = apply_view(make_image(name), View(image_id, 640, 1333, FLIPPED[name]))
    return LoadedView(shown.view, shown.pixels, shown.scale, extra)


# What is compared


def statistics(values: Tensor) -> np.ndarray:
    """Mean, standard deviation, least, largest, L2 norm, in float64."""
    x = values.double().flatten()
    mean, std = x.mean(), x.std(correction=0)
    return np.array([float(v) for v in (mean, std, x.min(), x.max(), x.norm())])


def preprocessing(name: str) -> Arrays:
    """How the image and its boxes are shown in tests and in training."""
    test, training = inference_view(name), training_view(name)
    tensor = batch([test], "cpu", Normalisation(), pad_with_black=True)[0]
    every_byte = LoadedView(test.view, torch.arange(256).byte().expand(3, 1, 256), test.scale)
    pixels = torch.zeros(tensor.shape, dtype=torch.uint8)
    pixels[:, : test.pixels.shape[1], : test.pixels.shape[2]] = test.pixels
    found = {
        "mean": np.array(MEAN, np.float32),
        "std": np.array(STD, np.float32),
        "lut_rgb": batch([every_byte], "cpu", Normalisation())[0, :, 0, :256],
        f"{name}_test_u8": pixels.permute(1, 2, 0),
        f"{name}_test_sha256": hashlib.sha256(tensor.numpy().tobytes()).hexdigest(),
        f"{name}_test_stats": np.stack([statistics(channel)[:4] for channel in tensor]),
        f"{name}_test_proposals": test.to_view(make_proposals(name)[0]),
        f"{name}_test_objectness": make_proposals(name)[1],
        f"{name}_train_u8": training.pixels.permute(1, 2, 0),
        f"{name}_train_gt_bboxes": training.to_view(make_objects(name)[0]),
        f"{name}_train_gt_labels": make_objects(name)[1],
        f"{name}_train_proposals_loadprops": training.to_view(training.extra.box),
        f"{name}_train_flip": training.view.flip,
    }
    for kind, view in (("test", test), ("train", training)):
        height, width = view.pixels.shape[1:]
        found[f"{name}_{kind}_img_shape"] = np.array([height, width])
        found[f"{name}_{kind}_pad_shape"] = np.array([padded(height), padded(width)])
        found[f"{name}_{kind}_scale_factor"] = view.scale.repeat(2)
    return found


def feature_maps(name: str, maps: list[Tensor], pyramid: list[Tensor]) -> Arrays:
    """Statistics of all maps and slices of some."""
    named = {f"C{level}": x[0] for level, x in enumerate(maps, 2)}
    named |= {f"P{level}": x[0] for level, x in enumerate(pyramid, 2)}
    found = {f"{name}_{level}_stats": statistics(x) for level, x in named.items()}
    if name == "B":
        slices = {"P5": (4, 2, 2), "P2": (8, 16, 16)}
    else:
        slices = {"C2": (4, 16, 16), "C3": (8, 8, 8), "C4": (8, 4, 4), "C5": (16, 2, 2)}
        slices |= {"P2": (4, 16, 16), "P3": (4, 8, 8), "P4": (4, 4, 4), "P6": (4, 1, 1)}
        found["A_P5"] = named["P5"]
    for level, (c, y, x) in slices.items():
        found[f"{name}_{level}_slice"] = named[level][::c, ::y, ::x]
    return found


def region_proposals(name: str, model: Detector, pyramid: list[Tensor], view: LoadedView) -> Arrays:
    """What the RPN gives, and its proposals with the settings of the original's tests."""
    outputs, anchors = model.rpn_head(pyramid), make_anchors(pyramid)
    size = tuple(view.pixels.shape[1:])
    boxes, scores = rpn_proposals(outputs, anchors, [size], per_level=1000)[0]
    found = {
        "base_anchors": torch.stack([level[:3] for level in anchors]),
        f"{name}_num_anchors": np.array([len(level) for level in anchors]),
        f"{name}_anchors_P6": anchors[4],
        f"{name}_anchors_P2_first12": anchors[0][:12],
        f"{name}_num": np.array(len(boxes)),
        f"{name}_top50": torch.cat([boxes, scores[:, None]], dim=1)[:50],
        f"{name}_all_scores": scores,
        f"{name}_gap50": (scores[:50] - scores[1:51]).min(),
    }
    for level, (features, (logits, deltas)) in enumerate(zip(pyramid, outputs, strict=True), 2):
        rows, columns = features.shape[-2:]
        maps = {
            "cls": logits[0].view(rows, columns, -1).permute(2, 0, 1),
            "reg": deltas[0].reshape(rows, columns, -1).permute(2, 0, 1),
        }
        for kind, values in maps.items():
            found[f"{name}_{kind}_stats_P{level}"] = statistics(values)
            if level >= 5:
                found[f"{name}_{kind}_P{level}"] = values
    return found


def region_outputs(name: str, model: Detector, pyramid: list[Tensor], view: LoadedView) -> Arrays:
    """What the heads say of the given proposals."""
    boxes = view.to_view(make_proposals(name)[0])
    pooled = model.pool(pyramid, [boxes])
    outputs = model.extract(pooled)
    height, width = view.pixels.shape[1:]
    cosine = outputs.embedding @ torch.from_numpy(text_embeddings()).T
    return {
        f"{name}_rois": torch.cat([torch.zeros(len(boxes), 1), boxes], dim=1),
        f"{name}_levels": level_of(boxes, model.finest_scale),
        f"{name}_roi_feats_stats": np.stack([statistics(one) for one in pooled]),
        f"{name}_roi_feats_slice": pooled[::6, ::4],
        f"{name}_region_embeddings": outputs.feature,
        f"{name}_image_1024_slice": model.clip_head(pooled[::6]),
        f"{name}_image_embeddings": outputs.embedding,
        f"{name}_cls_logits_base": outputs.feature @ model.prototypes.T,
        f"{name}_cls_logits_novel": outputs.feature @ novel_weights().T,
        f"{name}_bbox_deltas": outputs.deltas,
        f"{name}_decoded_resized": refine(boxes, outputs.deltas, torch.ones(2), (height, width)),
        f"{name}_image_softmax": (cosine / 0.01).softmax(dim=1),
    }


def raw_scores(
    model: Detector,
    pyramid: list[Tensor],
    view: LoadedView,
    boxes: Tensor,
    objectness: Tensor,
    size: tuple[int, int],
    probe: bool,
) -> Scores:
    """Scores as stage `evaluation` reads them; without a probe novel sigmoids are 1.

    Args:
        model: the detector.
        pyramid: of the image.
        view: the image.
        boxes: (n, 4), RESIZED.
        objectness: (n,).
        size: height and width of the original image.
        probe: whether there are novel weights.
    """
    outputs = model.extract(model.pool(pyramid, [boxes]))
    novel = (outputs.feature @ novel_weights().T).sigmoid()
    return Scores(
        boxes=boxes / view.scale.repeat(2),
        refined=refine(boxes, outputs.deltas, view.scale, size),
        objectness=objectness,
        sigmoid=torch.cat(
            [
                (outputs.feature @ model.prototypes.T).sigmoid(),
                novel if probe else torch.ones_like(novel),
            ],
            dim=1,
        ),
        cosine=outputs.embedding @ torch.from_numpy(text_embeddings()[BASE + NOVEL]).T,
        clip=None,
    )


def weights_of(variant: Variant) -> list[float]:
    return variant.probe_weights(len(BASE), len(NOVEL))


def detections(scores: Scores, variant: Variant, settings: EvaluationSettings) -> np.ndarray:
    """(k, 6): box in pixels of the original image, score, place of the class among the 65."""
    box, score, place = detect(scores, weights_of(variant), BASE + NOVEL, variant, settings)
    return np.concatenate([box, score[:, None], place[:, None]], axis=1).astype(np.float32)


def all_detections(name: str, model: Detector, pyramid: list[Tensor], view: LoadedView) -> Arrays:
    """With given proposals, without and with a probe; and with the RPN's boxes instead."""
    settings = EvaluationSettings()
    variant = Variant(settings.alpha, settings.beta, temperature=0.01)
    boxes, objectness = make_proposals(name)
    given = (view.to_view(boxes), torch.from_numpy(objectness), SIZES[name])
    found = {}
    for kind, probe in (("base", False), ("ft", True)):
        scores = raw_scores(model, pyramid, view, *given, probe)
        ordered = np.zeros((PROPOSALS, 66), np.float32)  # the last one is the background's
        ordered[:, BASE + NOVEL] = final_scores(scores, weights_of(variant), variant)
        found[f"{name}_{kind}_scores66"] = ordered
        found[f"{name}_{kind}_dets"] = detections(scores, variant, settings)
    outputs, anchors = model.rpn_head(pyramid), make_anchors(pyramid)
    size = tuple(view.pixels.shape[1:])
    own, scores = rpn_proposals(outputs, anchors, [size], per_level=1000)[0]
    scores = raw_scores(model, pyramid, view, own, scores, SIZES[name], probe=False)
    # The original takes the root of a score with objectness alone; here it is always taken.
    without = EvaluationSettings(score_threshold=math.sqrt(settings.score_threshold))
    rooted = detections(scores, replace(variant, objectness=False), without)
    found[f"{name}_base_rpnpath_dets"] = rooted ** np.float32([1, 1, 1, 1, 2, 1])
    return found


@torch.inference_mode()
def evaluation_arrays(name: str, model: Detector) -> Arrays:
    """Every array of the evaluation mode for image A or B, as `<file>/<array>`."""
    view = inference_view(name)
    maps = model.backbone(batch([view], "cpu", Normalisation(), pad_with_black=True))
    pyramid = model.neck(maps)
    parts = {
        "preprocess": preprocessing(name),
        "features": feature_maps(name, maps, pyramid),
        "rpn": region_proposals(name, model, pyramid, view),
        "roi": region_outputs(name, model, pyramid, view),
        "detections": all_detections(name, model, pyramid, view),
    }
    return {f"{file}/{key}": np.asarray(v) for file, of in parts.items() for key, v in of.items()}


# Training


def annotations() -> CocoDataset:
    """Both images with their annotated boxes; category ids are the rows of the base classes."""
    images, annotated = {}, {}
    for name, image_id in IMAGE_IDS.items():
        height, width = SIZES[name]
        images[image_id] = {"file_name": name, "width": width, "height": height}
        annotated[image_id] = [
            {"bbox": [x1, y1, x2 - x1, y2 - y1], "category_id": label}
            for (x1, y1, x2, y2), label in zip(
                *(part.tolist() for part in make_objects(name)), strict=True
            )
        ]
    categories = {row: {"name": str(row)} for row in range(BASE_CLASSES)}
    return CocoDataset(Path("generated.json"), images, annotated, categories)


def evenly(candidates: Tensor, count: int) -> Tensor:
    """The rule that stood for random sampling when the values were recorded."""
    if len(candidates) <= count:
        return candidates
    return candidates[torch.arange(count) * len(candidates) // count]


@contextmanager
def sampled_evenly() -> Iterator[None]:
    """Samples are taken by `evenly`, and so can be compared."""
    random = lpovod.boxes.take
    lpovod.boxes.take = evenly
    try:
        yield
    finally:
        lpovod.boxes.take = random


@contextmanager
def proposed_in_order_of(recorded: list[np.ndarray]) -> Iterator[None]:
    """The RPN's own boxes stand in the recorded order.

    `evenly` counts places, and a handful of neighbours in the ranking have scores that differ in
    the last bit, if at all: their order is that of rounding errors.
    """

    def ordered(*arguments) -> list[tuple[Tensor, Tensor]]:
        found = []
        for (boxes, scores), like in zip(rpn_proposals(*arguments), recorded, strict=True):
            distance = torch.cdist(torch.from_numpy(like[:, :4]), boxes, torch.inf)
            row = distance.argmin(dim=1)
            found.append((boxes[row], scores[row]))
        return found

    lpovod.stages.base_detector.rpn_proposals = ordered
    try:
        yield
    finally:
        lpovod.stages.base_detector.rpn_proposals = rpn_proposals


def training_step(
    model: Detector, order: list[np.ndarray], checkpoint: Path
) -> tuple[Arrays, dict[str, float]]:
    """One step of base training on A and B: losses, gradients, weights and statistics after it.

    Args:
        model: as `build_detector` returns it; it is changed.
        order: the recorded proposals of the RPN, for their order alone.
        checkpoint: a file for the loop's; it is removed.

    Returns:
        arrays as `train_base/<array>`, and the norm of each parameter's gradient before clipping,
        by the original's names.
    """
    model.train()
    freeze_statistics(model.backbone)
    views, data = [training_view(name) for name in IMAGE_IDS], annotations()
    classes = {row: row for row in range(BASE_CLASSES)}
    gradients: Arrays = {}

    def keep(key: str, parameter: Tensor) -> None:
        gradients[original_name(key)] = parameter.grad.numpy().copy()

    for key, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(partial(keep, key))
    proposed: list[tuple[Tensor, Tensor]] = []

    def propose(_, inputs: tuple, outputs: Outputs) -> None:
        sizes = [tuple(view.pixels.shape[1:]) for view in views]
        proposed.extend(rpn_proposals(outputs, make_anchors(inputs[0]), sizes))

    model.rpn_head.register_forward_hook(propose)
    settings = BaseDetectorSettings(regions="rpn")
    schedule = TrainingSettings(
        epochs=1, milestones=[], warmup_steps=0, learning_rate=0.02, weight_decay=2.5e-5
    )
    with sampled_evenly(), proposed_in_order_of(order):
        (history,) = train(
            model,
            lambda batch: training_losses(model, data, batch, classes, settings, "cpu"),
            lambda epoch, step: [views],
            1,
            schedule,
            checkpoint,
            "",
        )
    checkpoint.unlink()
    norms = {k: float(np.linalg.norm(g.astype(np.float64))) for k, g in gradients.items()}
    found = {f"loadprops_{theirs}": np.array(history[ours]) for ours, theirs in LOSSES.items()}
    found["loadprops_loss_total"] = sum(found.values())
    found["grad_norm_total"] = np.array(math.hypot(*norms.values()))
    for number, (boxes, scores) in enumerate(proposed):
        found[f"train_proposals_{number}"] = torch.cat([boxes, scores[:, None]], dim=1).numpy()
    found |= {f"grad::{key}": gradient for key, gradient in gradients.items()}
    for key, tensor in model.state_dict().items():
        moment = "after_step" if original_name(key) in gradients else "after_fwd"
        found[f"{moment}::{original_name(key)}"] = tensor.numpy()
    return {f"train_base/{key}": value for key, value in found.items()}, norms


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--input", choices=sorted(SIZES), required=True, help="generated image")
    parser.add_argument("--output", type=Path, required=True, help="npz file to write")
    arguments = parser.parse_args()
    np.savez_compressed(arguments.output, **evaluation_arrays(arguments.input, build_detector()))


if __name__ == "__main__":
    main()
