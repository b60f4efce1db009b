"""`lpovod plan`: what a configuration will cost, stage by stage, and what it has cost.

    lpovod plan config.yaml configs/coco.yaml [mine.yaml ...] [--images 2000000 50000]

Operations are counted on the configured networks, disk and memory are those of the arrays, times of
one processor core are measured (docs/scaling.md); the speeds of processors and disks are assumed.
"""

import os
import textwrap
from pathlib import Path
from typing import Annotated, NamedTuple

import tyro

from lpovod.catalogue import COCO, COCO_IMAGES
from lpovod.config import Config, DatasetSettings, read_config
from lpovod.exceptions import UsageError
from lpovod.formats.benchmarks import stage_times
from lpovod.miniature.scenes import IMAGE_SIZE

TRAINING = 3  # forward and backward pass, in forward passes
BOX = 20  # bytes of a region's box and objectness
DETECTION = 200  # bytes of a detection as json
DETECTED = 3e3  # bytes of a detection in memory, in all ablations
DRAWN = 9.7e3  # bytes of an image of the miniature world and its annotations

# Seconds of one core, measured.
PHOTOGRAPH = (480, 640)  # pixels: COCO's are of this size, or upright
DECODING, RESIZING = 4.6e-3, 23e-3  # of a photograph; to 800 pixels, (800, 1067)
DRAWING = 4.7e-3  # an image of the miniature world
INDEXING = 19e-9  # of a byte of the index: read, converted, written
PROBING = 6e-5  # of a retrieved image in one epoch of the linear probe
SCORING = 8.5e-6  # of a region and class, in all ablations
HEAVY_START, LIGHT_START = 2.2, 0.5  # of a job with torch, and without it

CROPPING = 1 / 16_600  # seconds of a GPU, measured on an H100 with earlier code, for one crop

# Assumed.
TFLOPS = 20.0  # what one GPU sustains on such networks; measure yours and say --tflops
GFLOPS = 60.0  # what one core sustains; measured: about 45 in trainings, 65 to 90 elsewhere
READING = 2e9  # bytes per second
GPUS = (1, 8, 64)
FEEDERS = 3  # processes that decode images for a job on a GPU, as in rules/resources.smk
TRAINING_CORES = 8  # at most, as in rules/resources.smk

TIMES = {"s": 1.0, "min": 60.0, "h": 3600.0}
SIZES = {"MB": 1e6, "GB": 1e9}
SHOWN = 0.05  # the smallest number that is printed

ARRAYS = (
    "Memory is that of the large arrays of one job, beside what libraries and annotations take."
)
EXTRACTING = "While it is extracted, train2017.zip takes its 19.3 GB once more."
COMPARED = (
    "Measured are the jobs of the run, their times added up; the ratio is predicted over measured. "
    "The peak is the largest memory of one job, libraries and annotations included."
)


class Cost(NamedTuple):
    """Of one stage: all its jobs together, but for the memory, which is one job's.

    Attributes:
        stage: its name.
        gflop: operations of the networks.
        core: seconds of a processor core, beside these; on GPUs, of the cores that feed one.
        jobs: that share it, on a GPU each; any number of GPUs shares a training.
        disk: bytes that stay.
        memory: bytes of the largest arrays in main memory; 0 where none is large.
        start: seconds until its jobs have started, all together.
        threads: cores that a job uses where there is no GPU.
        trains: whether it is a training, a job that several GPUs share.
        crops: that are cut on a GPU, beside the operations of the networks.
    """

    stage: str
    gflop: float = 0.0
    core: float = 0.0
    jobs: int = 1
    disk: float = 0.0
    memory: float = 0.0
    start: float = 0.0
    threads: int = 1
    trains: bool = False
    crops: float = 0.0

    def on_gpus(self, tflops: float, gpus: int) -> float:
        """Seconds on so many GPUs: to compute, or to load the images if that takes longer."""
        shared = gpus if self.trains else min(gpus, self.jobs)
        return max(self.gflop / tflops / 1e3 + self.crops * CROPPING, self.core) / shared

    def on_cores(self, gflops: float, cores: int) -> float:
        """Seconds of all its jobs, one after the other, each on as many cores as it can use."""
        return self.start + self.gflop / gflops / min(self.threads, cores) + self.core


