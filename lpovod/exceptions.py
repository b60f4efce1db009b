"""The one error of this project, and what its messages share."""

import errno
import os
from pathlib import Path

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


class LpovodError(Exception):
    """The user's data or settings are wrong: the message says what, where and what to do."""


class UsageError(LpovodError):
    """A command line asks for something impossible."""


def existing(path: Path) -> Path:
    """The path of a file that is about to be read.

    Raises:
        LpovodError: if there is no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise LpovodError(f"{path}: no such file")
    return path


def disk_full(path: Path, number: int = errno.ENOSPC) -> LpovodError:
    """The error of a file that cannot be written because the disk or the quota is full."""
    return LpovodError(
        f"{path} cannot be written: {os.strerror(number)}. Free some disk space and rerun the "
        "command"
    )


def some(names: list[str]) -> str:
    """The first few of many names, and how many more there are."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
