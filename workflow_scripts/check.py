"""Command line of stage `check`."""

from lpovod.stages.check import check_data
from workflow_scripts import run

if __name__ == "__main__":
    run(check_data)
