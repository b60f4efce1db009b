"""What tests/test_distributed.py runs on one rank in its own process and on two under torchrun.

As a program: `python -m lpovod.launcher 1 2 ranks folder`, with the inputs and outputs of
`two_ranks` in the folder.
"""

import sys
from pathlib import Path

import torch
from timm.layers import BatchNormAct2d
from torch import nn

from lpovod.config import (
    BackboneSettings,
    BaseDetectorSettings,
    ProposalsSettings,
    TrainingSettings,
)
from lpovod.distributed import BatchNorm2d, join, rank, ranks, total
from lpovod.networks.timm_backbone import share_statistics
from lpovod.stages.base_detector import train_base_detector
from lpovod.stages.proposal_network import train_proposal_network
from lpovod.training import train

BACKBONE = BackboneSettings(channels=16, long_side=120)
TIMM = BackboneSettings(architecture="timm:test_efficientnet", channels=16, long_side=120)
STEP = TrainingSettings(
    epochs=1,
    images_per_step=4,  # of three images
    learning_rate=0.02,
    warmup_steps=0,
    milestones=[1],
    short_sides=[64, 96],
    gradient_norm=1000,
)


def learn_proposals(
    data: Path,
    output: Path,
    schedule: TrainingSettings = STEP,
    threads: int = 1,
    backbone: BackboneSettings = BACKBONE,
    stem: str = "proposals",
) -> None:
    """One step of the proposal network, in double precision: rounding must not flip a ReLU."""
    settings = ProposalsSettings(box_iou=0.3, samples_per_image=20, training=schedule)
    outputs = [output / f"{stem}.{name}" for name in ("checkpoint", "safetensors", "jsonl")]
    torch.set_default_dtype(torch.float64)
    train_proposal_network(
        data / "train.json", backbone, settings, 0, outputs[0], "", *outputs[1:], threads=threads
    )
    torch.set_default_dtype(torch.float32)


def learn_with_timm(
    data: Path, output: Path, schedule: TrainingSettings = STEP, threads: int = 1
) -> None:
    """One step of the proposal network on a model of timm's, with norms that have activations."""
    learn_proposals(data, output, schedule, threads, TIMM, "timm")


def learn_detector(
    data: Path, output: Path, schedule: TrainingSettings = STEP, threads: int = 1
) -> None:
    """One step of the detector, from the proposal network in the folder of the data."""
    settings = BaseDetectorSettings(
        training=schedule,
        samples_per_image=6,
        head_convolutions=1,
        dimension=32,
        finest_scale=16,
        distillation_regions=3,
    )
    shards = [data / f"{number}.h5" for number in range(2)]
    outputs = [output / f"base_detector.{name}" for name in ("checkpoint", "safetensors", "jsonl")]
    network = data / "proposals.safetensors"
    data, inputs = data / "train.json", (shards, network, BACKBONE, settings, 0, outputs[0], "")
    train_base_detector(data, *inputs, *outputs[1:], threads=threads)


def fit(
    checkpoint: Path, stop_at: int | None = None, at_once: int | None = None
) -> dict[str, torch.Tensor]:
    """Four epochs of a small regression with a norm; optionally ends abruptly in one of them.

    Whole steps share the statistics of the norm; in parts it keeps those that it has.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 1), BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 1))
    model[1].train(at_once is None)

    def batches(epoch, step):
        if epoch == stop_at:
            raise KeyboardInterrupt
        whole = torch.randn(3, 7, 2, 2, 2, generator=torch.Generator().manual_seed(epoch))
        return whole[step:, rank() :: ranks()]

    def losses(images):
        error = (model(images)[:, 0] - images.sum((1, 2, 3))).square().sum()
        return {"square": error / total(torch.tensor(float(len(images))))}

    schedule = TrainingSettings(
        epochs=4,
        images_per_step=7,
        images_at_once=at_once,
        learning_rate=0.02,
        milestones=[3],
        warmup_steps=3,
    )
    train(model, losses, batches, 3, schedule, checkpoint, "a")
    return model.state_dict()


def normalise(images: torch.Tensor, weights: torch.Tensor, norm: nn.Module) -> dict:
    """Outputs and gradients of a norm, the loss being a weighted sum."""
    images.requires_grad_()
    y = norm(images)
    (y * weights).sum().backward()
    for parameter in norm.parameters():
        parameter.grad = total(parameter.grad)
    found = {"y": y.detach(), "of_images": images.grad, "of_weight": norm.weight.grad}
    return found | {"of_bias": norm.bias.grad} | norm.state_dict()


def norm_with_activation() -> nn.Module:
    """timm's norm and ReLU, made to share its statistics."""
    norm = BatchNormAct2d(3)
    share_statistics(norm)
    return norm


def two_ranks(folder: Path) -> None:
    """Everything that is compared, on this rank's part of the inputs."""
    join("cpu")
    inputs = torch.load(folder / "norm.pt")
    # Parts of unequal size: one image, and all others.
    part = slice(0, 1) if rank() == 0 else slice(1, None)
    found = normalise(inputs["images"][part], inputs["weights"][part], BatchNorm2d(3))
    torch.save(found, folder / f"norm.{rank()}.pt")
    found = normalise(inputs["images"][part], inputs["weights"][part], norm_with_activation())
    torch.save(found, folder / f"norm_with_activation.{rank()}.pt")
    learn_proposals(folder, folder / "two")
    learn_with_timm(folder, folder / "two")
    learn_detector(folder, folder / "two")
    torch.save(fit(folder / "one_then_two.checkpoint"), folder / f"one_then_two.{rank()}.pt")
    torch.save(fit(folder / "parts.checkpoint", at_once=2), folder / f"parts.{rank()}.pt")
    try:
        fit(folder / "two_then_one.checkpoint", stop_at=2)
    except KeyboardInterrupt:
        return


if __name__ == "__main__":
    two_ranks(Path(sys.argv[1]))
