"""Crops of regions as CLIP sees them: PIL's antialiased resize as two matrix products.

PIL's resize is separable and linear in each pass, so "crop, resize the shorter side to S, cut the
S x S centre" is ``A_y · image · A_xᵀ`` with weight matrices computed from the box. Only the rows
and columns that reach the centre are computed, so a sliver costs no more than a square. Some
models squash instead: both sides are resized to S, and nothing is cut.

As in PIL, the horizontal pass runs first, and its result is rounded. (Since version 13, Pillow runs
the vertical pass first if the height shrinks much more than the width; earlier versions, and thus
all published CLIP features, do not.)
"""

from typing import TypeVar

import numpy as np
import torch

from lpovod.exceptions import LpovodError

SUPPORT = {"bicubic": 2, "bilinear": 1}  # radius of PIL's filter, in pixels of the smaller image
# Bilinear sums often lie exactly between two grey levels; PIL's last bits decide the rounding.
PRECISION = {"bicubic": torch.float32, "bilinear": torch.float64}

FRACTION_BITS = 22  # fraction bits in PIL's fixed-point weights for 8-bit images
CROPS_AT_ONCE = 64  # crops whose weights are computed together; bounds memory at the paper's scale

Distances = TypeVar("Distances", np.ndarray, torch.Tensor)


def crop_boxes(box: np.ndarray, scale: float, width: int, height: int) -> np.ndarray:
    """The integer boxes that the original crops: scaled about their centre, rounded outwards.

    Args:
        box: (n, 4) float32 xyxy in pixels.
        scale: factor for both sides; the original uses 1 and 1.5.
        width: of the image in pixels; the result is clipped to it.
        height: of the image in pixels.

    Returns:
        (n, 4) int64 xyxy, half-open, not empty.

    Raises:
        LpovodError: naming the first box that is not finite, has no area, or lies outside.

    Source: prepare/extract_coco_embeddings_clip.py, in float64 (as in numpy at that time).
    """
    box = np.asarray(box, np.float64).reshape(-1, 4)
    near, far = (1 + scale) / 2, (1 - scale) / 2
    low = near * box[:, :2] + far * box[:, 2:]
    high = near * box[:, 2:] + far * box[:, :2]
    bounds = np.array([width, height])
    low, high = np.floor(low - 0.001).clip(0, bounds), np.ceil(high + 0.001).clip(0, bounds)
    valid = np.isfinite(box).all(axis=1)
    valid &= ((high > low) & (box[:, 2:] > box[:, :2])).all(axis=1)
    if not valid.all():
        number = int(np.flatnonzero(~valid)[0])
        raise LpovodError(
            f"box {number} {box[number].tolist()} has no area inside the image of "
            f"{width} x {height} pixels. Expected: x1 < x2 and y1 < y2, absolute pixels"
        )
    return np.concatenate([low, high], axis=1).astype(np.int64)


@torch.inference_mode()
def crop_and_resize(
    image: np.ndarray,
    boxes: np.ndarray,
    size: int,
    device: str | torch.device = "cpu",
    interpolation: str = "bicubic",
    resize_mode: str = "shortest",
) -> torch.Tensor:
    """Crop boxes and resize them to a square, as CLIP's preprocessing does.

    Args:
        image: (height, width, 3) uint8.
        boxes: (n, 4) int64 xyxy, half-open, inside the image and not empty (see `crop_boxes`).
        size: side of the result in pixels.
        device: computes and holds the result.
        interpolation: "bicubic" or "bilinear", both antialiased.
        resize_mode: "shortest" resizes the shorter side to `size` and cuts the centre; "squash"
            resizes both sides to `size`.

    Returns:
        (n, 3, size, size) uint8, equal to PIL's; bicubic, computed in float32, differs by one grey
        level on a few of 100,000 pixels.
    """
    if torch.device(device).type != "cpu":
        pixels = torch.from_numpy(image).to(device)
        return crop_and_resize_batched(pixels, boxes, size, interpolation, resize_mode)
    extent, resized, offset = _extents(boxes, size, resize_mode)
    # Channels inside each row: the pixels of a crop are then one matrix, without a copy.
    rows = torch.from_numpy(np.ascontiguousarray(image.transpose(0, 2, 1)))
    rows = rows.to(PRECISION[interpolation])
    result = torch.empty((len(boxes), 3, size, size), dtype=torch.uint8)
    # Crops with similar numbers of weights share a batch.
    order = np.argsort((extent / resized).max(axis=1), kind="stable")
    for start in range(0, len(order), CROPS_AT_ONCE):
        part = order[start : start + CROPS_AT_ONCE]
        x, y = (
            _Weights(
                boxes[part, axis],
                extent[part, axis],
                resized[part, axis],
                offset[part, axis],
                size,
                interpolation,
            )
            for axis in (0, 1)
        )
        pixels = rows.new_empty((len(part), size, 3 * size))
        for k in range(len(part)):
            _resize(rows, x, y, k, pixels[k])
        pixels = pixels.add_(0.5).clamp_(0, 255).to(torch.uint8).view(-1, size, 3, size)
        result[torch.from_numpy(part)] = pixels.transpose(1, 2)
    return result


