"""A training of the project whose third epoch takes minutes, unless it resumes a checkpoint.

Arguments: the checkpoint, and the output: the history and where the training resumed, as json.
"""

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import workflow_scripts  # noqa: F401, how a stage takes signals

STEPS = 300


def main(checkpoint: Path, output: Path) -> None:
    import torch
    from torch import nn

    from lpovod.config import TrainingSettings
    from lpovod.training import train

    begun: list[tuple[int, int]] = []
    slow = not checkpoint.exists()

    def batches(epoch: int, step: int) -> Iterator[torch.Tensor]:
        begun.append((epoch, step))
        for number in range(step, STEPS):
            if slow and epoch == 2:
                time.sleep(1)
            yield torch.full((8, 3), float(epoch + number % 7))

    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    schedule = TrainingSettings(epochs=4, learning_rate=0.001, milestones=[3])
    history = train(
        model,
        lambda batch: {"loss": (model(batch) - 1).square().mean()},
        batches,
        STEPS,
        schedule,
        checkpoint,
        "slow",
    )
    output.write_text(json.dumps({"history": history, "begun": begun}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
