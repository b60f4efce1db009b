# The threads, memory and time that jobs request, by the size of the data and the attempt. Locally
# only threads and gpu count; on a cluster all of them do. docs/scaling.md has the measurements
# behind the figures.

from math import ceil


def grows(fixed, per_image=0.0, split="train"):
    """A fixed amount plus an amount per image of a split, times the number of the attempt.

    The job's `split` wildcard, if it has one, takes precedence. A training that ran out of time is
    resumed, so a longer second attempt wastes nothing.
    """

    def amount(wildcards, attempt):
        count = image_count(getattr(wildcards, "split", split))
        return ceil(attempt * (fixed + per_image * count))

    return amount


def image_count(split):
    """Number of images of a split."""
    return SOURCES[split].count if split in SOURCES else CONFIG.dataset.image_count(split)


def shard_count(split):
    """Number of jobs that share a pass over the images of a split."""
    return CONFIG.shards if split == "train" else CONFIG.shards_of(image_count(split))


def grows_in_shards(fixed, per_image):
    """As `grows`, for one shard of the job's split."""

    def amount(wildcards, attempt):
        return grows(fixed, per_image / shard_count(wildcards.split))(wildcards, attempt)

    return amount


def training_threads(settings):
    """Per node. On GPUs, one for each and for each process that loads images for it."""
    if CONFIG.gpu:
        return CONFIG.training_gpus * (1 + settings.workers)
    # A training of a few images ends before more processors would have been free.
    return min(8, max(2, image_count("train") // 50))


def training_memory(settings, per_image):
    """MB per node: every GPU's process and its loading processes come to hold all images' lists."""
    if CONFIG.gpu:
        return grows(CONFIG.training_gpus * NETWORK, training_threads(settings) * per_image)
    return grows(NETWORK + RANK * training_threads(settings), per_image)


def training_resources(settings, per_image):
    """What a training asks for, and how it divides its work, which shapes no result."""
    return TRAINING_ON | {
        "mem_mb": training_memory(settings, per_image),
        "runtime": grows(60, settings.epochs * EPOCH),
        "workers": settings.workers,
        "images_at_once": settings.images_at_once or 0,
    }


# Threads of a job that feeds a GPU with images: all but one decode, 200 photographs a second each.
FEEDING = 4 if CONFIG.gpu else 1
# Minutes per image of one epoch: 8 images per second on each GPU, an assumption for the paper's
# detector (lpovod plan); the miniature world trains on 18 per second with two cores.
EPOCH = 1 / (8 * 60 * (CONFIG.training_gpus * CONFIG.training_nodes if CONFIG.gpu else 1))
# Minutes per image of one pass without training: 5 per second is slow for a GPU, and what a CPU does.
PASS = 1 / (5 * 60)
REGIONS = CONFIG.proposals.per_image
# MB of the imported modules (torch, or h5py and FAISS only), CUDA in one process, and Snakemake.
NETWORK, LIGHT = 3000, 1000
# MB of each of a training's ranks on a CPU, one per thread, beyond their shared memory.
RANK = 300
# MB per image: its annotations (7 KB), and its place in a store.
LISTED = 0.01
# MB per image: id, position, box and objectness of each region. Retrieval has those of all images,
# what reads a store in blocks those of a shard.
REGION_ROWS = 4e-5 * REGIONS
SHARD_ROWS = REGION_ROWS / CONFIG.shards
# MB per image of stage evaluation: the detections of its 20 variants.
DETECTED = 3e-3 * CONFIG.evaluation.per_image
# MB of stage pseudo_labels: candidates of every class, as Python objects.
RETRIEVED = (
    0.005 * len(CONFIG.classes.novel) * (CONFIG.pseudo_labels.k + CONFIG.pseudo_labels.ignored)
)
# MB of stage linear_probe: the features that stay in memory, and their rows.
CANDIDATES = 2000
# Minutes per image: 300 regions per second, cropped by one core.
EMBEDDING = REGIONS / (300 * 60)
# Jobs that share the images which classes retrieve.
RETRIEVED_SHARDS = CONFIG.shards_of(CONFIG.retrieved_images(image_count("train")))
