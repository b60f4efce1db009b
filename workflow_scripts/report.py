"""Command line of stage `report`."""

from lpovod.stages.report import write_report
from workflow_scripts import run

if __name__ == "__main__":
    run(write_report)
