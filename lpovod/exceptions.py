"""The project's error class, and the phrases its messages share."""

import difflib
import errno
import os
import re
from collections.abc import Iterable
from pathlib import Path

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)

OUT_OF_MEMORY = (
    "out of memory",
    "not enough memory",
    "can't allocate memory",
    "_STATUS_ALLOC_FAILED",  # cuBLAS and cuDNN
    "killed by signal: Killed",  # a loading process, by the system
)
"""In the messages of torch, of CUDA, of the CPU's allocator and of torch's data loader."""


class LpovodError(Exception):
    """The user's data or settings are wrong: the message names fault, place and remedy."""


class UsageError(LpovodError):
    """A command line asks for something impossible."""


def existing(path: Path, subject: str = "") -> Path:
    """The path of a file that is about to be read.

    Args:
        path: the file.
        subject: the key or item that names it, for the message.

    Raises:
        LpovodError: if there is no such file, or a folder in its place.
    """
    path = Path(path)
    if not path.is_file():
        prefix = f"{subject}: " if subject else ""
        fault = "is a folder, expected a file" if path.is_dir() else "no such file"
        raise LpovodError(f"{prefix}{path}: {fault}")
    return path


def disk_full(path: Path, number: int | None = errno.ENOSPC) -> LpovodError:
    """The error to raise if a file cannot be written because the disk or the quota is full."""
    reason = os.strerror(number or errno.ENOSPC)
    return LpovodError(
        f"{path} cannot be written: {reason}. Free some disk space and rerun the command"
    )


def lack_of_memory(error: BaseException) -> str | None:
    """The first line of an error that tells of too little memory; None of any other error.

    torch's OutOfMemoryError is a RuntimeError, and torch is imported only by what needs it.
    """
    text = str(error).strip()
    if isinstance(error, MemoryError):
        return text or "the machine's is used up"
    if any(words in text for words in OUT_OF_MEMORY):
        return text.splitlines()[0]
    # torch's loader misses a process, because of an error that says how it ended.
    return lack_of_memory(error.__cause__) if error.__cause__ else None


def why_unreadable(path: Path, error: Exception) -> str:
    """Why a file of weights cannot be read, without torch's advice to run the code in it."""
    with open(path, "rb") as file:
        start = file.read(64).lstrip()
    if not start:
        return "it is empty"
    if start.startswith(b"<"):
        return "it is a web page, in place of a download"
    text = str(error)
    if named := re.search(r"nsupported (?:global: )?GLOBAL ([A-Za-z_][\w.]*\w)", text):
        return f"it names {named[1]}, which is no tensor"
    if text.startswith("Weights only load failed"):
        return "it is damaged, or holds more than tensors"
    return (text.strip().splitlines() or [type(error).__name__])[0]


def did_you_mean(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """The question whether the most similar known name was meant; empty if none is similar."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return f"did you mean {near[0]}?" if near else ""


def some(names: list[str]) -> str:
    """The first five names, and the number of those left out."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
