"""Command line of stage `base_detector`, read from a checkpoint."""

from lpovod.importers.checkpoints import import_base_detector
from workflow_scripts import run

if __name__ == "__main__":
    run(import_base_detector)
