"""Command line of stage `proposal_network`."""

from lpovod.stages.proposal_network import train_proposal_network
from workflow_scripts import run

if __name__ == "__main__":
    run(train_proposal_network)
