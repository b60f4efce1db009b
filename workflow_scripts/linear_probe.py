"""Command line of stage `linear_probe`."""

from lpovod.stages.linear_probe import train_linear_probe
from workflow_scripts import run

if __name__ == "__main__":
    run(train_linear_probe)
