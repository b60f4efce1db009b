"""What a page says of its own making: date, code, machine and versions.

These facts change without the run, so they are no part of what the report is made from: they are
determined when the page is written, and never make it stale.
"""

import platform
import subprocess
from collections import Counter
from dataclasses import dataclass
from datetime import datetime
from importlib import metadata
from pathlib import Path

import lpovod
from lpovod.devices import usable_cores

PACKAGES = (
    "snakemake",
    "torch",
    "torchvision",
    "open_clip_torch",
    "timm",
    "faiss-cpu",
    "numpy",
    "pillow",
)
CODE = (":/lpovod", ":/workflow_scripts", ":/rules", ":/Snakefile")
"""What `Made.commit` speaks of; a changed configuration is listed by the report itself."""


@dataclass(frozen=True)
class Made:
    """When, where and by which code a page was made.

    Attributes:
        date: local time, with its offset from UTC.
        commit: of the code, "with changes" if it was edited since; None outside a git checkout.
        machine: processor, cores and, if the run uses them, GPUs.
        versions: of Python and of the installed packages, by name.
    """

    date: str
    commit: str | None
    machine: str
    versions: dict[str, str]


def made_now(gpu: bool) -> Made:
    """The facts at this moment on this machine.

    Args:
        gpu: whether the run uses GPUs, which are then named.
    """
    versions = {"lpovod": lpovod.__version__, "Python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # an environment without networks has no torch
            continue
    return Made(
        date=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %z"),
        commit=commit_of(Path(lpovod.__file__).parent),
        machine=_machine(gpu),
        versions=versions,
    )


def commit_of(package: Path) -> str | None:
    """The commit that holds a package, "with changes" if its code was edited since.

    None if no git checkout holds it: a package that is installed inside somebody's repository is
    not tracked by that repository.
    """
    if _output("git", "-C", package, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    commit = _output("git", "-C", package, "rev-parse", "HEAD")
    changes = _output("git", "-C", package, "status", "--porcelain", "--", *CODE)
    return f"{commit}, with changes" if changes else commit


def _machine(gpu: bool) -> str:
    cores = usable_cores()
    parts = [_processor(), f"{cores} core{'' if cores == 1 else 's'}"]
    if gpu:
        names = _output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader") or ""
        counted = Counter(line.strip() for line in names.splitlines() if line.strip())
        parts += [f"{n} × {name}" if n > 1 else name for name, n in counted.items()]
    return ", ".join(parts)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(iter(names), "") or platform.processor() or platform.machine()


def _output(*command: str | Path) -> str | None:
    """What a program prints; None if it is absent, fails or hangs."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
