"""Command line of stage `proposals`."""

from lpovod.proposals import propose, train_proposals
from workflow_scripts import run

if __name__ == "__main__":
    run(propose, train_proposals)
