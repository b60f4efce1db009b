"""Command line of stage `region_features`."""

from lpovod.region_features import describe_retrieved, describe_split
from workflow_scripts import run

if __name__ == "__main__":
    run(describe_retrieved, describe_split)
