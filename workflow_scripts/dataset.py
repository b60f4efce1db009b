"""Command lines of stage `dataset`."""

from lpovod.stages.dataset import annotate, draw, list_images
from workflow_scripts import run

if __name__ == "__main__":
    run(draw, list_images, annotate)
