"""A copy of the project in which a test may run Snakemake and edit files."""

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import yaml

from lpovod.artifacts import sha256
from lpovod.config import MiniatureSettings
from lpovod.stages.dataset import annotate, draw

PARTS = ("Snakefile", "config.yaml", "configs", "envs", "lpovod", "profiles", "resources")
PARTS += ("rules", "workflow_scripts")
ALL_CLASSES = "train_all_classes.json"


def copy_project(folder: Path) -> Path:
    folder.mkdir()
    for part in PARTS:
        (shutil.copytree if Path(part).is_dir() else shutil.copy2)(part, folder / part)
    return folder


def _command(folder: Path, config: str, overlay: dict, arguments: tuple[str, ...]) -> list[str]:
    overlay_file = folder / "overlay.yaml"
    overlay_file.write_text(yaml.safe_dump(overlay))
    # Last, or it would take a target for a file of settings.
    return ["snakemake", *arguments, "--configfile", f"configs/{config}", overlay_file.name]


def snakemake(folder: Path, config: str, overlay: dict, *arguments: str) -> str:
    """Run snakemake in a copy of the project; return what it printed.

    Args:
        folder: the copy.
        config: an overlay of the project, below configs/.
        overlay: laid over it.
        arguments: of snakemake.
    """
    done = subprocess.run(
        _command(folder, config, overlay, arguments),
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    return done.stdout + done.stderr


def stale_jobs(folder: Path, config: str, overlay: dict) -> dict[str, int]:
    """How many jobs of each rule a dry-run announces."""
    return announced(snakemake(folder, config, overlay, "-n"))


def announced(printed: str) -> dict[str, int]:
    """Number of jobs by rule in what a dry-run printed."""
    table = printed.partition("Job stats:")[2].partition("total")[0]
    rows = re.findall(r"^(\w+) +(\d+)$", table, re.MULTILINE)
    return {rule: int(count) for rule, count in rows if rule != "all"}


def keys_of(config: str) -> set[tuple[str, ...]]:
    """The keys that a yaml file of settings sets, as paths."""

    def keys(content: Any, path: tuple[str, ...] = ()) -> set[tuple[str, ...]]:
        if not isinstance(content, dict):
            return {path}
        return {key for name, value in content.items() for key in keys(value, (*path, name))}

    return keys(yaml.safe_load(Path(config).read_text()))


def start_snakemake(folder: Path, config: str, overlay: dict, *arguments: str) -> subprocess.Popen:
    """Start snakemake in a copy of the project, as the head of a process group of its own.

    What it prints goes to the file `printed` there.
    """
    with open(folder / "printed", "w") as printed:
        return subprocess.Popen(
            _command(folder, config, overlay, arguments),
            cwd=folder,
            stdout=printed,
            stderr=printed,
            # A cluster of two nodes on one machine has more threads than it has cores.
            env=os.environ | {"OMP_WAIT_POLICY": "PASSIVE"},
            start_new_session=True,
            # Ctrl-C works even if the tests run in the background, where it is ignored.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )


def wait_until(
    ready: Callable[[], bool],
    process: subprocess.Popen | None = None,
    seconds: float = 600,
    pause: float = 0.02,
) -> None:
    """Wait for something (that a running process does), looking every `pause` seconds.

    Raises:
        AssertionError: if the process ends first, or time is over.
    """
    deadline = time.monotonic() + seconds
    while not ready():
        assert process is None or process.poll() is None, "the process ended before"
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(pause)


def digests(folder: Path) -> dict[str, str]:
    """Digest of every artifact below results/, by its path there."""
    return {
        str(path.relative_to(folder)): sha256(path)
        for part in ("safetensors", "h5", "json", "jsonl", "index", "jpg")
        for path in (folder / "results").rglob(f"*.{part}")
        if "benchmarks" not in path.parts
    }


def draw_dataset(folder: Path, settings: MiniatureSettings, base: Iterable[str], seed: int) -> None:
    """A drawn dataset with every file of stage `dataset`."""
    for split in ("train", "val", "tune"):
        images, drawn = folder / f"{split}.images.json", folder / "drawn" / f"{split}.json"
        draw(split, settings, seed, folder / "images" / split, images, drawn)
        annotate(images, drawn, folder / f"{split}.json", list(base), base_only=split == "train")
    annotate(folder / "train.images.json", folder / "drawn/train.json", folder / ALL_CLASSES)


def install(packages: dict[str, str]) -> None:
    """Install the Debian packages whose programs are missing; skip the test where that cannot be.

    A test run changes the machine only under CI (variable CI) or when asked (LPOVOD_INSTALL=1).

    Args:
        packages: by the name of a program that each of them brings.
    """
    missing = [package for program, package in packages.items() if not shutil.which(program)]
    if not missing:
        return
    named = ", ".join(missing)
    if not os.environ.get("CI") and os.environ.get("LPOVOD_INSTALL") != "1":
        pytest.skip(f"needs {named}: install them, or set LPOVOD_INSTALL=1 to let the test do it")
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        pytest.skip(f"needs {named}, or root and apt-get to install them")
    subprocess.run(["apt-get", "update", "-qq"], capture_output=True)
    command = ["apt-get", "install", "-qq", "--no-install-recommends", *missing]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode:
        pytest.skip(f"{named} cannot be installed: {done.stderr[-300:]}")
