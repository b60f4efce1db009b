# Models, weights, FAISS's factory and the GPU against the configuration, before the first job.
# IN   weights of CLIP and of the backbone, where they exist
# OUT  nothing; every success is remembered, as an empty file in .snakemake/lpovod/preflight/
# COST three seconds, once per configuration, to import torch; one second, once per machine with
#      gpu: true; nothing is computed
#
# In processes of their own, since the graph is built without torch, and beside the reading of the
# other rules. A Python without torch, as with `--sdm conda`, skips it.

import atexit
import importlib.util
import os
import subprocess
import sys
from importlib import metadata

from lpovod.artifacts import fingerprint
from lpovod.sources import CACHE

PASSED = CACHE / "preflight"
FAILED = "The run would fail with these settings: see above"
CHECKS = {}  # running processes, by the file that will remember their success


def start_check(script, words, content):
    """Start a check, unless it passed before with the same content."""
    content = [source(script), version("torch"), *map(str, content)]
    passed = PASSED / fingerprint({"content": content})
    if not passed.exists():
        command = [sys.executable, "-m", f"workflow_scripts.{script}", *words]
        CHECKS[passed] = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        # If reading the other rules fails, nobody waits for it.
        atexit.register(CHECKS[passed].kill)


def start_preflight():
    """Check models and weights, and the GPU where the jobs run."""
    # Not the classes: a name that is added need not wait for three seconds of imports.
    blocks = ("clip", "text_embeddings", "backbone", "proposals", "base_detector", "region_index")
    content = [*map(block, blocks), CONFIG.pseudo_labels.file, CONFIG.linear_probe.checkpoint]
    content += [path.is_file() for path in CLIP_FILES + START_FILES]
    content += [*CLIP_DIGESTS, *START_DIGESTS]
    content += map(version, ("open_clip_torch", "timm", "faiss-cpu"))
    start_check("preflight", ["--config", CONFIG.model_dump_json()], content)
    # A cluster's login node has no GPU, and a plan can be printed anywhere.
    runs_here = workflow.resource_settings.nodes is None and not workflow.output_settings.dryrun
    if CONFIG.gpu and runs_here:
        machine = [os.uname().nodename, os.environ.get("CUDA_VISIBLE_DEVICES")]
        start_check("gpu", [], machine)


def finish_preflight():
    """End with an error if a check fails: before the first job, or after a plan is printed."""
    if workflow.output_settings.dryrun:
        atexit.register(end_plan)
    elif not all_passed():
        raise WorkflowError(FAILED)


def end_plan():
    """What does not pass is said below the plan, which need not wait for it."""
    if not all_passed():
        print(FAILED, file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)  # at its exit Python has no other way to change the code


def all_passed():
    """Wait for the checks, show what they say and remember those that passed."""
    for passed, process in CHECKS.items():
        sys.stderr.write(process.communicate()[1])
        if process.returncode == 0:
            passed.parent.mkdir(parents=True, exist_ok=True)
            passed.touch()
    return not any(process.returncode for process in CHECKS.values())


def version(package):
    """Of an installed package, else None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


# Jobs on a cluster parse this file again.
if workflow.is_main_process and importlib.util.find_spec("torch"):
    start_preflight()
