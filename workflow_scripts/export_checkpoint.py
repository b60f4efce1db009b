"""Command line of the export: this project's weights in the original's layout."""

from lpovod.importers.checkpoints import export_checkpoint
from workflow_scripts import run

if __name__ == "__main__":
    run(export_checkpoint)
