"""The region proposal network, trained along with the detector (Ren et al. 2015, "Faster R-CNN").

Its boxes are what the detector's classification and box losses are sampled from. It serves training
alone: at test time the regions are the given proposals. Parameter names are those of OpenMMLab's
checkpoints. Anchors are ordered by level, row, column and ratio everywhere.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from lpovod.boxes import decode, encode, rows_of, sample_rows
from lpovod.distributed import total
from lpovod.networks.backbone import STRIDES
from lpovod.precision import precise
from lpovod.torchvision_ops import box_iou, clip_boxes_to_image, nms
from lpovod.transfers import numbers
from lpovod.views import padded

ANCHOR_SCALE = 8.0
"""Side of a square anchor, in strides."""

RATIOS = (0.5, 1.0, 2.0)
"""Height over width; all anchors of a level have one area."""

POSITIVE_IOU, NEGATIVE_IOU = 0.7, 0.3
SAMPLES, POSITIVES = 256, 0.5
PER_LEVEL, NMS, PER_IMAGE = 2000, 0.7, 1000
STDS = (1.0, 1.0, 1.0, 1.0)

Outputs = list[tuple[Tensor, Tensor]]
"""For each level of n images: logits (n, anchors), deltas (n, anchors, 4)."""


class RegionProposalNetwork(nn.Module):
    """One 3 x 3 convolution, then a logit and four deltas per anchor."""

    def __init__(self, channels: int):
        super().__init__()
        self.rpn_conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.rpn_cls = nn.Conv2d(channels, len(RATIOS), 1)
        self.rpn_reg = nn.Conv2d(channels, 4 * len(RATIOS), 1)
        for layer in (self.rpn_conv, self.rpn_cls, self.rpn_reg):
            nn.init.normal_(layer.weight, std=0.01)
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)

    def forward(self, pyramid: list[Tensor]) -> Outputs:
        hidden = [functional.relu(self.rpn_conv(features)) for features in pyramid]
        return [
            (
                self.rpn_cls(x).permute(0, 2, 3, 1).flatten(1),
                self.rpn_reg(x).permute(0, 2, 3, 1).reshape(len(x), -1, 4),
            )
            for x in hidden
        ]


def make_anchors(pyramid: list[Tensor]) -> list[Tensor]:
    """Anchors of each level, (cells * ratios, 4), around the points (column, row) * stride.

    Args:
        pyramid: maps of the levels, for their sizes and device.
    """
    found = []
    for features, stride in zip(pyramid, STRIDES, strict=True):
        ratio = numbers(RATIOS, precise(features.new_empty(()))).sqrt()
        half = torch.stack([1 / ratio, ratio], dim=1) * (stride * ANCHOR_SCALE / 2)
        rows, columns = (torch.arange(n, device=half.device) for n in features.shape[-2:])
        y, x = torch.meshgrid(rows, columns, indexing="ij")
        centre = torch.stack([x, y], dim=-1).reshape(-1, 1, 2) * stride
        found.append(torch.cat([centre - half, centre + half], dim=-1).reshape(-1, 4))
    return found


def match_anchors(anchors: Tensor, objects: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Which anchors are positive or negative, (n,) bool each, and each one's object, (n,) rows.

    Anchors with an IoU of 0.7 with an object are positive; for an object that no anchor meets so
    well, those that meet it best, with 0.3 at least. Others, below 0.3 with all objects, are
    negative.

    Args:
        anchors: (n, 4).
        objects: (m, 4), one at least.
    """
    pairwise = box_iou(objects, anchors)
    iou, assigned = pairwise.max(dim=0)
    best = pairwise.amax(dim=1, keepdim=True)
    closest = (pairwise == best) & (best >= NEGATIVE_IOU)
    # An anchor that is the best of several objects learns the last of them, as in the original.
    row = torch.arange(len(objects), dtype=torch.int32, device=objects.device)[:, None]
    last = torch.where(closest, row, -1).amax(dim=0)
    assigned = torch.where(last >= 0, last, assigned)
    positive = (iou >= POSITIVE_IOU) | (last >= 0)
    return positive, (iou < NEGATIVE_IOU) & ~positive, assigned


