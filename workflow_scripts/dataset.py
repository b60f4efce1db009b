"""Command line of stage `dataset`."""

from lpovod.stages.dataset import make_dataset
from workflow_scripts import run

if __name__ == "__main__":
    run(make_dataset)
