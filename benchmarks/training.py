"""Time of both networks' training steps on two processors, alone and beside a busy process.

Run as ``python -m benchmarks.training`` after the default run. Compares a process of two OpenMP
threads (the reference), a process of one thread, and two ranks of one thread each, which
`--threads 2` starts. Ends with one JSON line; its ratios refer to the two ranks' median.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from itertools import pairwise
from pathlib import Path
from unittest import mock

import torch

from lpovod import training
from lpovod.config import Config, read_config
from lpovod.formats.regions import shards_in
from lpovod.stages import base_detector, proposal_network

STAGES = {"proposal_network": proposal_network, "base_detector": base_detector}
WAYS = ("two threads", "one thread", "two ranks")
WARM_UP = 10


class Enough(Exception):
    """All steps have been timed."""


def median_step(stage: str, way: str, results: Path, steps: int) -> float:
    """Milliseconds from one update of the weights to the next, loading included."""
    ends: list[float] = []
    update = training.update

    def timed(*arguments) -> None:
        update(*arguments)
        ends.append(time.perf_counter())
        if len(ends) > WARM_UP + steps:
            raise Enough

    @contextmanager
    def in_one_process(device: str, threads: int, _) -> Iterator[str]:
        torch.set_num_threads(threads)
        yield device

    ranks = STAGES[stage].training_ranks if way == "two ranks" else in_one_process
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(training, "update", timed),
        mock.patch.object(STAGES[stage], "training_ranks", ranks),
        suppress(Enough),
    ):
        learn(stage, read_config([Path("config.yaml")]), results, Path(folder), threads(way))
    return 1000 * statistics.median(after - before for before, after in pairwise(ends[WARM_UP:]))


def threads(way: str) -> int:
    return 1 if way == "one thread" else 2


def learn(stage: str, config: Config, results: Path, folder: Path, threads: int) -> None:
    """Run the stage as the workflow does, with outputs in another folder."""
    outputs = {"checkpoint": folder / "checkpoint", "history": folder / "history", "code": ""}
    arguments = {"seed": 0, "threads": threads, "dataset": results / "dataset/train.json"} | outputs
    if stage == "proposal_network":
        proposal_network.train_proposal_network(
            backbone=config.backbone,
            settings=config.proposals,
            network=folder / "network",
            **arguments,
        )
    else:
        base_detector.train_base_detector(
            region_embeddings=shards_in(results / "region_embeddings/train"),
            network=config.backbone.weights,
            backbone=config.backbone,
            settings=config.base_detector,
            detector=folder / "detector",
            **arguments,
        )


@contextmanager
def busy_process() -> Iterator[None]:
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def in_own_process(stage: str, way: str, arguments: argparse.Namespace, busy: bool) -> float:
    """`median_step` in a separate process, which starts with the right number of OpenMP threads."""
    command = [sys.executable, "-m", "benchmarks.training", "--only", stage, way]
    command += ["--results", str(arguments.results), "--steps", str(arguments.steps)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads(way))}
    with busy_process() if busy else nullcontext():
        done = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, text=True, check=True
        )
    return float(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--results", type=Path, default=Path("results/mini"), help="folder of a finished run"
    )
    parser.add_argument("--steps", type=int, default=40, help="number of timed steps")
    parser.add_argument(
        "--only", nargs=2, metavar=("STAGE", "WAY"), help="time one, in this process"
    )
    arguments = parser.parse_args()
    if arguments.only:
        print(median_step(*arguments.only, arguments.results, arguments.steps))
        return
    figures = {}
    for stage in STAGES:
        ms = {}
        for way in WAYS:
            alone, beside = (in_own_process(stage, way, arguments, busy) for busy in (False, True))
            print(f"{stage:16}  {way:11}  alone {alone:6.1f} ms  beside {beside:6.1f} ms")
            ms[way] = {"alone": round(alone, 1), "beside": round(beside, 1)}
        ranks, reference = ms["two ranks"], ms["two threads"]
        ms["ratio_to_reference"] = {k: round(ranks[k] / reference[k], 2) for k in ranks}
        ms["ratio_beside_to_alone"] = round(ranks["beside"] / ranks["alone"], 2)
        figures[stage] = ms
    print(json.dumps(figures | {"device": "cpu"}))


if __name__ == "__main__":
    main()
