"""Stage `region_embeddings`: a CLIP vector for every proposal, in shards that never split an image.

A region is seen at several scales (its box and 1.5 times its box): the raw CLIP features of the
crops are summed and brought to unit length, as in the original. Each image is decoded once; the
next crops are made in a thread while CLIP encodes a batch.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from lpovod import config
from lpovod.artifacts import LpovodError, identity
from lpovod.clip import Clip, load_clip
from lpovod.crops import crop_and_resize, crop_boxes
from lpovod.dataset import CocoDataset, read_dataset
from lpovod.progress import progress, say
from lpovod.proposals import read_proposals
from lpovod.store import RegionStore, write_regions
from lpovod.text_embeddings import clip_architecture

STAGE = "region_embeddings"
BATCHES_AHEAD = 2  # of crops, waiting to be encoded
MARGIN = 1.0  # pixels that a proposal may reach beyond its image, for other people's rounding

Item = TypeVar("Item")


def embed_regions(
    dataset: Path,
    proposals: Path,
    clip: config.Clip,
    settings: config.RegionEmbeddings,
    shard: int,
    output: Path,
    device: str = "cpu",
    threads: int = 1,
) -> None:
    """Embed the proposals of one shard's images and write them with their boxes and objectness.

    The output is a region store with the column ``embedding``, (n, D) float16 of unit norm, and
    with all images of the shard, those without proposals included. It gets its name when it is
    whole: a killed shard is the only work lost.

    Args:
        dataset: json of the images.
        proposals: region store of stage `proposals` for exactly these images.
        clip: the model.
        settings: scales, crops per batch, number of shards.
        shard: which one, from 0.
        output: the shard.
        device: of the model; decoding and cropping stay on the CPU.
        threads: of torch. Several shards of one thread each beat one shard of several threads.

    Raises:
        LpovodError: if the proposals are of other images, one has no area or lies outside its
            image (all before the first image is decoded), or an image cannot be read.
    """
    if not 0 <= shard < settings.shards:
        raise LpovodError(f"shard {shard} is not one of 0 ... {settings.shards - 1}")
    torch.set_num_threads(threads)
    data = read_dataset(dataset)
    store = read_proposals(proposals, dataset)
    _check_images(data, store)
    counts = {image_id: store.count(image_id) for image_id in data.images}
    mine = divide_images(counts, settings.shards)[shard]
    boxes = {image_id: _crops_of(data, store, image_id, settings.scales) for image_id in mine}
    model = load_clip(clip, device)
    ident = identity(
        STAGE,
        {"scales": settings.scales, "shards": settings.shards},
        dataset=dataset,
        proposals=proposals,
        clip_weights=model.weights_digest,
        clip_architecture=clip_architecture(clip),
    )
    total = sum(counts[image_id] for image_id in mine)
    say(f"shard {shard} of {settings.shards}: {len(mine)} images, {total} regions")
    batches = _ahead(_batches(data, boxes, model.image_size, settings.batch_size))
    features = _encode(model, batches)
    with (
        write_regions(output, ident) as writer,
        progress(None, "region embeddings", " regions", total) as bar,
    ):
        for image_id, rows in _by_image(features, boxes, model.dimension):
            regions = store.read(image_id, [])
            summed = rows.reshape(len(settings.scales), len(regions), model.dimension).sum(axis=0)
            summed /= np.linalg.norm(summed, axis=1, keepdims=True)
            writer.add(
                image_id, regions.box, regions.objectness, embedding=summed.astype(np.float16)
            )
            bar.update(len(regions))


def divide_images(counts: dict[int, int], shards: int) -> list[list[int]]:
    """Divide images over shards with about equal numbers of regions.

    Args:
        counts: regions by image id; the order does not matter.
        shards: how many.

    Returns:
        The image ids of each shard, ascending, and ascending from shard to shard.
    """
    divided: list[list[int]] = [[] for _ in range(shards)]
    before, total = 0, sum(counts.values())
    for image_id in sorted(counts):
        middle = 2 * before + counts[image_id]
        divided[min(shards * middle // (2 * total), shards - 1) if total else 0].append(image_id)
        before += counts[image_id]
    return divided


def _check_images(data: CocoDataset, store: RegionStore) -> None:
    listed, proposed = set(data.images), set(store.image_ids)
    if listed != proposed:
        odd = min(listed ^ proposed)
        where, other = (data.path, store.paths[0]) if odd in listed else (store.paths[0], data.path)
        raise LpovodError(
            f"{data.path} has {len(listed)} images, {store.paths[0]} has {len(proposed)}; image "
            f"{odd} is in {where} but not in {other}. Make the proposals again: snakemake "
            "--forcerun proposals"
        )


def _crops_of(
    data: CocoDataset, store: RegionStore, image_id: int, scales: list[float]
) -> np.ndarray:
    """Integer boxes of an image's crops, (scales * n, 4), one scale after the other."""
    box = store.read(image_id, []).box
    width, height = data.images[image_id]["width"], data.images[image_id]["height"]
    where = f"{store.paths[0]}, image {image_id} ({data.images[image_id]['file_name']})"
    beyond = (box < -MARGIN) | (box > np.array([width, height, width, height]) + MARGIN)
    if beyond.any():
        first = box[beyond.any(axis=1)][0].tolist()
        raise LpovodError(
            f"{where}: proposal {first} reaches beyond the {width} x {height} pixels of the "
            "image. Expected: xyxy in pixels of the original image"
        )
    try:
        return np.concatenate([crop_boxes(box, scale, width, height) for scale in scales])
    except LpovodError as error:
        raise LpovodError(f"{where}: {error}") from None


def _batches(
    data: CocoDataset, boxes: dict[int, np.ndarray], size: int, rows: int
) -> Iterator[torch.Tensor]:
    """All crops in order, in batches of `rows` that are filled across images."""
    batch, filled = torch.empty((rows, 3, size, size), dtype=torch.uint8), 0
    for image_id, crops in boxes.items():
        if len(crops) == 0:
            continue
        pixels, start = data.load(image_id), 0
        while start < len(crops):
            part = crops[start : start + rows - filled]
            batch[filled : filled + len(part)] = crop_and_resize(pixels, part, size)
            start, filled = start + len(part), filled + len(part)
            if filled == rows:
                yield batch
                batch, filled = torch.empty_like(batch), 0
    if filled:
        yield batch[:filled]


def _ahead(items: Iterable[Item]) -> Iterator[Item]:
    """The same items, made in a thread a few ahead of their use."""
    iterator = iter(items)
    with ThreadPoolExecutor(1) as pool:
        pending = deque(pool.submit(next, iterator, None) for _ in range(BATCHES_AHEAD))
        while (item := pending.popleft().result()) is not None:
            pending.append(pool.submit(next, iterator, None))
            yield item


def _encode(model: Clip, batches: Iterable[torch.Tensor]) -> Iterator[np.ndarray]:
    for batch in batches:
        yield model.encode_crops(batch).cpu().numpy()


def _by_image(
    features: Iterator[np.ndarray], boxes: dict[int, np.ndarray], dimension: int
) -> Iterator[tuple[int, np.ndarray]]:
    """Cut the stream of feature rows where images end: (image id, (crops, D) float32)."""
    waiting = np.empty((0, dimension), np.float32)
    for image_id, crops in boxes.items():
        parts, missing = [waiting[: len(crops)]], len(crops) - len(waiting)
        waiting = waiting[len(crops) :]
        while missing > 0:
            block = next(features)
            parts.append(block[:missing])
            waiting, missing = block[missing:], missing - len(block)
        yield image_id, np.concatenate(parts)
