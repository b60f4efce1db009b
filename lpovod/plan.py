"""What a configuration will cost: GPU hours, disk and memory of each stage, before it runs.

    python -m lpovod.plan config.yaml configs/coco.yaml [mine.yaml ...] [--tflops 20]

Operations are those of the networks, disk and memory those of the arrays; only the speed of the GPU
is assumed. For the paper's networks, ResNet-50 and CLIP ViT-B/32, on COCO 2017.
"""

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

from lpovod.artifacts import LpovodError
from lpovod.config import Config, read_config
from lpovod.download import COCO, COCO_IMAGES

TRAIN_IMAGES, VAL_IMAGES = COCO_IMAGES.values()
# Counted by torch.utils.flop_counter (a multiplication and an addition are two), forward:
PYRAMID = 232.4  # GFLOP, ResNet-50 and pyramid on 800 x 1088 pixels
PROPOSAL_HEAD = 85.7  # GFLOP, on that pyramid; the detector's own RPN takes as much
BRANCH = 0.257  # GFLOP, one of the detector's two branches on one region
CROP = 8.8  # GFLOP, CLIP ViT-B/32 on a crop
TRAINING = 3  # forward and backward pass, in forward passes
DIMENSION = 512  # of CLIP ViT-B/32
BOX = 20  # bytes of a region's box and objectness
TFLOPS = 20.0  # assumed: what one GPU sustains on such networks; measure yours and say --tflops


class Cost(NamedTuple):
    """Of one stage: all its jobs together, but for the memory, which is one job's.

    Attributes:
        stage: its name.
        gflop: operations on the GPU.
        disk: bytes that stay.
        memory: bytes of the largest arrays in main memory; 0 where none is large.
    """

    stage: str
    gflop: float = 0.0
    disk: float = 0.0
    memory: float = 0.0


def costs(config: Config) -> list[Cost]:
    """The stages in their order.

    Raises:
        LpovodError: for other networks than the paper's.
    """
    if config.backbone.architecture != "resnet50" or config.dataset.source != "coco":
        raise LpovodError("a plan is made for COCO and ResNet-50 (configs/coco.yaml) alone")
    images, per_image = TRAIN_IMAGES + VAL_IMAGES, config.proposals.per_image
    detector, embeddings = config.base_detector, config.region_embeddings
    rpn = PROPOSAL_HEAD if detector.regions == "rpn" else 0
    learned = detector.samples + min(per_image, detector.distillation_regions)
    described = PYRAMID + per_image * 2 * BRANCH  # GFLOP of an image
    features = per_image * (BOX + 16 + 2 * (detector.dimension + DIMENSION))  # bytes of an image
    retrieved = len(config.classes.novel) * config.pseudo_labels.k  # images, at most
    classes = len(config.classes.base) + len(config.classes.novel)
    crop = 3 * 224 * 224 * 4
    return [
        Cost("download", disk=sum(remote.size for remote in COCO.values())),
        # An estimate: Python takes about ten times the 0.45 GB of COCO's json.
        Cost("dataset", disk=0.3e9, memory=5e9),
        Cost(
            "proposals (training)",
            config.proposals.training.epochs * TRAIN_IMAGES * TRAINING * (PYRAMID + PROPOSAL_HEAD),
            0.1e9,
        ),
        Cost("proposals", images * (PYRAMID + PROPOSAL_HEAD), images * per_image * BOX),
        Cost(
            "region_embeddings",
            images * per_image * len(embeddings.scales) * CROP,
            images * per_image * (BOX + 2 * DIMENSION),
            3 * embeddings.batch_size * crop,
        ),
        Cost(
            "region_index",
            disk=TRAIN_IMAGES * per_image * 2 * DIMENSION,
            memory=config.region_index.block_rows * 4 * DIMENSION,
        ),
        Cost(
            "base_detector",
            detector.training.epochs * TRAIN_IMAGES * TRAINING * (PYRAMID + rpn + learned * BRANCH),
            0.3e9,
        ),
        Cost(
            "region_features",
            (VAL_IMAGES + retrieved) * described,
            (VAL_IMAGES + retrieved) * features,
        ),
        Cost("evaluation", disk=0.1e9, memory=VAL_IMAGES * per_image * classes * 3 * 4),
    ]


def table(rows: list[Cost], tflops: float, gpus: int) -> str:
    """The costs as text: hours of one GPU, GB of disk and of main memory."""
    lines = [f"{'stage':22}{'GPU hours':>12}{'disk GB':>10}{'memory GB':>12}"]
    total = Cost("together", *(sum(values) for values in zip(*(r[1:3] for r in rows), strict=True)))
    for stage, gflop, disk, memory in [*rows, total]:
        cells = (gflop / tflops / 3.6e6, disk / 1e9, memory / 1e9)
        text = [f"{cell:.1f}" if cell >= 0.05 else "-" for cell in cells]
        lines.append(f"{stage:22}{text[0]:>12}{text[1]:>10}{text[2]:>12}")
    return "\n".join(
        [
            *lines,
            "",
            f"Assumed: a GPU that sustains {tflops:g} TFLOP/s (--tflops), never kept waiting.",
            f"The trainings divide their hours over {gpus} GPUs (training_gpus, training_nodes),",
            "the shards of region_embeddings over all there are. Stages that are not listed cost",
            "next to nothing; while it is extracted, train2017.zip takes its 19.3 GB a second",
            "time. Memory is that of the large arrays of one job, beside what libraries and",
            "annotations take.",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m lpovod.plan", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("config", nargs="+", type=Path, help="configuration and overlays, in order")
    parser.add_argument("--tflops", type=float, default=TFLOPS, help="of one GPU, sustained")
    arguments = parser.parse_args()
    try:
        config = read_config(arguments.config)
        gpus = config.training_gpus * config.training_nodes if config.gpu else 1
        print(table(costs(config), arguments.tflops, gpus))
    except (LpovodError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