@torch.inference_mode()
def crop_and_resize_batched(
    image: torch.Tensor,
    boxes: np.ndarray,
    size: int,
    interpolation: str = "bicubic",
    resize_mode: str = "shortest",
) -> torch.Tensor:
    """`crop_and_resize` as two products over many crops at once, on the image's device.

    The weights span the whole image and are zero outside the crop: more arithmetic, but no kernel
    launch per crop, which pays on an accelerator.
    """
    height, width = image.shape[:2]
    pixels = image.permute(2, 0, 1).to(PRECISION[interpolation]).reshape(3 * height, width)
    placed = np.concatenate([boxes[:, :2], *_extents(boxes, size, resize_mode)], axis=1)
    result = [torch.empty((0, 3, size, size), dtype=torch.uint8, device=image.device)]
    for part in torch.from_numpy(placed).to(image.device).split(CROPS_AT_ONCE):
        x, y = part.unflatten(1, (4, 2)).unbind(dim=2)
        weights = _dense_weights(x, size, width, interpolation)
        across = torch.matmul(pixels, weights.transpose(1, 2))
        across = across.add_(0.5).floor_().clamp_(0, 255).view(len(part), 3, height, size)
        weights = _dense_weights(y, size, height, interpolation)
        crops = torch.matmul(weights[:, None], across)
        result.append(crops.add_(0.5).clamp_(0, 255).to(torch.uint8))
    return torch.cat(result)


