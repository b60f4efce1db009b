# The check of the user's images and annotations (stage check), before the graph is built.
# IN   images and COCO json of every split
# OUT  check/check.html: every finding, with pictures; check/check.json: the same, unless there are
#      errors, and the images to leave out (dataset.bad_images: skip)
# COST a minute and a half for COCO's 123,000 images on two cores, since headers are read; with
#      skip, which decodes every image, 11 minutes
#
# It is no rule: Snakemake has no early cut-off, so whatever depended on its output would be made
# again with it, after a corrected box as well.

import os
import subprocess
import sys

CHECK = Path(RESULTS, "check", "check.json")


def check_data():
    """Check the user's data unless these very files were checked before."""
    files, options = CONFIG.dataset.coco, {"--bad-images": CONFIG.dataset.bad_images}
    for split in SPLITS:
        options[f"--{split}-images"] = files.images(split)
        options[f"--{split}-annotations"] = files.annotations(split)
    classes = ["--base", *CONFIG.classes.base, "--novel", *CONFIG.classes.novel]
    digests = [SOURCES[s].digest() for s in SPLITS]
    content = [source("check"), *options.values(), *classes, *digests]
    key = hashlib.sha256("\n".join(map(str, content)).encode()).hexdigest()
    if CHECK.exists() and read_json(CHECK).get("key") == key:
        return
    words = [word for option in options.items() for word in option] + classes
    # It may be a cluster's login node.
    words += ["--workers", min(4, len(os.sched_getaffinity(0)))]
    words += ["--key", key, "--output", CHECK, "--page", CHECK.with_suffix(".html")]
    done = subprocess.run([sys.executable, "-m", "workflow_scripts.check", *map(str, words)])
    if done.returncode:
        raise WorkflowError("The data are not usable as they are: see the list above")


if SOURCES:
    check_data()
