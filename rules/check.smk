# The check of the user's images and annotations (stage check), before the graph is built.
# IN   images and COCO json of every split
# OUT  check/check.json: every finding, and the images to leave out (dataset.bad_images: skip);
#      check/check.html: the same with pictures
# COST every image's header is opened; with skip, every image is decoded
#
# It is no rule: Snakemake has no early cut-off, so whatever depended on its output would be made
# again with it, after a corrected box as well.

import subprocess
import sys

CHECK = Path(RESULTS, "check", "check.json")


def check_data():
    """Check the user's data unless these very files were checked before."""
    files, options = CONFIG.dataset.coco, {"--bad-images": CONFIG.dataset.bad_images}
    for split in SPLITS:
        options[f"--{split}-images"] = files.images(split)
        options[f"--{split}-annotations"] = files.annotations(split)
    content = [source("check"), *options.values(), *(SOURCES[s].digest() for s in SPLITS)]
    key = hashlib.sha256("\n".join(map(str, content)).encode()).hexdigest()
    if CHECK.exists() and read_json(CHECK).get("key") == key:
        return
    words = [word for option in options.items() for word in option]
    words += ["--key", key, "--output", CHECK, "--page", CHECK.with_suffix(".html")]
    done = subprocess.run([sys.executable, "-m", "workflow_scripts.check", *map(str, words)])
    if done.returncode:
        raise WorkflowError("The data are not usable as they are: see the list above")


if SOURCES:
    check_data()