def _extents(
    boxes: np.ndarray, size: int, resize_mode: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sides of each crop, sides after resizing, and offset of the centre cut; each (n, 2)."""
    extent = boxes[:, 2:] - boxes[:, :2]
    if resize_mode == "squash":
        return extent, np.full_like(extent, size), np.zeros_like(extent)
    # torchvision's rule: int(size * long / short)
    resized = size * extent // extent.min(axis=1, keepdims=True)
    offset = np.rint((resized - size) / 2).astype(np.int64)  # to even, like Python's round
    return extent, resized, offset


def _dense_weights(
    placed: torch.Tensor, size: int, pixels: int, interpolation: str
) -> torch.Tensor:
    """The weights of `_sparse_weights` over a whole axis, (n, size, pixels).

    Args:
        placed: (n, 4) int64: first pixel, length, resized length and offset of each crop.
    """
    start, length, resized, offset = placed.double()[:, :, None].unbind(dim=1)
    step = torch.arange(size, device=placed.device)
    scale = length / resized
    stretch = scale.clamp(min=1)
    radius = SUPPORT[interpolation] * stretch
    centre = (offset + step + 0.5) * scale
    first = (centre - radius + 0.5).floor().clamp(min=0)[:, :, None]
    last = torch.minimum((centre + radius + 0.5).floor(), length)[:, :, None]
    pixel = (torch.arange(pixels, device=placed.device) - start)[:, None, :]
    x = (pixel + 0.5 - centre[:, :, None]).abs() / stretch[:, :, None]
    weight = _kernel(x, interpolation)
    weight = weight * ((x < SUPPORT[interpolation]) & (pixel >= first) & (pixel < last))
    weight /= weight.sum(dim=2, keepdim=True)
    weight = weight.mul_(2**FRACTION_BITS).round_().div_(2**FRACTION_BITS)
    return weight.to(PRECISION[interpolation])


def _resize(rows: torch.Tensor, x: "_Weights", y: "_Weights", k: int, out: torch.Tensor) -> None:
    line = rows.shape[2]
    height, width = y.width[k], x.width[k]
    # Strided views, because slicing costs more than a small product.
    crop = rows.as_strided((3 * height, width), (line, 1), 3 * line * y.start[k] + x.start[k])
    across = torch.mm(crop, x.matrix(k).t())
    across = across.add_(0.5).floor_().clamp_(0, 255).view(height, -1)
    torch.mm(y.matrix(k), across, out=out)


class _Weights:
    """Weight matrices (size, width) of many crops along one axis, for the pixels from `start` on.

    Args:
        first_pixel: (n,) int64, of each crop.
        length: (n,) int64, of each crop in pixels.
        resized: (n,) int64, length of the resized crop.
        offset: (n,) int64, of the centre in the resized crop.
        size: length of the centre.
        interpolation: a key of `SUPPORT`.
    """

    def __init__(
        self,
        first_pixel: np.ndarray,
        length: np.ndarray,
        resized: np.ndarray,
        offset: np.ndarray,
        size: int,
        interpolation: str,
    ) -> None:
        first, last, weight = _sparse_weights(length, resized, offset, size, interpolation)
        self._size, taps = size, weight.shape[-1]
        width = last[:, -1] - first[:, 0]
        self.start: list[int] = (first_pixel + first[:, 0]).tolist()
        self.width: list[int] = width.tolist()
        pitch = width + taps  # room for the zero weights beyond the last pixel
        begin = np.concatenate([[0], np.cumsum(size * pitch)])
        row = begin[:-1, None] + pitch[:, None] * np.arange(size) + first - first[:, :1]
        flat = torch.zeros(begin[-1], dtype=PRECISION[interpolation])
        flat.numpy()[row[:, :, None] + np.arange(taps)] = weight
        self._flat = flat
        self._begin, self._pitch = begin.tolist(), pitch.tolist()

    def matrix(self, k: int) -> torch.Tensor:
        return self._flat.as_strided(
            (self._size, self.width[k]), (self._pitch[k], 1), self._begin[k]
        )


def _sparse_weights(
    length: np.ndarray, resized: np.ndarray, offset: np.ndarray, size: int, interpolation: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """PIL's weights that resize n crops from `length` to `resized` pixels, and keep `size` of them.

    Returns:
        The first source pixel of each output pixel and the one past the last, both (n, size), and
        weights (n, size, taps), zero past the last pixel.
    """
    scale = (length / resized)[:, None]
    stretch = np.maximum(scale, 1)
    radius = SUPPORT[interpolation] * stretch
    centre = (offset[:, None] + np.arange(size) + 0.5) * scale
    first = np.maximum(np.floor(centre - radius + 0.5), 0).astype(np.int64)
    last = np.minimum(np.floor(centre + radius + 0.5).astype(np.int64), length[:, None])
    pixel = np.arange((last - first).max())
    x = np.abs(pixel + (first - centre + 0.5)[:, :, None]) / stretch[:, :, None]
    weight = _kernel(x, interpolation)
    weight[(x >= SUPPORT[interpolation]) | (pixel >= (last - first)[:, :, None])] = 0
    weight /= weight.sum(axis=-1, keepdims=True)
    return first, last, np.rint(weight * 2**FRACTION_BITS) / 2**FRACTION_BITS


def _kernel(x: Distances, interpolation: str) -> Distances:
    """PIL's filter at a distance of x >= 0 pixels; valid within its support."""
    if interpolation == "bilinear":
        return 1 - x
    where = torch.where if isinstance(x, torch.Tensor) else np.where
    return where(x < 1, (1.5 * x - 2.5) * x * x + 1, ((2.5 - 0.5 * x) * x - 4) * x + 2)
