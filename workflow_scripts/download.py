"""Command lines of stage `download`."""

from lpovod.stages.download import download_coco, download_file, extract_member
from workflow_scripts import run

if __name__ == "__main__":
    run(download_coco, download_file, extract_member)