def plan(
    config: Annotated[tuple[Path, ...], tyro.conf.Positional] = (Path("config.yaml"),),
    images: tuple[int, int] | None = None,
    size: tuple[int, int] | None = None,
    tflops: float = TFLOPS,
    gflops: float = GFLOPS,
    cores: int | None = None,
) -> str:
    """Predict time, disk and memory of each stage; of a finished run, show measured times beside.

    Weights need not be there. With `gpu: true` times are those of 1, 8 and 64 GPUs, otherwise those
    of a machine without a GPU.

    Args:
        config: config.yaml and the overlays laid over it, in order
        images: of the training and the validation split; without it the configuration's
        size: width and height of most images in pixels; without it, of photographs, COCO's
        tflops: 10^12 operations per second that one GPU sustains
        gflops: 10^9 operations per second that one core sustains
        cores: of the machine, without a GPU; without it this machine's

    Returns:
        The table and what it assumes.

    Raises:
        UsageError: if a number is not positive.
        LpovodError: if the configuration is wrong or a benchmark file of the run is unreadable.
    """
    numbers = [images[0] if images else 1, *(size or []), tflops, gflops]
    if min(*numbers, 1 if cores is None else cores) <= 0 or images and images[1] < 0:
        raise UsageError("--images, --size, --tflops, --gflops and --cores must be positive")
    settings = read_config(config, weights=False)
    dataset, cores = settings.dataset, cores or os.cpu_count() or 1
    train, val = images or (dataset.image_count("train"), dataset.image_count("val"))
    guessed = not images and dataset.source == "coco" and not dataset.coco.download
    rows = costs(settings, train, val, size)
    measured = {} if images else _measured(Path("results", settings.name, "benchmarks"))
    if measured:
        gpus = settings.training_gpus * settings.training_nodes
        predicted = [
            row.on_gpus(tflops, gpus if row.trains else 1)
            if settings.gpu
            else row.on_cores(gflops, cores)
            for row in rows
        ]
        text = comparison(rows, predicted, measured)
    elif settings.gpu:
        text = table(rows, {_number(n, "GPU"): [r.on_gpus(tflops, n) for r in rows] for n in GPUS})
    else:
        text = table(rows, {_number(cores, "core"): [r.on_cores(gflops, cores) for r in rows]})
    added = another_class(settings, train, val, rows)
    notes = [
        _notes_on_gpus(tflops) if settings.gpu else _notes_on_cores(rows, gflops, cores),
        ARRAYS,
        EXTRACTING if rows[0].stage == "download" else "",
        COMPARED if measured else "",
        _note_on_learning(added, settings.gpu, tflops, gflops, cores) if added else "",
    ]
    return "\n\n".join(
        [
            f"{'about ' * guessed}{train:,} training and {val:,} validation images",
            text,
            "\n".join(textwrap.fill(note, 95) for note in notes if note),
        ]
    )


def _note_on_learning(added: Cost, gpu: bool, tflops: float, gflops: float, cores: int) -> str:
    seconds = added.on_gpus(tflops, 1) + added.start if gpu else added.on_cores(gflops, cores)
    unit = _unit(seconds, TIMES)
    machine = "one GPU" if gpu else _number(cores, "core")
    return (
        "Once it is finished, a class more (`lpovod learn`) takes about "
        f"{seconds / TIMES[unit]:.0f} {unit} on {machine}."
    )


def _notes_on_gpus(tflops: float) -> str:
    return (
        f"Assumed: GPUs that sustain {tflops:g} TFLOP/s each (--tflops), waits included, and lose "
        f"nothing together; {FEEDERS} cores that decode the images of a job, or `workers` for each "
        f"GPU of a training, {1 / DECODING:.0f} photographs a second each; a disk that reads "
        f"{READING / 1e9:g} GB/s; {1 / CROPPING:,.0f} crops a second on each GPU, as an H100 cut. "
        "At most `shards` jobs share a pass over the training images. Stages that are not listed "
        "cost next to nothing."
    )


