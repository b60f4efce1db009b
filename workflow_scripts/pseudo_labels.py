"""Command line of stage `pseudo_labels`."""

from lpovod.stages.pseudo_labels import retrieve
from workflow_scripts import run

if __name__ == "__main__":
    run(retrieve)
