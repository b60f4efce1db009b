"""Command line of stage `proposals`, read from a file."""

from lpovod.importers.proposals import import_proposals
from workflow_scripts import run

if __name__ == "__main__":
    run(import_proposals)
