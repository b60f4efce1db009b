"""Command line of stage `small_clip`."""

from lpovod.stages.small_clip import train_small_clip
from workflow_scripts import run

if __name__ == "__main__":
    run(train_small_clip)
