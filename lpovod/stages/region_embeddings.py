"""Stage `region_embeddings`: a CLIP vector for every proposal of a shard.

CLIP sees a region at several scales (its box and 1.5 times its box): the raw features of the crops
are summed and normalised, as in the original. Each image is decoded once and its equal crops are
encoded once; threads decode and crop while CLIP encodes.

The work is divided into blocks of whole images; no batch crosses blocks. A block's vectors are
appended to the shard's checkpoint, and a killed shard resumes after its last complete block. No
vector depends on where the shard was killed, nor on the other images of its shard, so that any
number of shards gives the same bytes per image.
"""

import json
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np
import torch

from lpovod.artifacts import Identity, fingerprint, identity, sha256
from lpovod.clip import Clip, load_clip
from lpovod.config import ClipSettings, RegionEmbeddingsSettings
from lpovod.crops import crop_and_resize, crop_boxes
from lpovod.devices import explaining_memory, own_device
from lpovod.exceptions import LpovodError
from lpovod.formats.class_embeddings import clip_architecture
from lpovod.formats.coco import CocoDataset, read_dataset
from lpovod.formats.regions import RegionStore, Shard, read_shard, write_regions
from lpovod.progress import log, progress
from lpovod.transfers import send

STAGE = "region_embeddings"
BATCHES_AHEAD = 2  # of crops that wait to be encoded
IMAGES_AHEAD = 2  # decoded images that wait to be cropped, beyond one per thread
BLOCK_BATCHES = 8  # a kill loses at most one block
MARGIN = 1.0  # pixels that a proposal may reach beyond its image: imported proposals may be rounded
Item = TypeVar("Item")


@dataclass
class _Block:
    """Whole images that are embedded together.

    Attributes:
        counts: number of regions by image id, in the order of the shard.
        vectors: (regions of the images, D) float16 of unit norm.
    """

    counts: dict[int, int]
    vectors: np.ndarray | None = None


_Batch = tuple[torch.Tensor, tuple[_Block, list[np.ndarray]] | None]


def embed_regions(
    dataset: Path,
    proposals: Path,
    clip: ClipSettings,
    settings: RegionEmbeddingsSettings,
    checkpoint: Path,
    code: str,
    output: Path,
    device: str = "cpu",
    threads: int = 1,
) -> None:
    """Embed one shard of the proposals and write them with their boxes and objectness.

    The output is the same shard of a region store with the column ``embedding``, (n, D) float16 of
    unit norm. It has all images of the shard, including those without proposals.

    Args:
        dataset: json of the split.
        proposals: a shard of stage `proposals` for exactly this split.
        clip: the model.
        settings: scales, crops per batch, precision.
        checkpoint: file of the unfinished shard, to resume from; removed at the end.
        code: digest of the source code; a checkpoint written by different code is not resumed.
        output: the shard.
        device: device for the model and the crops; images are decoded on the CPU.
        threads: number of threads for torch, and for decoding. Several shards of one thread each
            are faster than one shard of several threads.

    Raises:
        LpovodError: if the proposals belong to other images, a proposal has no area or lies outside
            its image (before the first image is decoded), an image cannot be read, there is no such
            device, or its memory is too small.
    """
    device = own_device(device)
    torch.set_num_threads(threads)
    data = read_dataset(dataset)
    store, shard = read_shard(proposals, dataset, data.images)
    of_shard = {image_id: store.count(image_id) for image_id in shard.of(data.images)}
    for image_id in progress(of_shard, "checking proposals", " images"):
        _crops_of(data, store, image_id, settings.scales)
    model = load_clip(clip, device, settings.precision)
    ident = identity(
        STAGE,
        settings.model_dump(include={"scales", "precision"}),
        dataset=dataset,
        proposals=fingerprint(store.identity),
        clip_weights=model.weights_digest,
        clip_architecture=clip_architecture(clip),
        clip_preprocessing=fingerprint(asdict(model.preprocessing)),
    ) | {"code": code}
    log.info(
        f"shard {shard.number} of {shard.total}: {len(of_shard)} images, "
        f"{sum(of_shard.values())} regions"
    )
    if empty := [i for i, count in of_shard.items() if count == 0]:
        log.info(f"{len(empty)} images have no proposals: {str(empty[:10])[1:-1]}")
    blocks = _divide_into_blocks(of_shard, BLOCK_BATCHES * settings.batch_size, settings)
    run = {"settings": settings.model_dump(), "device": device, "threads": threads}
    run = fingerprint(ident | run | {"proposals": sha256(proposals)})
    with (
        explaining_memory("region_embeddings.batch_size (crops cut at once)"),
        _open_checkpoint(checkpoint, run) as file,
        progress(None, "region embeddings", " regions", sum(of_shard.values())) as bar,
    ):
        for block in _read_blocks(file, model.dimension):
            bar.update(sum(block.counts.values()))
            bar.initial = bar.n  # or these regions would count in the rate
            blocks.pop(0)
        if bar.n:
            log.info(f"resuming after {bar.n} regions of {checkpoint}")
        batches = _batches(data, store, model, blocks, settings, device, threads)
        for block in _embed(model, batches):
            _append(file, block)
            bar.update(sum(block.counts.values()))
        file.seek(len(run) + 1)
        _write(output, ident, shard, store, _read_blocks(file, model.dimension))
    checkpoint.unlink()


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


