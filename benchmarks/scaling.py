"""How memory and processor time of every stage grow with the number of images.

Runs the workflow on the miniature world at 1, 4 and 16 times a small number of images, all other
settings being the default run's, and reads Snakemake's benchmark files. Time is taken as
``start + rate * images ** exponent``: with sizes at a constant ratio the differences of successive
times are at the ratio to the power of the exponent, whatever the start costs.

Run as ``python -m benchmarks.scaling``. Ends with one JSON line. ``--predict`` prints the table of
docs/scaling.md instead, from figures per item, and runs nothing.
"""

import argparse
import csv
import json
import math
import shutil
import subprocess
from pathlib import Path

import yaml

from lpovod.download import COCO_IMAGES

RATIO = 4
SMALLEST_GROWTH = 2.0  # seconds; below it an exponent is noise


def run(images: int) -> Path:
    """Run the workflow on so many training images, from nothing; the folder of its benchmarks."""
    name = f"scaling_{images}"
    results = Path("results", name)
    shutil.rmtree(results, ignore_errors=True)
    results.mkdir(parents=True)
    counts = {"train_images": images, "val_images": max(4, images // 2), "tune_images": 4}
    overlay = results / "overlay.yaml"
    # The floor is one of a well-trained network's objectness.
    overlay.write_text(
        yaml.safe_dump({"dataset": {"miniature": counts}, "pseudo_labels": {"objectness": 0}})
    )
    command = ["snakemake", "--cores", "2", "--configfile", str(overlay), "--config"]
    subprocess.run([*command, f"name={name}"], check=True)
    return results / "benchmarks"


def by_stage(benchmarks: Path) -> dict[str, dict[str, float]]:
    """CPU seconds of all jobs of a stage, and the most memory in MB that one of them held."""
    found: dict[str, dict[str, float]] = {}
    for path in sorted(benchmarks.rglob("*.tsv")):
        stage = path.relative_to(benchmarks).parts[0].removesuffix(".tsv")
        with open(path) as file:
            row = list(csv.DictReader(file, delimiter="\t"))[-1]
        here = found.setdefault(stage, {"cpu_s": 0.0, "mb": 0.0})
        here["cpu_s"] += float(row["cpu_time"])
        here["mb"] = max(here["mb"], float(row["max_rss"]))
    return found


def exponent(times: list[float]) -> float | None:
    """The exponent of three times at sizes of a constant ratio; None if they hardly grow."""
    small, large = times[1] - times[0], times[2] - times[1]
    if small <= 0 or large < SMALLEST_GROWTH:
        return None
    return round(math.log(large / small, RATIO), 2)


def measure(base: int, factors: list[int]) -> dict:
    sizes = [base * factor for factor in factors]
    runs = [by_stage(run(images)) for images in sizes]
    stages = {}
    for stage in runs[-1]:
        cpu, mb = ([r[stage][what] for r in runs] for what in ("cpu_s", "mb"))
        stages[stage] = {
            "cpu_s": cpu,
            "mb": mb,
            "cpu_ms_per_image": round(1000 * (cpu[-1] - cpu[-2]) / (sizes[-1] - sizes[-2]), 2),
            "exponent": exponent(cpu) if factors == [1, RATIO, RATIO**2] else None,
            "kb_per_image": round(1000 * (mb[-1] - mb[-2]) / (sizes[-1] - sizes[-2]), 1),
        }
        pairs = zip(cpu, mb, strict=True)
        print(f"{stage:20} " + "  ".join(f"{s:8.1f} s {m:6.0f} MB" for s, m in pairs))
    return {"images": sizes, "stages": stages}


# --- prediction -----------------------------------------------------------------------------------

WORLDS = {  # training images, validation images, novel classes
    "COCO": (*COCO_IMAGES.values(), 17),
    "2 M images": (2_000_000, 40_000, 300),
    "100 M images": (100_000_000, 100_000, 1_000),
}
REGIONS = 300  # per image
K = 100
EPOCHS = {"proposal_network": 8, "base_detector": 20}
# Measured on one processor core (see docs/scaling.md).
CROP_S = 3.2e-3  # two crops of a region, 224 pixels
DECODE_S = 27e-3  # a photograph, and its resizing to 800 pixels
# ASSUMED of one GPU: nobody has measured these here.
GPU_TRAIN = 15.0  # images per second, ResNet-50, forward and backward
GPU_INFER = 60.0  # images per second, the same, forward
GPU_CLIP = 5_000.0  # regions per second, two crops each, ViT-B/32
INDEX_S = 20e-6  # per region: read, convert, write
# Bytes of a region: box, objectness, and vectors in 16 bits.
PROPOSAL, EMBEDDING, INDEXED, FEATURE = 20, 20 + 1024, 8 + 1024, 20 + 2048 + 1024 + 16


def predict(images: int, val: int, novel: int, gpus: int) -> dict[str, tuple[float, float]]:
    """Hours and gigabytes of every stage as it is now: one job each, shards excepted."""
    both = images + val
    retrieved = min(images, novel * K)
    hours = {
        "proposal_network": EPOCHS["proposal_network"] * images / GPU_TRAIN / gpus,
        "proposals": images * (DECODE_S + 1 / GPU_INFER),
        "region_embeddings": both * REGIONS * max(CROP_S, 1 / GPU_CLIP) / gpus,
        "region_index": images * REGIONS * INDEX_S,
        "base_detector": EPOCHS["base_detector"] * images / GPU_TRAIN / gpus,
        "pseudo_labels": novel * images * REGIONS * INDEXED / 2e9 / gpus,
        "region_features": max(val, retrieved / gpus) * (DECODE_S + 1 / GPU_INFER),
    }
    size = {
        "proposals": both * REGIONS * PROPOSAL,
        "region_embeddings": both * REGIONS * EMBEDDING,
        "region_index": images * REGIONS * INDEXED,
        "region_features": (val + retrieved) * REGIONS * FEATURE,
    }
    return {stage: (s / 3600, size.get(stage, 0) / 1e9) for stage, s in hours.items()}


def print_prediction() -> None:
    for world, counts in WORLDS.items():
        tables = [predict(*counts, gpus) for gpus in (1, 8, 64)]
        print(f"\n### {world}\n")
        print("| stage | disk, GB | hours on 1 GPU | on 8 | on 64 |\n|---|---|---|---|---|")
        for stage in tables[0]:
            disk = f"{tables[0][stage][1]:,.0f}" if tables[0][stage][1] else ""
            cells = " | ".join(f"{table[stage][0]:,.1f}" for table in tables)
            print(f"| `{stage}` | {disk} | {cells} |")
        disk = sum(size for _, size in tables[0].values())
        cells = " | ".join(f"**{sum(h for h, _ in t.values()):,.0f}**" for t in tables)
        print(f"| **together** | **{disk:,.0f}** | {cells} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=int, default=50, help="training images at 1x")
    parser.add_argument("--factors", type=int, nargs="+", default=[1, RATIO, RATIO**2])
    parser.add_argument("--predict", action="store_true")
    arguments = parser.parse_args()
    if arguments.predict:
        print_prediction()
    else:
        print(json.dumps(measure(arguments.base, arguments.factors)))


if __name__ == "__main__":
    main()
