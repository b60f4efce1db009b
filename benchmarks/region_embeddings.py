"""Regions embedded per second: this project, the original's design, and the bare model.

Run as ``python -m benchmarks.region_embeddings --images FOLDER`` on an idle machine. ViT-B/32 has
random weights, which cost the same time as real ones. Ends with one JSON line.

*Ours* is the stage as the workflow runs it: on a CPU one shard of one thread per core, in parallel.
*The original's design* is that of its extraction script: a data loader with two workers that
decodes the image and crops it with PIL for every region and scale, batches of 128, float32, all
cores. *The bare model* encodes crops in memory, with the precision and number of processes of ours;
a region needs two.

All times leave out start-up (imports, model): the processes wait for one another.
"""

import json
import multiprocessing
import os
import re
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import open_clip
import torch
import tyro
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional
from torchvision.transforms import (
    CenterCrop,
    Compose,
    InterpolationMode,
    Normalize,
    Resize,
    ToTensor,
)

from lpovod.artifacts import identity
from lpovod.clip import load_clip
from lpovod.config import ClipSettings, RegionEmbeddingsSettings
from lpovod.crops import crop_boxes
from lpovod.formats.regions import (
    RegionStore,
    Shard,
    open_shards,
    read_proposals,
    shards_in,
    write_regions,
)
from lpovod.stages import region_embeddings

ARCHITECTURE = "ViT-B-32-quickgelu"
SCALES = (1.0, 1.5)


@dataclass
class Options:
    images: Path
    """folder of photographs"""
    count: int = 4
    """number of photographs"""
    proposals: int = 50
    """regions per photograph"""
    precision: Literal["float32", "bfloat16"] | None = None
    """precision of ours; by default the one in which this machine multiplies matrices faster"""
    device: Annotated[str, tyro.conf.arg(help="default: cuda if available")] = (
        "cuda" if torch.cuda.is_available() else "cpu"
    )


def make_inputs(folder: Path, options: Options, shards: int) -> ClipSettings:
    """A dataset with proposals in shards, and a CLIP with random weights."""
    random = np.random.default_rng(0)
    paths = sorted(p for p in options.images.rglob("*") if p.suffix.lower() in (".jpg", ".png"))
    if len(paths) < options.count:
        raise SystemExit(f"{options.images} holds {len(paths)} images, {options.count} are needed")
    (folder / "images").mkdir()
    (folder / "images" / "train").symlink_to(options.images.resolve())
    listed, boxes = [], {}
    for number, path in enumerate(paths[: options.count]):
        width, height = Image.open(path).size
        name = str(path.relative_to(options.images))
        listed.append({"id": number, "file_name": name, "width": width, "height": height})
        # Sides from a tenth of the image's side to all of it, equally many per octave.
        size = 0.1 ** random.uniform(0, 1, (options.proposals, 2)) * [width, height]
        low = random.uniform(0, 1, size.shape) * ([width, height] - size)
        boxes[number] = np.concatenate([low, low + size], axis=1).astype(np.float32)
    content = {"images": listed, "annotations": [], "categories": [{"id": 1, "name": "thing"}]}
    (folder / "train.json").write_text(json.dumps(content))
    made_from = identity("proposals", dataset=folder / "train.json")
    for shard in [Shard(number, shards) for number in range(shards)]:
        with write_regions(folder / f"proposals/{shard.number}.h5", made_from, shard) as writer:
            for image_id in shard.of(boxes):
                writer.add(image_id, boxes[image_id], np.ones(options.proposals, np.float32))
    torch.manual_seed(0)
    model = open_clip.create_model(ARCHITECTURE)
    save_file(
        {k: v.contiguous() for k, v in model.state_dict().items()}, folder / "clip.safetensors"
    )
    return ClipSettings(
        architecture=ARCHITECTURE, weights=folder / "clip.safetensors", vocabulary=None
    )


def side_by_side(work, count: int, *args) -> tuple[list, float]:
    """Results of `work(number, ready, *args)` in `count` processes, and the GiB of the largest."""
    context = multiprocessing.get_context("spawn")
    ready = context.Barrier(count)
    results = context.Queue()
    processes = [
        context.Process(target=_report, args=(results, work, number, ready, *args))
        for number in range(count)
    ]
    for process in processes:
        process.start()
    reports = [results.get() for _ in processes]
    for process in processes:
        process.join()
    for result, _ in reports:
        if isinstance(result, Exception):
            raise result
    return [result for result, _ in reports], max(size for _, size in reports)


def _report(results, work, number, ready, *args) -> None:
    try:
        result = work(number, ready, *args)
    except Exception as error:
        ready.abort()  # or the other processes would wait for this one
        result = error
    results.put((result, peak_gib()))


