"""Command line of stage `linear_probe`, read from a checkpoint."""

from lpovod.importers.checkpoints import import_linear_probe
from workflow_scripts import run

if __name__ == "__main__":
    run(import_linear_probe)