def _divide_into_blocks(
    counts: dict[int, int], crops: int, settings: RegionEmbeddingsSettings
) -> list[_Block]:
    """Blocks of at least `crops` crops; their boundaries depend only on the proposals."""
    blocks, filled = [_Block({})], 0
    for image_id, count in counts.items():
        if filled >= crops:
            blocks.append(_Block({}))
            filled = 0
        blocks[-1].counts[image_id] = count
        filled += count * len(settings.scales)
    return blocks


def _embed(model: Clip, batches: Iterator[_Batch]) -> Iterator[_Block]:
    """Fill the blocks of `_batches` with vectors."""
    features: list[torch.Tensor] = []
    for pixels, finished in _ahead(batches):
        features.append(model.encode_crops(pixels))
        if finished is not None:
            block, rows = finished
            # The host waits for the device here, once a block.
            block.vectors = _vectors(torch.cat(features).cpu().numpy(), rows)
            features = []
            yield block


def _vectors(features: np.ndarray, rows: list[np.ndarray]) -> np.ndarray:
    """Sum the features of each region's crops and normalise: (regions, D) float16.

    Args:
        features: (crops, D) float32.
        rows: for each image, the rows of its crops, (scales, regions) int64.
    """
    parts = [np.empty((0, features.shape[1]), np.float32)]
    parts += [features[of_image].sum(axis=0) for of_image in rows]
    summed = np.concatenate(parts)
    summed /= np.linalg.norm(summed, axis=1, keepdims=True)
    if not np.isfinite(summed).all():
        raise LpovodError("CLIP's features are not finite: are its weights damaged?")
    return summed.astype(np.float16)


