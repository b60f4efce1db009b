"""Seconds of the whole default run, alone and beside a busy process, against another checkout.

    python -m benchmarks.default_run --reference ../reference --busy

Runs `snakemake --cores all` from scratch in a copy of each checkout, one after the other; use an
idle machine. With `--busy` runs it again beside a process that never sleeps. Prints AP50 beside the
seconds, and ends with one JSON line.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import tyro

PARTS = ("Snakefile", "config.yaml", "configs", "docs", "envs", "lpovod", "profiles", "resources")
PARTS += ("rules", "workflow_scripts")


def main(reference: Path | None = None, busy: bool = False, repeats: int = 1) -> None:
    """Time the default run.

    Args:
        reference: another checkout of this project, at any commit.
        busy: also time both beside a process that uses one core.
        repeats: runs of each checkout; the fastest counts.
    """
    checkouts = {"this": Path(), **({"reference": reference} if reference else {})}
    seconds: dict[str, dict[str, float]] = {name: {} for name in checkouts}
    for way in ("alone", *(["busy"] if busy else [])):
        for _ in range(repeats):
            for name, checkout in checkouts.items():
                elapsed, ap = run(checkout, way == "busy")
                seconds[name][way] = min(elapsed, seconds[name].get(way, elapsed))
                print(f"{name:10} {way:6} {elapsed:6.0f} s   AP50 {ap}", flush=True)
    if reference:
        ratio = seconds["this"]["alone"] / seconds["reference"]["alone"]
        print(f"this over reference, alone: {ratio:.2f}")
    if busy:
        for name, of_ways in seconds.items():
            print(f"{name}: beside a busy process {of_ways['busy'] / of_ways['alone']:.2f} times")
    print(json.dumps(seconds))


def run(checkout: Path, busy: bool) -> tuple[float, dict]:
    """Seconds of the run in a fresh copy, and its AP50."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "project")
        folder.mkdir()
        for part in (part for part in PARTS if (checkout / part).exists()):
            copy = shutil.copytree if (checkout / part).is_dir() else shutil.copy2
            copy(checkout / part, folder / part)
        with _busy_process() if busy else _nothing():
            started = time.perf_counter()
            command = ["snakemake", "--cores", "all"]
            subprocess.run(command, cwd=folder, check=True, capture_output=True)
            elapsed = time.perf_counter() - started
        metrics = json.loads((folder / "results/mini/evaluation/metrics.json").read_text())
    # Checkouts of earlier versions name the full method's row "AP50".
    return elapsed, metrics.get("rows", {}).get("full") or metrics["AP50"]


@contextmanager
def _busy_process():
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()


@contextmanager
def _nothing():
    yield


if __name__ == "__main__":
    tyro.cli(main)
