"""Command line of stage `check`."""

from lpovod.stages.check import check
from workflow_scripts import run

if __name__ == "__main__":
    run(check)
