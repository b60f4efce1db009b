"""Command line of stage `evaluation`."""

from lpovod.stages.evaluation import evaluate
from workflow_scripts import run

if __name__ == "__main__":
    run(evaluate)