def _notes_on_cores(rows: list[Cost], gflops: float, cores: int) -> str:
    busy = sum(row.on_cores(gflops, cores) * min(row.threads, cores) for row in rows) / cores
    unit = _unit(busy, TIMES)
    return (
        "Times are those of all jobs of a stage, one after the other. Where jobs run beside one "
        f"another, the whole run takes about {busy / TIMES[unit]:,.0f} {unit} on "
        f"{_number(cores, 'core')}. Assumed: {gflops:g} GFLOP/s of each core (--gflops), "
        f"{HEAVY_START:g} s to start a job with torch and {LIGHT_START:g} s without, a disk that "
        f"reads {READING / 1e9:g} GB/s. A stage may take half or twice its figure."
    )


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def image_size(dataset: DatasetSettings) -> tuple[int, int]:
    """Height and width of an image in pixels; of photographs, which differ, the most frequent."""
    return PHOTOGRAPH if dataset.source == "coco" else (IMAGE_SIZE, IMAGE_SIZE)


def network_size(config: Config, size: tuple[int, int] | None = None) -> tuple[int, int]:
    """Height and width of an image as the networks see it in inference, before it is padded."""
    height, width = size[::-1] if size else image_size(config.dataset)
    factor = min(config.backbone.short_side / height, config.backbone.long_side / width)
    return int(height * factor + 0.5), int(width * factor + 0.5)


def loading(config: Config, size: tuple[int, int] | None = None) -> tuple[float, float]:
    """Seconds of one core to decode an image, and to resize it too unless a GPU does."""
    original, seen = size[::-1] if size else image_size(config.dataset), network_size(config, size)
    decoding = DECODING * original[0] * original[1] / (PHOTOGRAPH[0] * PHOTOGRAPH[1])
    if config.gpu or seen == original:
        return decoding, decoding
    return decoding, decoding + RESIZING * seen[0] * seen[1] / (800 * 1067)


