"""Command line of stage `report`."""

from lpovod.report import write_report
from workflow_scripts import run

if __name__ == "__main__":
    run(write_report)
