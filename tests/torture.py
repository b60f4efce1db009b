"""Kill a stage in every way, run the same command again, and compare with an undisturbed run.

``make torture`` tries everything and writes docs/torture.md; `tests/test_torture.py` tries a part.
A stage's job runs alone, in a copy of a finished run whose output was deleted. Kills come from
outside, when a file shows that the job has come so far; nothing in the product knows of them.
"""

import argparse
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from project import copy_project, digests, snakemake, start_snakemake, wait_until

CONFIG = "smallest.yaml"
OVERLAY = {"classes": {"novel": ["star", "ring"]}}
RESULTS = Path("results/smallest")
TRIES = 4  # a short write may be over before the kill arrives


@dataclass(frozen=True)
class Stage:
    """One job of the workflow, by paths below results/smallest.

    Attributes:
        outputs: its files, and what it keeps in the store; the first one is what Snakemake is asked
            for.
        log: what it prints.
        checkpoint: where a training keeps what it has.
    """

    outputs: tuple[str, ...]
    log: str
    checkpoint: str | None = None


STAGES = {
    "dataset": Stage(
        ("dataset/train.images.json", "dataset/drawn/train.json", "dataset/images/train"),
        "dataset/train.log",
    ),
    "annotations": Stage(("dataset/train.json",), "annotations/train.log"),
    "text_embeddings": Stage(
        (
            "text_embeddings/base.safetensors",
            "text_embeddings/novel.safetensors",
            "store/text_embeddings",
        ),
        "text_embeddings.log",
    ),
    "proposal_network": Stage(
        ("proposals/network.safetensors", "proposals/history.jsonl"),
        "proposal_network.log",
        "proposals/network.safetensors.checkpoint",
    ),
    "proposals": Stage(("proposals/train/0.h5",), "proposals/train/0.log"),
    "region_embeddings": Stage(("region_embeddings/train/0.h5",), "region_embeddings/train/0.log"),
    "region_index": Stage(("region_index/train.index",), "region_index.log"),
    "base_detector": Stage(
        ("base_detector/detector.safetensors", "base_detector/history.jsonl"),
        "base_detector.log",
        "base_detector/detector.safetensors.checkpoint",
    ),
    "pseudo_labels": Stage(
        ("pseudo_labels/novel.json", "store/pseudo_labels"), "pseudo_labels.log"
    ),
    "region_features": Stage(("region_features/val/0.h5",), "region_features/val/0.log"),
    "retrieved_region_features": Stage(
        ("region_features/retrieved/0", "store/region_features"), "region_features/retrieved/0.log"
    ),
    "linear_probe": Stage(("linear_probe/weights.safetensors",), "linear_probe.log"),
    "evaluation": Stage(
        ("evaluation/metrics.json", "evaluation/detections.json", "evaluation/ground_truth.json"),
        "evaluation.log",
    ),
    "model": Stage(("model/model.safetensors",), "model.log"),
    "report": Stage(("report/report.html",), "report.log"),
}


@dataclass(frozen=True)
class Job:
    """A stage's job in one copy of the finished run."""

    folder: Path
    stage: Stage

    def path(self, name: str) -> Path:
        return self.folder / RESULTS / name

    def partial(self) -> list[Path]:
        """The temporary names of its outputs, and of files in those that are folders."""
        outputs = [self.path(name) for name in self.stage.outputs]
        names = [output.with_name(f".{output.name}.partial") for output in outputs]
        return [p for p in names if p.exists()] + [p for o in outputs for p in o.glob(".*")]

    def started(self) -> bool:
        return self.path(f"logs/{self.stage.log}").exists()

    def under_way(self) -> bool:
        """A training has finished an epoch, another stage has said something."""
        if self.stage.checkpoint:
            return self.path(self.stage.checkpoint).exists()
        log = self.path(f"logs/{self.stage.log}")
        return (log.exists() and log.stat().st_size > 0) or bool(self.partial())

    def writing(self) -> bool:
        return bool(self.partial())

    def arguments(self) -> list[str]:
        return [str(RESULTS / self.stage.outputs[0]), "--cores", "2"]

    def start(self) -> subprocess.Popen:
        return start_snakemake(self.folder, CONFIG, OVERLAY, *self.arguments())

    def finish(self) -> str:
        """What the README says: unlock, and the same command."""
        snakemake(self.folder, CONFIG, OVERLAY, "--unlock")
        return snakemake(self.folder, CONFIG, OVERLAY, *self.arguments())


def finished_run(folder: Path) -> Path:
    """A copy of the project in which the whole smallest DAG ran undisturbed."""
    project = copy_project(folder)
    snakemake(project, CONFIG, OVERLAY, "--cores", "2")
    return project


@contextmanager
def before(stage: Stage, finished: Path) -> Iterator[Job]:
    """A copy of the finished run, without the stage's output."""
    with tempfile.TemporaryDirectory(dir=finished.parent) as scratch:
        folder = Path(scratch) / "project"
        subprocess.run(["cp", "-a", finished, folder], check=True)
        job = Job(folder, stage)
        job.path(f"logs/{stage.log}").unlink(missing_ok=True)
        for name in stage.outputs:
            path = job.path(name)
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        yield job


def killed(job: Job, when: Callable[[], bool], number: int) -> bool:
    """Send a signal to the job and to Snakemake, when it has come so far; whether it came in time.

    Nothing half may stand under a final name afterwards.
    """
    process = job.start()
    try:
        with suppress(AssertionError):
            wait_until(when, process, pause=0.0005)
        in_time = when() and process.poll() is None
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        process.wait()
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return in_time


