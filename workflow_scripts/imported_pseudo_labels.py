"""Command line of stage `pseudo_labels`, read from a file."""

from lpovod.importers.pseudo_labels import import_pseudo_labels
from workflow_scripts import run

if __name__ == "__main__":
    run(import_pseudo_labels)
