"""Growth of each stage's memory and time with the number of images.

Runs the workflow on the miniature world at 1, 4 and 16 times a small number of images, with the
default run's other settings, and reads Snakemake's benchmark files. The model of time is
``start + rate * images ** exponent``: at sizes of a constant ratio, successive differences of times
have that ratio to the power of the exponent, whatever the start costs.

Run as ``python -m benchmarks.scaling``. Ends with one JSON line.
"""

import argparse
import csv
import json
import math
import shutil
import subprocess
from pathlib import Path

import yaml

RATIO = 4
SMALLEST_GROWTH = 2.0  # seconds; below it an exponent is noise


def run(images: int) -> Path:
    """Run the workflow on `images` training images from scratch; return its benchmark folder."""
    name = f"scaling_{images}"
    results = Path("results", name)
    shutil.rmtree(results, ignore_errors=True)
    results.mkdir(parents=True)
    counts = {"train_images": images, "val_images": max(4, images // 2), "tune_images": 4}
    overlay = results / "overlay.yaml"
    # The default floor suits the objectness of a well-trained network.
    overlay.write_text(
        yaml.safe_dump({"dataset": {"miniature": counts}, "pseudo_labels": {"objectness": 0}})
    )
    command = ["snakemake", "--cores", "2", "--configfile", str(overlay), "--config"]
    subprocess.run([*command, f"name={name}"], check=True)
    return results / "benchmarks"


def by_stage(benchmarks: Path) -> dict[str, dict[str, float]]:
    """Total seconds of a stage's jobs, and the peak memory in MB of the largest job.

    Processor time is left out, since Snakemake samples it only every half minute.
    """
    stages: dict[str, dict[str, float]] = {}
    for path in sorted(benchmarks.rglob("*.tsv")):
        stage = path.relative_to(benchmarks).parts[0].removesuffix(".tsv")
        with open(path) as file:
            row = list(csv.DictReader(file, delimiter="\t"))[-1]
        totals = stages.setdefault(stage, {"s": 0.0, "mb": 0.0})
        totals["s"] += float(row["s"])
        totals["mb"] = max(totals["mb"], float(row["max_rss"]))
    return stages


def exponent(times: list[float]) -> float | None:
    """The exponent of three times at sizes of a constant ratio; None if the times hardly grow."""
    small, large = times[1] - times[0], times[2] - times[1]
    if small <= 0 or large < SMALLEST_GROWTH:
        return None
    return round(math.log(large / small, RATIO), 2)


def measure(base: int, factors: list[int]) -> dict:
    sizes = [base * factor for factor in factors]
    runs = [by_stage(run(images)) for images in sizes]
    stages = {}
    for stage in runs[-1]:
        seconds, mb = ([r[stage][quantity] for r in runs] for quantity in ("s", "mb"))
        stages[stage] = {
            "s": seconds,
            "mb": mb,
            "ms_per_image": round(1000 * (seconds[-1] - seconds[-2]) / (sizes[-1] - sizes[-2]), 2),
            "exponent": exponent(seconds) if factors == [1, RATIO, RATIO**2] else None,
            "kb_per_image": round(1000 * (mb[-1] - mb[-2]) / (sizes[-1] - sizes[-2]), 1),
        }
        pairs = zip(seconds, mb, strict=True)
        print(f"{stage:20} " + "  ".join(f"{s:8.1f} s {m:6.0f} MB" for s, m in pairs))
    return {"images": sizes, "stages": stages}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=int, default=50, help="training images at 1x")
    parser.add_argument("--factors", type=int, nargs="+", default=[1, RATIO, RATIO**2])
    arguments = parser.parse_args()
    print(json.dumps(measure(arguments.base, arguments.factors)))


if __name__ == "__main__":
    main()
