# What jobs ask for: threads, memory and time, from the size of the data and the attempt.
# Locally only threads and gpu count; on a cluster all of it does. docs/scaling.md has the
# measurements behind the figures.

from math import ceil


def grows(fixed, per_image=0.0, split="train"):
    """An amount for a start and for every image of a split, and as much again at every attempt.

    The split is the job's own, if it has one. A training that ran out of time is resumed, so a longer
    second attempt is no waste.
    """

    def amount(wildcards, attempt):
        count = CONFIG.dataset.image_count(getattr(wildcards, "split", split))
        return ceil(attempt * (fixed + per_image * count))

    return amount


# A training of a few images ends before more processors would have been free.
TRAINING_THREADS = min(8, max(2, CONFIG.dataset.image_count("train") // 50))
# Minutes per image of one epoch: fifteen images a second, an assumption for one GPU and the
# paper's detector; the miniature world trains eighteen a second on two cores.
EPOCH = 1 / (15 * 60)
# Minutes per image of one pass without learning: five a second, images being decoded by one core.
PASS = 1 / (5 * 60)
REGIONS = CONFIG.proposals.per_image
# Memory of the modules (torch, or h5py and FAISS alone), of a process's CUDA and of Snakemake.
NETWORK, LIGHT = 3000, 1000
# MB of a training's ranks on a CPU, one for each thread, beside what they share.
RANKS = 0 if CONFIG.gpu else 300 * TRAINING_THREADS
# MB per image: its annotations (7 KB), and the places of its regions in the store.
LISTED = 0.01 + 4e-5 * REGIONS
# MB per image of stage evaluation: three scores of each region and class, and copies of them.
SCORED = 2e-5 * REGIONS * len(CONFIG.classes.base + CONFIG.classes.novel)
# MB of stage linear_probe: the features of all regions of the retrieved images, twice in float32.
CANDIDATES = 8e-6 * len(NOVEL) * CONFIG.pseudo_labels.k * REGIONS * CONFIG.base_detector.dimension
# Minutes per image of a shard: three hundred regions a second, cropped by one core.
EMBEDDING = REGIONS / (300 * 60) / CONFIG.region_embeddings.shards
