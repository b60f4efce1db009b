"""Command lines of stage `region_features`."""

from lpovod.stages.region_features import extract_retrieved, extract_split
from workflow_scripts import run

if __name__ == "__main__":
    run(extract_retrieved, extract_split)
