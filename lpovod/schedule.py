"""The learning rate of network training and of the linear probe."""

from typing import Any


def rate_at(step: int, steps_per_epoch: int, settings: Any) -> float:
    """Learning rate of a step: linear warm-up, then divided by ten after each milestone.

    As in the original's mmcv hook, warm-up scales the rate of the current epoch.

    Args:
        step: counted from 0 over all epochs.
        steps_per_epoch: number of steps in an epoch.
        settings: learning_rate, warmup_steps, warmup_ratio, milestones.
    """
    epoch = step // steps_per_epoch
    passed = sum(epoch >= milestone for milestone in settings.milestones)
    rate = settings.learning_rate * 0.1**passed
    if step < settings.warmup_steps:
        rate *= 1 - (1 - step / settings.warmup_steps) * (1 - settings.warmup_ratio)
    return rate
