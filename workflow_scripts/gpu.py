"""Command line of the preflight's check of the GPU."""

from lpovod.devices import check_gpu
from workflow_scripts import run

if __name__ == "__main__":
    run(check_gpu)