def sample_anchors(
    anchors: Tensor, objects: Sequence[Tensor], sizes: list[tuple[int, int]], seeds: list[int]
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Rows of sampled positive and negative anchors of each image, and the positives' objects.

    Args:
        anchors: (n, 4).
        objects: for each image (m, 4), one at least.
        sizes: height and width of each image, in pixels; an anchor centred outside of the image and
            of its own padding (which a larger neighbour's may follow) is not sampled.
        seeds: of the samples of each image.

    Returns:
        for each image (p,) rows, (q,) rows, (p, 4) boxes.
    """
    centre = (anchors[:, :2] + anchors[:, 2:]) / 2
    marks, matched = [], []
    for of_image, (height, width) in zip(objects, sizes, strict=True):
        inside = (centre[:, 0] < padded(width)) & (centre[:, 1] < padded(height))
        # As a point an anchor meets no object.
        positive, negative, assigned = match_anchors(anchors * inside[:, None], of_image)
        marks += [positive, negative & inside]
        matched.append(of_image[assigned])
    rows = rows_of(torch.stack(marks))
    samples = []
    for seed, positive, negative, of_image in zip(
        seeds, rows[::2], rows[1::2], matched, strict=True
    ):
        torch.manual_seed(seed)
        learned, others = sample_rows(positive, negative, SAMPLES, POSITIVES)
        samples.append((learned, others, of_image[learned]))
    return samples


def rpn_losses(
    outputs: Outputs,
    anchors: list[Tensor],
    objects: Sequence[Tensor],
    sizes: list[tuple[int, int]],
    seeds: list[int],
) -> dict[str, Tensor]:
    """Binary cross-entropy of sampled anchors and L1 of the positives' deltas.

    Both are sums over the images, divided by the number of all sampled anchors (of all ranks).

    Args:
        outputs: of n images.
        anchors: of each level.
        objects: for each image (m, 4) annotated boxes.
        sizes: height and width of each image, without padding.
        seeds: of the samples of each image.
    """
    of_all_levels = torch.cat(anchors)
    logits, deltas = (precise(torch.cat(level, dim=1)) for level in zip(*outputs, strict=True))
    samples = sample_anchors(of_all_levels, objects, sizes, seeds)
    classification, box, count = [], [], 0
    for number, (positive, negative, learned) in enumerate(samples):
        sampled = logits[number, torch.cat([positive, negative])]
        target = (torch.arange(len(sampled), device=sampled.device) < len(positive)).to(sampled)
        classification.append(
            functional.binary_cross_entropy_with_logits(sampled, target, reduction="sum")
        )
        wanted = encode(of_all_levels[positive], learned, STDS)
        box.append((deltas[number, positive] - wanted).abs().sum())
        count += len(sampled)
    count = total(logits.new_full((), float(count)))
    return {
        "rpn_classification": torch.stack(classification).sum() / count,
        "rpn_box": torch.stack(box).sum() / count,
    }


@torch.no_grad()
def rpn_proposals(
    outputs: Outputs,
    anchors: list[Tensor],
    sizes: list[tuple[int, int]],
    per_level: int = PER_LEVEL,
) -> list[tuple[Tensor, Tensor]]:
    """For each image boxes (k, 4), cut to it, and scores (k,), best first, k at most 1,000.

    Args:
        outputs: of n images.
        anchors: of each level.
        sizes: height and width of each image, without padding.
        per_level: best anchors of each level that enter the NMS, which acts within a level.
    """
    found = []
    for number, (height, width) in enumerate(sizes):
        boxes, scores, levels = [], [], []
        for level, ((logits, deltas), of_level) in enumerate(zip(outputs, anchors, strict=True)):
            # A stable sort, unlike topk, leaves equal scores in the order of their anchors.
            score, best = logits[number].float().sigmoid().sort(descending=True, stable=True)
            score, best = score[:per_level], best[:per_level]
            box = decode(of_level[best], deltas[number, best].float(), STDS)
            boxes.append(clip_boxes_to_image(box, (height, width)))
            scores.append(score)
            levels.append(torch.full_like(score, level, dtype=torch.float64))
        box, score = torch.cat(boxes), torch.cat(scores)
        # One NMS of levels that lie apart: in float64 the distance does not change an overlap.
        apart = box + torch.cat(levels)[:, None] * (height + width)
        kept = nms(apart, score.double(), NMS)[:PER_IMAGE]
        found.append((box[kept], score[kept]))
    return found