def _batches(
    data: CocoDataset,
    store: RegionStore,
    model: Clip,
    blocks: list[_Block],
    settings: RegionEmbeddingsSettings,
    device: str,
    threads: int,
) -> Iterator[_Batch]:
    """Batches of different crops, filled across the images of a block.

    The last batch of a block may end with crops of no region. It brings the block and, for each
    image with regions, the rows of its crops among those of the block, (scales, regions) int64.
    """
    # The bits of a matrix product depend on its size. So that a region's vector does not depend on
    # the crops beside it, every pass of CLIP is full.
    per_pass = min(model.crops_per_pass, settings.batch_size)
    shape = (_round_up(settings.batch_size, per_pass), 3, model.image_size, model.image_size)
    to_decode = [i for b in blocks for i, n in b.counts.items() if n]
    with ThreadPoolExecutor(threads) as pool:
        images = _decode(data, to_decode, pool, threads + IMAGES_AHEAD)
        for block in blocks:
            batch, filled, rows, total = _empty(shape, device), 0, [], 0
            for image_id in [i for i, n in block.counts.items() if n]:
                pixels = send(next(images).result(), device)
                crops = _crops_of(data, store, image_id, settings.scales)
                crops, places = np.unique(crops, axis=0, return_inverse=True)
                rows.append(total + places.reshape(len(settings.scales), -1))
                total, start = total + len(crops), 0
                while start < len(crops):
                    part = crops[start : start + len(batch) - filled]
                    resized = crop_and_resize(
                        pixels,
                        part,
                        model.preprocessing.image_size,
                        device,
                        model.preprocessing.interpolation,
                        model.preprocessing.resize_mode,
                    )
                    batch[filled : filled + len(part)] = resized
                    start, filled = start + len(part), filled + len(part)
                    if filled == len(batch):
                        yield batch, None
                        batch, filled = _empty(shape, device), 0
            yield batch[: _round_up(filled, per_pass)], (block, rows)


def _round_up(number: int, step: int) -> int:
    return -(-number // step) * step


def _empty(shape: tuple[int, ...], device: str) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.uint8, device=device)


def _decode(
    data: CocoDataset, image_ids: list[int], pool: ThreadPoolExecutor, ahead: int
) -> Iterator[Future]:
    """The images in order; up to `ahead` are decoded before they are needed."""
    pending: deque[Future] = deque()
    for image_id in image_ids:
        pending.append(pool.submit(data.load, image_id))
        if len(pending) > ahead:
            yield pending.popleft()
    yield from pending


def _ahead(items: Iterable[Item]) -> Iterator[Item]:
    """The same items; a thread makes them `BATCHES_AHEAD` ahead of their use."""
    iterator = iter(items)
    with ThreadPoolExecutor(1) as pool:
        pending = deque(pool.submit(next, iterator, None) for _ in range(BATCHES_AHEAD))
        while (item := pending.popleft().result()) is not None:
            pending.append(pool.submit(next, iterator, None))
            yield item


@contextmanager
def _open_checkpoint(path: Path, run: str) -> Iterator[BinaryIO]:
    """Open a shard's checkpoint, positioned after its first line, or start a new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as file:
        file.seek(0)
        if file.readline() != f"{run}\n".encode():
            if file.tell():
                log.info(f"{path} has other settings, inputs or code: starting from the beginning")
            file.seek(0)
            file.truncate()
            file.write(f"{run}\n".encode())
        yield file


def _append(file: BinaryIO, block: _Block) -> None:
    """Append a block: a line of json, then its vectors."""
    assert block.vectors is not None
    counts = list(block.counts.items())
    file.write(json.dumps(counts).encode() + b"\n" + block.vectors.tobytes())
    file.flush()


def _read_blocks(file: BinaryIO, dimension: int) -> Iterator[_Block]:
    """Read the complete blocks from the current position; truncate an incomplete one at the end."""
    end = file.tell()
    while (line := file.readline()).endswith(b"\n"):
        block = _Block(dict(json.loads(line)))
        rows = sum(block.counts.values())
        content = file.read(2 * rows * dimension)
        if len(content) < 2 * rows * dimension:
            break
        block.vectors = np.frombuffer(content, np.float16).reshape(rows, dimension)
        end = file.tell()
        yield block
    file.seek(end)
    file.truncate()


def _write(
    output: Path, ident: Identity, shard: Shard, store: RegionStore, blocks: Iterable[_Block]
) -> None:
    with write_regions(output, ident, shard) as writer:
        for block in blocks:
            assert block.vectors is not None
            start = 0
            for image_id, count in block.counts.items():
                regions, vectors = store.read(image_id, []), block.vectors[start : start + count]
                writer.add(image_id, regions.box, regions.objectness, embedding=vectors)
                start += count
