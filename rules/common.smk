# What all rules share: the validated configuration, paths and a few short helpers.

from lpovod.artifacts import sha256
from lpovod.catalogue import COCO, WEIGHTS
from lpovod.config import load_config, slug
from lpovod.exceptions import LpovodError
from lpovod.measures.ablations import read_metrics, table
from lpovod.source_digest import source_digest

try:
    CONFIG = load_config(config)
except LpovodError as error:
    raise WorkflowError(str(error))


def given(path):
    """An input that may be missing: a file of the user's, or nothing."""
    return [path] if path else []


RESULTS = f"results/{CONFIG.name}"
DEVICE = "cuda" if CONFIG.gpu else "cpu"
ENVIRONMENT = "../envs/gpu.yaml" if CONFIG.gpu else "../envs/torch.yaml"
NOVEL = {slug(name): name for name in CONFIG.classes.novel}
SPLITS = ["train", "val"] + (["tune"] if CONFIG.dataset.source == "miniature" else [])
# The model's files may be large, where Snakemake compares modification times: their digests, as
# params, make their readers stale when the content changes and only then.
CLIP_FILES = CONFIG.clip.files()
# Of weights that are still to be downloaded the digest is known before.
CLIP_DIGESTS = [
    sha256(path) if path.is_file() else WEIGHTS[path.name].digest for path in CLIP_FILES
]
START_FILES = given(CONFIG.backbone.weights)
START_DIGESTS = [sha256(path) for path in START_FILES]
# Of all nodes together. As resources both are cut to what there is; a training starts as many
# processes.
TRAINING_ON = {
    "gpu": CONFIG.training_gpus * CONFIG.training_nodes if CONFIG.gpu else 0,
    "nodes": CONFIG.training_nodes,
}
# Several nodes: the launcher makes the job step, one task per node, and the job runs in none (mpi).
if CONFIG.training_nodes > 1:
    TRAINING_ON |= {"mpi": "srun", "tasks": CONFIG.training_nodes, "tasks_per_gpu": 0}

# A cluster's last warning and Ctrl-C are for the stage, which ends by itself; without its shell and
# its log it could not.
shell.prefix("set -euo pipefail; trap '' TERM INT; ")


wildcard_constraints:
    split="train|val|tune",
    shard=r"\d+",
    novel="|".join(NOVEL),


def block(name):
    """A block of the configuration as json: what a rule passes on, and what makes it stale."""
    return getattr(CONFIG, name).model_dump_json()


def source(script):
    """The meaning of a stage's code, as a param: a comment or another layout makes nothing stale."""
    return source_digest(Path("workflow_scripts", f"{script}.py"), Path(workflow.basedir))


def of_split(files, split):
    """The user's file for a split."""
    if split not in files:
        raise WorkflowError(f"proposals.files: there is none for {split}, which this run needs")
    return files[split]


def option(flag, value):
    """An option of a command line, where there is something to give."""
    return f"{flag} {value}" if value else ""


def rules_of(stage, files):
    """Where a stage stands: in the file that reads its artefacts from files, if they are given."""
    return f"rules/imported_{stage}.smk" if files else f"rules/{stage}.smk"


def shards(split):
    """The shards of the region embeddings of a split."""
    path = f"{RESULTS}/region_embeddings/{split}/{{shard}}.h5"
    return expand(path, shard=range(CONFIG.region_embeddings.shards))


def names_of(wildcards):
    """The class names of a file of text embeddings: base, or novel/<class>."""
    return CONFIG.classes.base if wildcards.classes == "base" else [NOVEL[wildcards.classes[6:]]]


def evaluated(pattern):
    """An input path on the split that the output's folder stands for."""
    splits = {"evaluation": "val", "evaluation_tune": "tune"}
    return lambda wildcards: expand(pattern, split=splits[wildcards.evaluation])


def print_results():
    """The table and where the page is, if the run made them."""
    metrics, report = Path(RESULTS, "evaluation/metrics.json"), Path(RESULTS, "report/report.html")
    if metrics.exists():
        print(table(read_metrics(metrics)))
    if report.exists():
        print(f"\nReport: {report}")
