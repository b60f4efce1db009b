"""Command line of stage `proposals`."""

from lpovod.stages.proposals import propose
from workflow_scripts import run

if __name__ == "__main__":
    run(propose)