def compare(job: Job, finished: Path) -> None:
    """Every artifact is the undisturbed run's, and nothing is left beside them."""
    expected, found = digests(finished), digests(job.folder)
    wrong = sorted(path for path in expected if found.get(path) != expected[path])
    assert not wrong, f"other than in an undisturbed run: {wrong}"
    left = [
        *(job.folder / RESULTS).rglob(".*.partial"),
        *(job.folder / RESULTS).rglob("*.checkpoint"),
        *(job.folder / RESULTS / "store").rglob(".*"),
    ]
    assert not left, f"left behind: {left}"


def whole_or_absent(job: Job, finished: Path) -> None:
    expected, found = digests(finished), digests(job.folder)
    half = sorted(path for path in found if found[path] != expected.get(path))
    assert not half, f"under their final names, but not whole: {half}"


def torture_by_kill(
    stage: Stage, finished: Path, point: Callable[[Job], Callable[[], bool]], number: int
) -> str:
    """Kill at a point, then finish."""
    for _ in range(TRIES):
        with before(stage, finished) as job:
            in_time = killed(job, point(job), number)
            whole_or_absent(job, finished)
            if in_time:
                job.finish()
                compare(job, finished)
                return "same result" + _resumed(job)
    return f"not hit in {TRIES} tries"


def _resumed(job: Job) -> str:
    log = job.path(f"logs/{job.stage.log}").read_text()
    resumed = re.search(r"resuming after .*?(?= of )", log)
    return f", {resumed[0]}" if resumed else ""


def reboot(stage: Stage, finished: Path) -> str:
    """The machine goes down: what was written is cut in half, even under its final name."""
    with before(stage, finished) as job:
        killed(job, job.under_way, signal.SIGKILL)
        for name in stage.outputs:
            subprocess.run(["cp", "-aT", finished / RESULTS / name, job.path(name)], check=True)
        outputs = [job.path(n) for n in (*stage.outputs, stage.checkpoint) if n]
        written = [*job.partial(), *outputs, *(p for o in outputs for p in o.rglob("*"))]
        for path in written:
            if path.is_file():
                os.truncate(path, path.stat().st_size // 2)
        job.finish()
        compare(job, finished)
    return "same result"


def disk_full(stage: Stage, finished: Path) -> str:
    """The disk of the stage's folder is full; room is made and the command given again."""
    if os.geteuid() != 0:
        return "needs root"
    with before(stage, finished) as job:
        here = job.path(stage.outputs[0]).parent
        kept = job.folder.parent / "kept"
        subprocess.run(["cp", "-a", here, kept], check=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256m", "none", here], check=True)
        try:
            subprocess.run(["cp", "-a", f"{kept}/.", here], check=True)
            _fill(here / "filler")
            process = job.start()
            process.wait()
            printed = (job.folder / "printed").read_text()
            assert process.returncode != 0, "a full disk was not noticed"
            assert "No space left on device" in printed, printed[-3000:]
            assert "Traceback" not in printed, printed[-3000:]
            whole_or_absent(job, finished)
            (here / "filler").unlink()
            job.finish()
            compare(job, finished)
        finally:
            subprocess.run(["umount", "--lazy", here], check=True)
    return "reported, then the same result"


def _fill(path: Path) -> None:
    with open(path, "wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(1 << 16))


TORTURES: dict[str, Callable[[Stage, Path], str]] = {
    "KILL early": lambda s, f: torture_by_kill(s, f, lambda j: j.started, signal.SIGKILL),
    "KILL under way": lambda s, f: torture_by_kill(s, f, lambda j: j.under_way, signal.SIGKILL),
    "KILL while writing": lambda s, f: torture_by_kill(s, f, lambda j: j.writing, signal.SIGKILL),
    "TERM under way": lambda s, f: torture_by_kill(s, f, lambda j: j.under_way, signal.SIGTERM),
    "Ctrl-C under way": lambda s, f: torture_by_kill(s, f, lambda j: j.under_way, signal.SIGINT),
    "disk full": disk_full,
    "reboot": reboot,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stages", nargs="*", default=list(STAGES), help=", ".join(STAGES))
    parser.add_argument("--output", type=Path, help="markdown file for the table")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="torture") as scratch:
        finished = finished_run(Path(scratch) / "finished")
        rows = {}
        for name in arguments.stages:
            rows[name] = [_outcome(name, kind, finished) for kind in TORTURES]
            if arguments.output:
                arguments.output.write_text(_table(rows))
    failed = [name for name, row in rows.items() if any(r.startswith("FAILED") for r in row)]
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def _outcome(name: str, kind: str, finished: Path) -> str:
    started = time.monotonic()
    try:
        outcome = TORTURES[kind](STAGES[name], finished)
    except AssertionError as error:
        outcome = "FAILED: " + str(error).strip().splitlines()[-1][:200]
    print(f"{name}, {kind}: {outcome} ({time.monotonic() - started:.0f} s)", flush=True)
    return outcome


def _table(rows: dict[str, list[str]]) -> str:
    lines = [
        "# What survives",
        "",
        "Made by `make torture` (`tests/torture.py`): each job of the smallest run is killed, then",
        "`snakemake --unlock` and the same command finish it. *Same result*: every artifact of the",
        "run is, byte for byte, that of an undisturbed one, and nothing is left beside it.",
        "",
        "| stage | " + " | ".join(TORTURES) + " |",
        "|---" * (1 + len(TORTURES)) + "|",
        *(f"| `{name}` | " + " | ".join(row) + " |" for name, row in rows.items()),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
