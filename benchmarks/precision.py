"""AP50 of the miniature world with trainings in float32 and in bfloat16, over several seeds.

    python -m benchmarks.precision --seeds 0 1 2

Runs the workflow up to the evaluation in a copy of this checkout, for each seed in each precision;
what comes before the trainings runs once per seed. Each run takes as long as a default run without
its report: some six minutes on two cores. Prints a row for each, and ends with one JSON line.
"""

import json
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Literal

import tyro
import yaml

from benchmarks.default_run import PARTS

Precision = Literal["float32", "bfloat16"]
SPLITS = ("novel", "base", "all")


def main(
    seeds: tuple[int, ...] = (0, 1, 2),
    precisions: tuple[Precision, ...] = ("float32", "bfloat16"),
    overlay: Path | None = None,
) -> None:
    """Compare the two precisions.

    Args:
        seeds: of the whole run.
        precisions: of both trainings.
        overlay: a configuration laid over config.yaml, such as configs/smallest.yaml.
    """
    rows: dict[str, list[dict[str, float]]] = {precision: [] for precision in precisions}
    print(f"{'precision':10}{'seed':>6}" + "".join(f"{split:>8}" for split in SPLITS) + "  seconds")
    with tempfile.TemporaryDirectory() as scratch:
        folder = copy_checkout(Path(scratch, "project"))
        for seed in seeds:
            for precision in precisions:
                started = time.perf_counter()
                ap = measure(folder, seed, precision, overlay)
                rows[precision].append(ap)
                cells = "".join(f"{ap[split]:8.1f}" for split in SPLITS)
                seconds = time.perf_counter() - started
                print(f"{precision:10}{seed:6}{cells}{seconds:9.0f}", flush=True)
    for precision, of_seeds in rows.items():
        for split in SPLITS:
            values = [ap[split] for ap in of_seeds]
            mean = sum(values) / len(values)
            print(f"{precision:10} {split:6} {mean:5.1f} ({min(values):.1f} to {max(values):.1f})")
    print(json.dumps({"seeds": seeds, "AP50": rows, "device": "cpu"}))


def copy_checkout(folder: Path) -> Path:
    """A copy of what a run needs."""
    folder.mkdir()
    for part in PARTS:
        copy = shutil.copytree if Path(part).is_dir() else shutil.copy2
        copy(part, folder / part)
    return folder


def measure(
    folder: Path, seed: int, precision: Precision, overlay: Path | None
) -> dict[str, float]:
    """AP50 of the full method; trains again what was trained in another precision."""
    name, training = f"seed_{seed}", {"training": {"precision": precision}}
    settings = {"name": name, "seed": seed, "proposals": training, "base_detector": training}
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    given = [str(overlay.resolve())] if overlay else []
    metrics = f"results/{name}/evaluation/metrics.json"
    command = ["snakemake", "--cores", "all", metrics, "--configfile", *given, "run.yaml"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stdout[-3000:] + done.stderr[-3000:])
    return json.loads((folder / metrics).read_text())["rows"]["full"]


if __name__ == "__main__":
    tyro.cli(main)
