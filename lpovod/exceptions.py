"""The project's error class, and the phrases its messages share."""

import errno
import os
from pathlib import Path

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


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


def some(names: list[str]) -> str:
    """The first five names, and the number of those left out."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
