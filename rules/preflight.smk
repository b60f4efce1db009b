# Models, weights, FAISS's factory and the GPU against the configuration, before the first job.
# IN   weights of CLIP and of the backbone, where they exist
# OUT  nothing; success is remembered in .snakemake/lpovod/preflight.json
# COST five seconds, once per configuration, to import torch; nothing is computed
#
# In a process of its own: the graph is built without torch. A Python without torch, as with
# `--sdm conda`, skips it.

import importlib.util
import os
import subprocess
import sys
from importlib import metadata

from lpovod.artifacts import fingerprint, read_json, write_json
from lpovod.sources import CACHE

PASSED = CACHE / "preflight.json"


def check_models(gpu):
    """Check models and weights, unless this configuration passed before.

    gpu: whether this machine must have a GPU.
    """
    # Not the classes: a name that is added need not wait for five seconds of imports.
    blocks = ("clip", "text_embeddings", "backbone", "proposals", "base_detector", "region_index")
    imported = [CONFIG.pseudo_labels.file, CONFIG.linear_probe.checkpoint]
    existing = [path.is_file() for path in CLIP_FILES + START_FILES]
    packages = ("torch", "open_clip_torch", "timm", "faiss-cpu")
    content = [source("preflight"), *map(block, blocks), *imported, *existing]
    content += [*CLIP_DIGESTS, *START_DIGESTS, *map(version, packages)]
    content += [gpu and (os.uname().nodename, os.environ.get("CUDA_VISIBLE_DEVICES"))]
    key = fingerprint({"content": [str(value) for value in content]})
    if PASSED.is_file() and read_json(PASSED) == {"key": key}:
        return
    words = ["--config", CONFIG.model_dump_json(), "--gpu" if gpu else "--no-gpu"]
    done = subprocess.run([sys.executable, "-m", "workflow_scripts.preflight", *words])
    if done.returncode:
        raise WorkflowError("The run would fail with these settings: see above")
    write_json(PASSED, {"key": key})


def version(package):
    """Of an installed package, else None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


# Jobs on a cluster parse this file again. A cluster's login node has no GPU, and a plan can be
# printed anywhere.
if workflow.is_main_process and importlib.util.find_spec("torch"):
    RUNS_HERE = workflow.resource_settings.nodes is None and not workflow.output_settings.dryrun
    check_models(gpu=CONFIG.gpu and RUNS_HERE)
