"""Command line of stage `region_index`."""

from lpovod.stages.region_index import build_region_index
from workflow_scripts import run

if __name__ == "__main__":
    run(build_region_index)
