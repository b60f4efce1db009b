"""Command line of stage `text_embeddings`."""

from lpovod.stages.text_embeddings import embed_classes
from workflow_scripts import run

if __name__ == "__main__":
    run(embed_classes)
