# The user's images and annotations, before the graph is built: their digests, and the check of
# everything in them (stage check).
# IN   images and COCO json of every split
# OUT  check/check.html: every finding, with pictures; check/check.json: the same, unless there are
#      errors, and the images to leave out (dataset.bad_images: skip)
# COST a minute and a half for COCO's 123,000 images on two cores, since headers are read; with
#      skip, which decodes every image, 11 minutes
#
# It is no rule: Snakemake has no early cut-off, so whatever depended on its output would be made
# again with it, after a corrected box as well.

import subprocess
import sys

from snakemake.logging import logger

from lpovod.artifacts import fingerprint, read_json
from lpovod.devices import usable_cores
from lpovod.sources import Source, check_classes, read_sources

CHECK = Path(RESULTS, "check", "check.json")
# Data that is downloaded counts as published.
PUBLISHED = Source("COCO 2017", {}, 0, {})
DATA = CONFIG.dataset.coco
ON_DISK = CONFIG.dataset.source == "coco" and not DATA.download


def check_data(digests):
    """Check the user's data unless these very files were checked before.

    New names of novel classes need no other look at the images.
    """
    options = {"--bad-images": CONFIG.dataset.bad_images}
    for split in SPLITS:
        options[f"--{split}-images"] = DATA.images(split)
        options[f"--{split}-annotations"] = DATA.annotations(split)
    learns = not (CONFIG.base_detector.checkpoint and CONFIG.linear_probe.checkpoint)
    content = [source("check"), learns, *options.values(), *CONFIG.classes.base, *digests]
    key = fingerprint({"content": [str(value) for value in content]})
    if digests and CHECK.exists() and read_json(CHECK).get("key") == key:
        return
    words = [word for option in options.items() for word in option]
    words += [] if learns else ["--no-learns"]
    words += ["--base", *CONFIG.classes.base, "--novel", *CONFIG.classes.novel]
    # It may be a cluster's login node.
    words += ["--workers", min(4, usable_cores())]
    words += ["--key", key, "--output", CHECK, "--page", CHECK.with_suffix(".html")]
    done = subprocess.run([sys.executable, "-m", "workflow_scripts.check", *map(str, words)])
    if done.returncode:
        raise WorkflowError("The data are not usable as they are: see the list above")


SOURCES, unreadable = {}, None
if ON_DISK:
    try:
        SOURCES = read_sources(CONFIG)
    except LpovodError as error:
        unreadable = error  # which the check lists with everything else
    check_data([s.digest() for s in SOURCES.values()])
try:
    if unreadable:
        raise unreadable
    for warning in check_classes(CONFIG, SOURCES):
        logger.warning(warning)
except LpovodError as error:
    raise WorkflowError(str(error))