def costs(config: Config, train: int, val: int, size: tuple[int, int] | None = None) -> list[Cost]:
    """The stages in their order, but for those whose results are read from somebody's files.

    Args:
        config: of the miniature world, of COCO or of any other images.
        train: number of training images.
        val: number of validation images.
        size: width and height of most images in pixels; None for the source's.

    Raises:
        LpovodError: if there is no such CLIP or backbone.
    """
    # torch takes seconds to import, which help and errors need not wait for.
    from lpovod.operations import count_operations

    work = count_operations(config, *network_size(config, size))
    proposals, detector, embeddings = (
        config.proposals,
        config.base_detector,
        config.region_embeddings,
    )
    # What is trained or retrieved, and not read from somebody's files.
    trains, probes = not detector.checkpoint, not config.linear_probe.checkpoint
    retrieves = probes and not config.pseudo_labels.file
    proposed = train * (trains or probes) + val  # images
    embedded = train * (trains or retrieves) + val * config.evaluation.clip_on_crops  # images
    novel = len(config.classes.novel)
    classes = len(config.classes.base) + novel
    # At most so many images: those that several classes retrieve are extracted once.
    retrieved = config.retrieved_images(train) * probes
    # Jobs of a pass over the images of each split.
    of_train, of_val = config.shards, config.shards_of(val) * bool(val)
    proposing = of_train * (trains or probes) + of_val
    embedding = of_train * (trains or retrieves) + of_val * config.evaluation.clip_on_crops
    extracting = of_val + config.shards_of(retrieved) * probes
    per_image, (decoding, shown) = proposals.per_image, loading(config, size)
    feeders = FEEDERS if config.gpu else 1
    crops = embedded * per_image * len(embeddings.scales)
    row = BOX + 2 * work.dimension  # bytes of an embedded region
    indexed = train * per_image * (row + 8)  # bytes
    extracted = per_image * (BOX + 16 + 2 * (detector.dimension + work.dimension))  # of an image
    distilled = min(per_image, detector.distillation_regions)
    learned = detector.samples_per_image * work.region_head + distilled * work.clip_head
    training_threads = min(TRAINING_CORES, max(2, train // 50))
    rows = [
        Cost("download", disk=sum(remote.size or 0 for remote in COCO.values())),
        _dataset(config.dataset, train + val),
        Cost("text_embeddings", start=HEAVY_START),
        Cost(
            "proposal_network",
            proposals.training.epochs * train * TRAINING * work.proposal_network,
            proposals.training.epochs * train * shown / max(1, proposals.training.workers),
            disk=4 * work.proposal_weights,
            start=HEAVY_START,
            threads=training_threads,
            trains=True,
        ),
        Cost(
            "proposals",
            proposed * work.proposal_network,
            proposed * shown / feeders,
            jobs=proposing,
            disk=proposed * per_image * BOX,
            start=proposing * HEAVY_START,
        ),
        Cost(
            "region_embeddings",
            crops * work.crop,
            embedded * decoding / feeders,
            jobs=embedding,
            disk=embedded * per_image * row,
            memory=3 * embeddings.batch_size * 3 * work.crop_size**2 * 4,
            start=embedding * HEAVY_START,
            crops=crops,
        ),
        Cost(
            "region_index",
            core=indexed * INDEXING,
            disk=indexed,
            memory=config.region_index.block_rows * 4 * work.dimension,
            start=LIGHT_START,
        ),
        Cost(
            "base_detector",
            detector.training.epochs * train * TRAINING * (work.pyramid + work.rpn + learned),
            detector.training.epochs * train * shown / max(1, detector.training.workers),
            disk=4 * work.detector_weights,
            start=HEAVY_START,
            threads=training_threads,
            trains=True,
        ),
        Cost(
            "pseudo_labels",
            core=(1 + bool(config.pseudo_labels.ignored)) * indexed / READING,
            start=LIGHT_START,
        ),
        Cost(
            "region_features",
            (val + retrieved) * (work.pyramid + per_image * work.extraction),
            (val + retrieved) * shown / feeders,
            jobs=extracting,
            disk=(val + retrieved) * extracted,
            start=extracting * HEAVY_START,
        ),
        Cost(
            "linear_probe",
            core=config.linear_probe.epochs * retrieved * PROBING,
            start=LIGHT_START,
        ),
        Cost(
            "evaluation",
            core=val * per_image * classes * SCORING,
            disk=val * config.evaluation.per_image * DETECTION,
            memory=val * config.evaluation.per_image * DETECTED,
            start=HEAVY_START,
            threads=2,
        ),
        Cost("model", disk=4 * (work.proposal_weights + work.detector_weights), start=LIGHT_START),
    ]
    downloaded = config.dataset.coco.download and (train, val) == tuple(COCO_IMAGES.values())
    omitted = {
        "download": not downloaded,
        "proposal_network": proposals.files,
        "proposals": proposals.files,
        "region_embeddings": not embedded,
        "region_index": not retrieves,
        "base_detector": not trains,
        "pseudo_labels": not retrieves,
        "linear_probe": not probes,
        "model": proposals.files,
    }
    return [row for row in rows if not omitted.get(row.stage)]


def another_class(config: Config, train: int, val: int, rows: list[Cost]) -> Cost | None:
    """What `lpovod learn` costs for one class, once the run is finished; None if it cannot.

    Args:
        config: of the run.
        train: number of training images.
        val: number of validation images.
        rows: the stages, as `costs` returns them.
    """
    stages = {row.stage: row for row in rows}
    if not {"pseudo_labels", "linear_probe", "model"} <= stages.keys():
        return None
    features, k = stages["region_features"], config.pseudo_labels.k
    retrieved = config.retrieved_images(train)
    share = min(train, k) / (val + retrieved)
    return Cost(
        "lpovod learn",
        features.gflop * share,
        features.core * share + stages["pseudo_labels"].core + stages["linear_probe"].core,
        start=HEAVY_START,
    )


def _dataset(settings: DatasetSettings, images: int) -> Cost:
    if settings.source == "coco":  # as measured on COCO's json
        return Cost("dataset", disk=1.3e3 * images, memory=2.9e4 * images, start=LIGHT_START)
    images += settings.miniature.tune_images
    return Cost("dataset", core=DRAWING * images, disk=DRAWN * images, start=LIGHT_START)


def table(rows: list[Cost], times: dict[str, list[float]]) -> str:
    """The costs as text: times, disk and memory of each stage.

    Args:
        rows: the stages.
        times: by the name of a machine, the seconds of each stage on it.
    """
    time = _unit(sum(next(iter(times.values()))), TIMES)
    size = _unit(sum(row.disk for row in rows), SIZES)
    numbers = [
        [seconds / TIMES[time] for seconds in of_stage]
        + [row.disk / SIZES[size], row.memory / SIZES[size]]
        for row, of_stage in zip(rows, zip(*times.values(), strict=True), strict=True)
    ]
    # The jobs with the largest memory do not run at once.
    total = [sum(column) for column in zip(*numbers, strict=True)][:-1]
    lines = [["stage", *(f"{time}, {head}" for head in times), f"disk {size}", f"memory {size}"]]
    for row, cells in zip(rows, numbers, strict=True):
        if any(cell >= SHOWN for cell in cells):
            lines.append([row.stage, *map(_cell, cells)])
    return _aligned([*lines, ["together", *map(_cell, total)]])


def comparison(
    rows: list[Cost], predicted: list[float], measured: dict[str, tuple[float, float | None]]
) -> str:
    """The costs as text, and beside them what the jobs of a run took.

    Args:
        rows: the stages.
        predicted: seconds of each stage.
        measured: seconds of each stage that has run, and its largest memory in bytes.
    """
    time, size = _unit(sum(predicted), TIMES), _unit(sum(row.disk for row in rows), SIZES)
    heads = [
        f"{time}, predicted",
        "measured",
        "ratio",
        f"disk {size}",
        f"memory {size}",
        f"peak {size}",
    ]
    lines = [["stage", *heads]]
    for row, seconds in zip(rows, predicted, strict=True):
        taken, peak = measured.get(row.stage, (None, None))
        lines.append(
            [
                row.stage,
                *_compared(seconds, taken, time),
                _cell(row.disk / SIZES[size]),
                _cell(row.memory / SIZES[size]),
                _cell((peak or 0) / SIZES[size]),
            ]
        )
    done = [measured[row.stage][0] for row in rows if row.stage in measured]
    # Half a run has no ratio.
    whole = len(done) == len(rows)
    both = _compared(sum(predicted), sum(done) if whole else None, time)
    lines.append(["together", *both, _cell(sum(row.disk for row in rows) / SIZES[size])])
    return _aligned(lines)


def _compared(predicted: float, measured: float | None, unit: str) -> list[str]:
    """Both in a unit, and the predicted one over the measured one."""
    ratio = f"{predicted / measured:.2f}" if predicted and measured else "-"
    return [_cell(predicted / TIMES[unit]), _cell((measured or 0) / TIMES[unit]), ratio]


def _unit(total: float, units: dict[str, float]) -> str:
    """The largest unit that a total has ten of, or the smallest one."""
    smallest, *larger = units
    return [smallest, *(name for name in larger if total >= 10 * units[name])][-1]


def _cell(number: float) -> str:
    return f"{number:,.1f}" if number >= SHOWN else "-"


def _aligned(lines: list[list[str]]) -> str:
    return "\n".join(
        f"{line[0]:18}" + "".join(f"{cell:>13}" for cell in line[1:]) for line in lines
    )


def _measured(benchmarks: Path) -> dict[str, tuple[float, float | None]]:
    """Of each rule: seconds of all jobs, and the largest memory in bytes."""
    return {
        stage["rule"]: (stage["seconds"], stage["peak"] and stage["peak"] * 2**20)
        for stage in stage_times(benchmarks)
    }
