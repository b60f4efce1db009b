"""Command line of stage `region_embeddings`."""

from lpovod.stages.region_embeddings import embed_regions
from workflow_scripts import run

if __name__ == "__main__":
    run(embed_regions)
