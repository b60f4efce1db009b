# Shared by all rules: the validated configuration, paths and a few short helpers.

import shlex

from lpovod.catalogue import COCO, COCO_CONTENT, FILES, MEMBERS
from lpovod.config import load_config, slug
from lpovod.exceptions import LpovodError
from lpovod.measures.ablations import read_metrics, table
from lpovod.published import RECORDS, content_of
from lpovod.source_digest import source_digest
from lpovod.yaml_keys import check_repeated

if workflow.resource_settings.cores == 0:  # Snakemake would wait for ever
    raise WorkflowError("--cores 0 can run no job: give a number of at least 1, or all")
try:
    check_repeated(map(Path, workflow.configfiles))
    CONFIG = load_config(config)
    SPLITS = CONFIG.dataset.splits
except LpovodError as error:
    raise WorkflowError(str(error))


def given(path):
    """An optional input: the user's file, or nothing."""
    return [path] if path else []


RESULTS = f"results/{CONFIG.name}"
DATASET = f"{RESULTS}/dataset"
DEVICE = "cuda" if CONFIG.gpu else "cpu"
ENVIRONMENT = "../envs/torch.yaml"
SEARCH_ENVIRONMENT = "../envs/search_gpu.yaml" if CONFIG.gpu else "../envs/light.yaml"
# What was made for single classes and images, under keys of all that shaped it (docs/architecture.md).
STORE = f"{RESULTS}/store"
# The model's files may be large, and Snakemake compares large files by modification time. Their
# digests, as params, make a stage stale if and only if the content changes.
CLIP_FILES = CONFIG.clip.files()
CLIP_DIGESTS = [content_of(path) for path in CLIP_FILES]
START_FILES = given(CONFIG.backbone.weights)
START_DIGESTS = [content_of(path) for path in START_FILES]
# For all nodes together. Snakemake cuts both to the available resources, and a training starts as
# many processes.
TRAINING_ON = {
    "gpu": CONFIG.training_gpus * CONFIG.training_nodes if CONFIG.gpu else 0,
    "nodes": CONFIG.training_nodes,
}
# With several nodes the launcher starts the job step, one task per node; with mpi, the job itself
# runs in no step.
if CONFIG.training_nodes > 1:
    TRAINING_ON |= {"mpi": "srun", "tasks": CONFIG.training_nodes, "tasks_per_gpu": 0}

# A cluster's last warning and Ctrl-C must reach the stage only, which then ends by itself; it needs
# its shell and its log for that.
shell.prefix("set -euo pipefail; trap '' TERM INT; ")


wildcard_constraints:
    split="train|val|tune",
    shard=r"\d+",


def block(name):
    """A block of the configuration as json; if it changes, the rule's outputs are stale."""
    return getattr(CONFIG, name).model_dump_json()


def source(script):
    """Digest of a stage's code, as a param; comments and formatting make nothing stale."""
    return source_digest(Path("workflow_scripts", f"{script}.py"), Path(workflow.basedir))


def of_split(files, split):
    """The user's file for a split."""
    if split not in files:
        raise WorkflowError(f"proposals.files: no file for {split}, which this run needs")
    return files[split]


def option(flag, value):
    """A command-line option, or nothing if it has no value."""
    return f"{flag} {value}" if value else ""


def rules_of(stage, files):
    """The file with the rules of a stage, which imports its artifacts if the user gives files."""
    return f"rules/imported_{stage}.smk" if files else f"rules/{stage}.smk"


def shards(stage, split):
    """The files of a stage for a split, one for each shard of its images."""
    path = f"{RESULTS}/{stage}/{split}/{{shard}}.h5"
    return expand(path, shard=range(shard_count(split)))


def given_digest(name):
    """The option for a digest that the configuration gives a download; a stage knows the others."""
    return option("--digest", CONFIG.download.digests.get(name))


def needed_archives():
    """The archives of COCO with a folder or file that the run reads."""
    coco = CONFIG.dataset.coco
    read = {of(split) for split in SPLITS for of in (coco.images, coco.annotations)}
    return [
        name for name, content in COCO_CONTENT.items() if read & {coco.root / c for c in content}
    ]


def evaluated(wildcards):
    """The split that belongs to the output's folder."""
    return {"evaluation": "val", "evaluation_tune": "tune"}[wildcards.evaluation]


def miniature_of(split):
    """The settings of the drawn world that shape a split, as json."""
    others = {f"{s}_images" for s in SPLITS if s != split}
    return CONFIG.dataset.miniature.model_dump_json(exclude=others)


def split_of(annotations):
    """The split of a file of annotations."""
    return annotations.partition("_")[0]


def drawn(split):
    """The json with all annotations of a split, if this run draws it."""
    return given(CONFIG.dataset.source == "miniature" and f"{DATASET}/drawn/{split}.json")


def annotations_of(split):
    """The json with all annotations of a split."""
    return "".join(drawn(split)) or str(CONFIG.dataset.coco.annotations(split))


def digest_of_annotations(annotations):
    """Digest of what the user's data say about the classes of a file."""
    source = SOURCES.get(split_of(annotations), PUBLISHED)
    return source.digest(CONFIG.classes.base if annotations == "train" else None)


def base_options(annotations):
    """Options for the base classes: a training file has their boxes alone, and may be counted."""
    boxes = CONFIG.dataset.coco.base_boxes.get(annotations)
    if annotations != "train" and boxes is None:
        return ""
    words = ["--base", *CONFIG.classes.base]
    words += ["--base-only"] if annotations == "train" else []
    words += ["--expected-boxes", str(boxes)] if boxes is not None else []
    return shlex.join(words)


def measured_options(files):
    """Options with the files of the validation split, which a run may lack."""
    names = ("metrics", "detections", "val")
    return " ".join(option(f"--{name}", files.get(name)) for name in names)


def print_results():
    """Print the table and the path of the report, if the run made them."""
    metrics, report = Path(RESULTS, "evaluation/metrics.json"), Path(RESULTS, "report/report.html")
    if metrics.exists():
        print(table(read_metrics(metrics)))
    if report.exists():
        print(f"\nReport: {report}")
