"""Command line of stage `base_detector`."""

from lpovod.stages.base_detector import train_base_detector
from workflow_scripts import run

if __name__ == "__main__":
    run(train_base_detector)