def peak_gib() -> float:
    """Peak memory of this process; getrusage would include its parent's at the time of the fork."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 2**20


def embed(number, ready, folder, clip, settings, device) -> tuple[float, float]:
    """Start and end of one shard; it starts when all processes have loaded their models."""
    started = []

    def load(*arguments):
        model = load_clip(*arguments)
        model.encode_crops(torch.zeros(8, 3, 224, 224, dtype=torch.uint8))  # warm
        ready.wait()
        started.append(time.time())
        return model

    region_embeddings.load_clip = load
    region_embeddings.embed_regions(
        folder / "train.json",
        folder / f"proposals/{number}.h5",
        clip,
        settings,
        folder / f"{number}.checkpoint",
        "",
        folder / f"{number}.h5",
        device,
        1 if device == "cpu" else os.cpu_count(),
    )
    return started[0], time.time()


def bare(number, ready, clip, precision, device, crops) -> tuple[float, float]:
    """Start and end of encoding `crops` crops."""
    torch.set_num_threads(1)
    model = load_clip(clip, device, precision)
    pixels = torch.randint(0, 256, (crops, 3, 224, 224), dtype=torch.uint8, device=device)
    model.encode_crops(pixels[:8]).cpu()
    ready.wait()
    start = time.time()
    model.encode_crops(pixels).cpu()
    return start, time.time()


class OriginalRegions(torch.utils.data.Dataset):
    """Both crops of a region, from an image that is decoded for each region."""

    def __init__(self, folder: Path):
        store = read_proposals(shards_in(folder / "proposals"), folder / "train.json")
        self.regions = [
            (folder / "images" / "train" / image["file_name"], box)
            for image in json.loads((folder / "train.json").read_text())["images"]
            for box in store.read(image["id"]).box
        ]
        self.transform = Compose(
            [
                Resize(224, InterpolationMode.BICUBIC),
                CenterCrop(224),
                ToTensor(),
                Normalize(open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD),
            ]
        )

    def __len__(self) -> int:
        return len(self.regions)

    def __getitem__(self, number: int) -> tuple[torch.Tensor, ...]:
        path, box = self.regions[number]
        image = Image.open(path).convert("RGB")
        return tuple(
            self.transform(image.crop(crop_boxes(box[None], scale, *image.size)[0].tolist()))
            for scale in SCALES
        )


def original(number, ready, folder, clip, device) -> tuple[float, float, np.ndarray]:
    """Start, end and vectors of the original's design."""
    torch.set_num_threads(os.cpu_count())
    model = open_clip.create_model(ARCHITECTURE).eval().to(device)
    model.load_state_dict(load_file(clip.weights))
    loader = torch.utils.data.DataLoader(OriginalRegions(folder), 128, num_workers=2)
    with torch.no_grad():
        model.encode_image(torch.zeros(8, 3, 224, 224, device=device)).cpu()
        start, vectors = time.time(), []
        for crops in loader:
            feature = sum(model.encode_image(crop.to(device)) for crop in crops)
            vectors.append(functional.normalize(feature, dim=1).cpu())
        return start, time.time(), torch.cat(vectors).numpy()


def main(options: Options) -> None:
    shards = os.cpu_count() if options.device == "cpu" else 1
    regions = options.count * options.proposals
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        clip = make_inputs(folder, options, shards)
        ((start, end, expected),), _ = side_by_side(original, 1, folder, clip, options.device)
        reference = regions / (end - start)
        _row("the original's design, float32", reference)
        precision = options.precision or faster_precision(options.device)
        settings = RegionEmbeddingsSettings(precision=precision)
        times, memory = side_by_side(embed, shards, folder, clip, settings, options.device)
        ours = regions / _span(times)
        crops = 2 * regions // shards
        times, _ = side_by_side(bare, shards, clip, precision, options.device, crops)
        model = regions / _span(times)
        paths = [folder / f"{n}.h5" for n in range(shards)]
        store = open_shards(paths, "region_embeddings")
        vectors = np.concatenate([b["embedding"] for b in store.blocks(1 << 16)])
        _row(f"ours, {precision}, {shards} shards", ours, memory)
        _row(f"bare model, {precision}, {shards} processes", model)
        unit = functional.normalize(torch.from_numpy(vectors).double()).numpy()
        apart = float((1 - (unit * expected).sum(axis=1)).max())
        print(f"cosine distance of ours to the original's vectors: {apart:.1e} at most")
        print(f"one image's vectors, read at random, warm: {_milliseconds_of_a_read(store):.2f} ms")
    ratios = {"ratio_to_reference": ours / reference, "ratio_to_bare_model": ours / model}
    ratios = {name: round(ratio, 3) for name, ratio in ratios.items()}
    print(json.dumps(ratios | {"device": options.device}))


def faster_precision(device: str) -> str:
    def seconds(dtype: torch.dtype) -> float:
        rows = torch.ones(1600, 768, dtype=dtype, device=device)
        times = []
        for _ in range(3):
            start = time.perf_counter()
            (rows @ rows.T).sum().item()
            times.append(time.perf_counter() - start)
        return min(times)

    return min(("float32", "bfloat16"), key=lambda name: seconds(getattr(torch, name)))


def _span(times: list[tuple[float, float]]) -> float:
    return max(end for _, end in times) - min(start for start, _ in times)


def _row(what: str, rate: float, memory: float | None = None) -> None:
    size = "" if memory is None else f"   {memory:.2f} GiB per process"
    print(f"{what:40} {rate:8.1f} regions/s{size}", flush=True)


def _milliseconds_of_a_read(store: RegionStore) -> float:
    order = np.random.default_rng(0).choice(store.image_ids, 200).tolist()
    for image_id in order:
        store.read(image_id)
    start = time.perf_counter()
    for image_id in order:
        store.read(image_id)
    return 1000 * (time.perf_counter() - start) / len(order)


if __name__ == "__main__":
    main(tyro.cli(Options))
