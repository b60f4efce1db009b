"""Images on their way into a network: resized, flipped, normalised, batched.

Random choices are made by the sampler alone (`training_views`), so that the same seed gives the
same views for any number of loading processes and of ranks.
"""

import signal
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import cycle, islice
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lpovod.config import TrainingSettings
from lpovod.distributed import largest, rank, ranks
from lpovod.formats.coco import CocoDataset
from lpovod.torchvision_ops import clip_boxes_to_image
from lpovod.transfers import numbers, send

MEAN = (122.770935, 116.74601, 104.093735)
STD = (68.500534, 66.63216, 70.323166)


@dataclass(frozen=True)
class Normalisation:
    """What is subtracted from pixels, red, green and blue in 0 ... 255, and what divides them."""

    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD


HeightWidth = tuple[int, int]
"""Height and width."""

PAD_TO = 32

WEIGHT_BITS = 11
"""Of the fixed-point weights that OpenCV resizes bytes with."""


@dataclass(frozen=True)
class View:
    """How an image is shown to a network; `seed` is for what else is drawn at random for it."""

    image_id: int
    short_side: int
    long_side: int
    flip: bool = False
    seed: int = 0


@dataclass(frozen=True)
class LoadedView:
    """An image as it is shown, and how boxes get there.

    Attributes:
        view: the view.
        pixels: (3, h, w) uint8 RGB, resized and flipped; with `resize_to` as decoded.
        scale: (2,) float32, resized width and height over the original's.
        extra: whatever `load_views` was told to load with it.
        resize_to: height and width that a device is yet to resize the pixels to, before it flips
            them.
    """

    view: View
    pixels: Tensor
    scale: Tensor
    extra: Any = None
    resize_to: tuple[int, int] | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the view in pixels."""
        return self.resize_to or (self.pixels.shape[1], self.pixels.shape[2])

    def shown_on(self, device: str) -> Tensor:
        """The pixels of the view, (3, height, width) uint8, on a device."""
        pixels = send(self.pixels, device)
        return _show(pixels, self.view, self.resize_to) if self.resize_to else pixels

    def pin_memory(self) -> Self:
        """The same in pinned memory, as the loader asks of what it loads for a GPU."""
        return replace(self, pixels=self.pixels.pin_memory(), scale=self.scale.pin_memory())

    def to_view(self, boxes: np.ndarray | Tensor) -> Tensor:
        """Boxes of the original image, (n, 4), as boxes of the view, cut to it."""
        height, width = self.size
        boxes = clip_boxes_to_image(torch.as_tensor(boxes) * self.scale.repeat(2), (height, width))
        if self.view.flip:
            boxes = torch.stack(
                [width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], dim=1
            )
        return boxes


def shown_size(size: tuple[int, int], view: View) -> tuple[int, int]:
    """Height and width of an image in a view.

    The shorter side gets the view's length, unless the longer one would exceed its limit.

    Args:
        size: height and width of the image.
        view: the view.
    """
    height, width = size
    factor = min(view.long_side / max(height, width), view.short_side / min(height, width))
    return max(1, int(height * factor + 0.5)), max(1, int(width * factor + 0.5))


def apply_view(pixels: np.ndarray, view: View, on_device: bool = False) -> LoadedView:
    """Resize and flip an image.

    Args:
        pixels: (H, W, 3) uint8.
        view: how to show it.
        on_device: leave the work to the device that the view is sent to.
    """
    height, width = shown_size((pixels.shape[0], pixels.shape[1]), view)
    scale = torch.tensor([width / pixels.shape[1], height / pixels.shape[0]], dtype=torch.float32)
    image = torch.from_numpy(pixels).permute(2, 0, 1)
    if on_device:
        return LoadedView(view, image, scale, resize_to=(height, width))
    return LoadedView(view, _show(image, view, (height, width)).contiguous(), scale)


def _show(image: Tensor, view: View, size: tuple[int, int]) -> Tensor:
    if size != image.shape[1:]:
        image = resize(image, *size)
    return image.flip(2) if view.flip else image


def resize(pixels: Tensor, height: int, width: int) -> Tensor:
    """Bilinear without antialias, to the same bits as OpenCV's ``resize`` of bytes.

    OpenCV works in fixed point: weights have `WEIGHT_BITS` bits, the horizontal sum drops its last
    four, each vertical product the next sixteen, and their sum is rounded by two more.

    All is integer arithmetic, so every device finds the same bits.

    Args:
        pixels: (3, H, W) uint8.
        height: of the result.
        width: of the result.
    """
    left, right, part = _taps(pixels.shape[2], width, pixels.device)
    rows = pixels[:, :, left] * part[0]
    rows += pixels[:, :, right] * part[1]
    rows >>= 4
    above, below, part = _taps(pixels.shape[1], height, pixels.device)
    upper, lower = rows[:, above], rows[:, below]
    upper *= part[0][:, None]
    lower *= part[1][:, None]
    upper >>= 16
    lower >>= 16
    return ((upper + lower + 2) >> 2).byte()


def _taps(old: int, new: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """For each new pixel of an axis: the old ones before and after it, and (2, new) weights."""
    step = torch.arange(new, dtype=torch.float64, device=device)
    centre = ((step + 0.5) * (old / new) - 0.5).float()
    before, last = centre.floor(), old - 1
    weights = torch.stack([1 - (centre - before), centre - before]) * 2**WEIGHT_BITS
    before = before.int()
    return before.clamp(0, last), (before + 1).clamp(0, last), weights.round().int()


def batch(
    views: list[LoadedView],
    device: str,
    normalisation: Normalisation,
    pad_with_black: bool = False,
    at_least: int = 0,
) -> Tensor:
    """Normalised images, (n, 3, H, W) float32, padded right and below to a multiple of 32.

    Args:
        views: what to show.
        device: where the batch goes.
        normalisation: of the network, that of its backbone.
        pad_with_black: pad before normalising, as the original does in its tests, instead of with
            zeros after it, as in its training.
        at_least: images of the batch; empty ones fill it up.
    """
    # Of several ranks' batches all get the size of the largest: norms see the padding, too.
    height, width = largest([max(view.size[side] for view in views) for side in (0, 1)])
    count = max(len(views), at_least)
    images = torch.zeros(count, 3, padded(height), padded(width), device=device)
    mean, std = (
        numbers(values, images).view(3, 1, 1) for values in (normalisation.mean, normalisation.std)
    )
    if pad_with_black:
        images += -mean / std
    for image, view in zip(images, views, strict=False):
        shown = image[:, : view.size[0], : view.size[1]]
        shown.copy_((view.shown_on(device).float() - mean) / std)
    return images


def padded(side: int) -> int:
    """A side in pixels, rounded up to a multiple of `PAD_TO`."""
    return -(-side // PAD_TO) * PAD_TO


def training_views(
    data: CocoDataset,
    image_ids: list[int],
    settings: TrainingSettings,
    long_side: int,
    seed: int,
    epoch: int,
    step: int = 0,
) -> list[View]:
    """The views of one epoch from a step on: every image once, in random order, size, direction.

    The images of a step are all upright or all not, as on each GPU of the original: padded to one
    size, others would take a third more memory. The rest of both come last, each filled up with the
    first views of its orientation, so that every step has its full number.
    """
    draw = np.random.default_rng([seed, epoch])
    order = draw.permutation(len(image_ids))
    sides = draw.choice(settings.short_sides, len(image_ids))
    flips = draw.random(len(image_ids)) < settings.flip
    seeds = draw.integers(2**62, size=len(image_ids))
    views: list[View] = []
    groups: dict[bool, list[View]] = {True: [], False: []}
    full = settings.images_per_step
    for i, side, flip, own in zip(order, sides, flips, seeds, strict=True):
        group = groups[_upright(data, image_ids[i])]
        group.append(View(image_ids[i], int(side), long_side, bool(flip), int(own)))
        if len(group) % full == 0:
            views += group[-full:]
    for group in groups.values():
        if rest := len(group) % full:
            views += [*group[-rest:], *islice(cycle(group), full - rest)]
    return views[step * full :]


def steps_per_epoch(data: CocoDataset, image_ids: list[int], images_per_step: int) -> int:
    """How many steps `training_views` makes of these images."""
    upright = sum(_upright(data, image_id) for image_id in image_ids)
    return sum(-(-count // images_per_step) for count in (upright, len(image_ids) - upright))


def _upright(data: CocoDataset, image_id: int) -> bool:
    image = data.images[image_id]
    return image["height"] > image["width"]


class _Loading(torch.utils.data.Dataset):
    """Loads what it is asked for; a view is the index."""

    def __init__(self, dataset: CocoDataset, extra: Any, on_device: bool):
        self.dataset, self.extra, self.on_device = dataset, extra, on_device

    def __getitem__(self, view: View) -> LoadedView:
        shown = apply_view(self.dataset.load(view.image_id), view, self.on_device)
        return replace(shown, extra=self.extra(shown)) if self.extra else shown


def load_views(
    dataset: CocoDataset,
    views: list[View],
    per_batch: int,
    workers: int = 0,
    extra: Any = None,
    device: str = "cpu",
) -> Iterable[list[LoadedView]]:
    """Load views in order, in lists of `per_batch`, divided over the ranks.

    Args:
        dataset: where the images are.
        views: what to load.
        per_batch: images per list, of all ranks together; the last one may be shorter.
        workers: loading processes; 0 loads in this one.
        extra: called with each loaded view (in the worker); its result is attached.
        device: where the views go; other than a CPU, it resizes them itself (`batch`).
    """
    return _loader(dataset, _lists_of_rank(views, per_batch), workers, extra, device)


def training_batches(
    dataset: CocoDataset,
    image_ids: list[int],
    settings: TrainingSettings,
    long_side: int,
    seed: int,
    device: str,
    extra: Any = None,
) -> Callable[[int, int], Iterable[list[LoadedView]]]:
    """A function of epoch and step: this rank's parts of the batches of `training_views`.

    Loading processes outlive an epoch.

    Args:
        dataset: where the images are.
        image_ids: of the training.
        settings: the schedule.
        long_side: of the views, at most.
        seed: of all that is drawn.
        device: where the views go.
        extra: as in `load_views`; a loading process gets a copy, by pickle where it is not forked.
    """
    lists: list[list[View]] = []
    loader = _loader(dataset, lists, settings.workers, extra, device)

    def batches(epoch: int, step: int) -> Iterable[list[LoadedView]]:
        views = training_views(dataset, image_ids, settings, long_side, seed, epoch, step)
        lists[:] = _lists_of_rank(views, settings.images_per_step)
        return loader

    return batches


def _lists_of_rank(views: list[View], per_batch: int) -> list[list[View]]:
    starts = range(0, len(views), per_batch)
    return [views[start : start + per_batch][rank() :: ranks()] for start in starts]


def _loader(
    dataset: CocoDataset, lists: list[list[View]], workers: int, extra: Any, device: str
) -> DataLoader:
    kind = torch.device(device).type
    return DataLoader(
        _Loading(dataset, extra, on_device=kind != "cpu"),
        batch_sampler=lists,
        num_workers=workers,
        worker_init_fn=leave_signals,
        collate_fn=list,
        persistent_workers=workers > 0,
        pin_memory=kind == "cuda",
    )


def leave_signals(worker: int) -> None:
    """Have a loading process leave signals to the program that it loads for, and ends with.

    A training that is asked to end needs its workers until the step is done.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def inference_views(
    dataset: CocoDataset,
    image_ids: list[int],
    short_side: int,
    long_side: int,
    per_batch: int,
    device: str = "cpu",
    threads: int = 1,
) -> Iterable[list[LoadedView]]:
    """Load images unflipped, at one size, in lists of at most `per_batch`, one size after another.

    Images of one list have one size once they are padded, so that none is padded for the sake of
    another and what a network says of it does not depend on its neighbours; all lists of a size
    but its last are full.

    Args:
        dataset: where the images are.
        image_ids: images to load.
        short_side: length of the shorter side in pixels.
        long_side: limit of the longer side.
        per_batch: images per list.
        device: where the views go.
        threads: of the job; beside a GPU all but one load images, on a CPU the network needs them.
    """
    of_size: dict[tuple[int, int], list[View]] = {}
    for image_id in image_ids:
        view = View(image_id, short_side, long_side)
        height, width = shown_size(dataset.size(image_id), view)
        of_size.setdefault((padded(height), padded(width)), []).append(view)
    lists = [
        views[start : start + per_batch]
        for views in of_size.values()
        for start in range(0, len(views), per_batch)
    ]
    workers = 0 if device == "cpu" else threads - 1
    return _loader(dataset, lists, workers, None, device)
