"""What a configuration will cost: hours, disk and memory of each stage, before it runs.

    python -m lpovod.plan config.yaml configs/coco.yaml [mine.yaml ...] [--images 2000000 50000]

Operations are those of the networks, disk and memory those of the arrays, times of one processor
core are measured (docs/scaling.md); the speeds of the GPU and of the disk are assumed. For the
paper's networks, ResNet-50 and CLIP ViT-B/32.
"""

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

from lpovod.catalogue import COCO, COCO_IMAGES
from lpovod.config import Config, read_config
from lpovod.exceptions import LpovodError

# Counted by torch.utils.flop_counter (a multiplication and an addition are two), forward:
PYRAMID = 232.4  # GFLOP, ResNet-50 and pyramid on 800 x 1088 pixels

PROPOSAL_HEAD = 85.7  # GFLOP, on that pyramid; the detector's own RPN takes as much
BRANCH = 0.257  # GFLOP, one of the detector's two branches on one region
CROP = 8.8  # GFLOP, CLIP ViT-B/32 on a crop
TRAINING = 3  # forward and backward pass, in forward passes
DIMENSION = 512  # of CLIP ViT-B/32
BOX = 20  # bytes of a region's box and objectness

# Seconds of one core.
DECODING, RESIZING = 4.6e-3, 23e-3  # of a photograph; to the network's 800 pixels

LOADERS = 8  # processes that read images for a training
INDEXING = 20e-6  # of a region: read, converted, written

# Assumed.
TFLOPS = 20.0  # what one GPU sustains on such networks; measure yours and say --tflops

READING = 2e9  # bytes per second
GPUS = (1, 8, 64)


class Cost(NamedTuple):
    """Of one stage: all its jobs together, but for the memory, which is one job's.

    Attributes:
        stage: its name.
        gflop: operations on the GPU.
        core: seconds of a processor core, beside the GPU.
        divided: whether several GPUs share it; otherwise it is one job.
        disk: bytes that stay.
        memory: bytes of the largest arrays in main memory; 0 where none is large.
    """

    stage: str
    gflop: float = 0.0
    core: float = 0.0
    divided: bool = False
    disk: float = 0.0
    memory: float = 0.0

    def hours(self, tflops: float, gpus: int) -> float:
        """On so many GPUs with a core each, whichever of the two takes longer."""
        return max(self.gflop / tflops / 1e3, self.core) / 3600 / (gpus if self.divided else 1)


def costs(config: Config, train: int, val: int) -> list[Cost]:
    """The stages in their order.

    Args:
        config: of COCO or of any other images, with the paper's networks.
        train: number of training images.
        val: number of validation images.

    Raises:
        LpovodError: for other networks than the paper's.
    """
    if config.backbone.architecture != "resnet50" or config.dataset.source != "coco":
        raise LpovodError("a plan is made for COCO and ResNet-50 (configs/coco.yaml) alone")
    images, per_image = train + val, config.proposals.per_image
    detector, embeddings = config.base_detector, config.region_embeddings
    rpn = PROPOSAL_HEAD if detector.regions == "rpn" else 0
    learned = detector.samples_per_image + min(per_image, detector.distillation_regions)
    described = PYRAMID + per_image * 2 * BRANCH  # GFLOP of an image
    features = per_image * (BOX + 16 + 2 * (detector.dimension + DIMENSION))  # bytes of an image
    indexed = train * per_image * (BOX + 8 + 2 * DIMENSION)  # bytes
    novel, shown = len(config.classes.novel), DECODING + RESIZING
    retrieved = min(train, novel * config.pseudo_labels.k)
    classes = len(config.classes.base) + novel
    zips = sum(remote.size for remote in COCO.values())
    crop = 3 * 224 * 224 * 4
    passes = [stage.training.epochs * train for stage in (config.proposals, detector)]
    return [
        *([Cost("download", disk=zips)] if images == sum(COCO_IMAGES.values()) else []),
        Cost("dataset", disk=1.3e3 * images, memory=2.9e4 * images),  # as measured on COCO's json
        Cost(
            "proposal_network",
            passes[0] * TRAINING * (PYRAMID + PROPOSAL_HEAD),
            passes[0] * shown / LOADERS,
            divided=True,
            disk=0.1e9,
        ),
        Cost(
            "proposals",
            images * (PYRAMID + PROPOSAL_HEAD),
            images * shown,
            disk=images * per_image * BOX,
        ),
        Cost(
            "region_embeddings",
            images * per_image * len(embeddings.scales) * CROP,
            images * DECODING,
            divided=True,
            disk=images * per_image * (BOX + 2 * DIMENSION),
            memory=3 * embeddings.batch_size * crop,
        ),
        Cost(
            "region_index",
            core=train * per_image * INDEXING,
            disk=indexed,
            memory=config.region_index.block_rows * 4 * DIMENSION,
        ),
        Cost(
            "base_detector",
            passes[1] * TRAINING * (PYRAMID + rpn + learned * BRANCH),
            passes[1] * shown / LOADERS,
            divided=True,
            disk=0.3e9,
        ),
        Cost("pseudo_labels", core=novel * indexed / READING, divided=True),
        Cost(
            "region_features",
            (val + retrieved) * described,
            (val + retrieved) * shown,
            disk=(val + retrieved) * features,
        ),
        Cost("evaluation", disk=0.1e9, memory=val * per_image * classes * 3 * 4),
    ]


def table(rows: list[Cost], tflops: float) -> str:
    """The costs as text: hours on several numbers of GPUs, GB of disk and of main memory."""
    heads = [f"{g} GPU{'s' * (g > 1)}" for g in GPUS]
    lines = [("stage", *(f"h, {head}" for head in heads), "disk GB", "memory GB")]
    numbers = [
        (*(row.hours(tflops, gpus) for gpus in GPUS), row.disk / 1e9, row.memory / 1e9)
        for row in rows
    ]
    sums = [sum(column) for column in zip(*numbers, strict=True)]
    for name, cells in zip([*(r.stage for r in rows), "together"], [*numbers, sums], strict=True):
        lines.append((name, *(f"{cell:,.1f}" if cell >= 0.05 else "-" for cell in cells)))
    # The jobs with the largest memory do not run at once.
    lines[-1] = lines[-1][:-1]
    return "\n".join(
        [
            *(f"{row[0]:18}" + "".join(f"{cell:>13}" for cell in row[1:]) for row in lines),
            "",
            f"Assumed: GPUs that sustain {tflops:g} TFLOP/s each (--tflops) and lose nothing",
            f"together; a disk that reads {READING / 1e9:g} GB/s. Each split is one job of",
            "`proposals` and `region_features`. Stages that are not listed cost next to nothing.",
            "Memory is that of the large arrays of one job, beside what libraries and annotations",
            "take; while it is extracted, train2017.zip takes its 19.3 GB once more.",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m lpovod.plan", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("config", nargs="+", type=Path, help="configuration and overlays, in order")
    parser.add_argument(
        "--images",
        nargs=2,
        type=int,
        metavar=("TRAIN", "VAL"),
        default=[*COCO_IMAGES.values()],
        help="how many (default: COCO's)",
    )
    parser.add_argument("--tflops", type=float, default=TFLOPS, help="of one GPU, sustained")
    arguments = parser.parse_args()
    try:
        rows = costs(read_config(arguments.config), *arguments.images)
        print(table(rows, arguments.tflops))
    except (LpovodError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
