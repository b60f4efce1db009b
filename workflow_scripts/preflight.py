"""Command line of stage `preflight`."""

from lpovod.stages.preflight import preflight
from workflow_scripts import run

if __name__ == "__main__":
    run(preflight)
