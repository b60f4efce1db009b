"""Command line of stage `model`."""

from lpovod.stages.model import join_model
from workflow_scripts import run

if __name__ == "__main__":
    run(join_model)
