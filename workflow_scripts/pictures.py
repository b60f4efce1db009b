"""Command line of stage `pictures`."""

from lpovod.stages.pictures import draw_pictures
from workflow_scripts import run

if __name__ == "__main__":
    run(draw_pictures)
