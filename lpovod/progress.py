"""Progress with rate and time left, on a terminal and in a log file alike."""

import os
import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

# Of the processes of one training (see lpovod.distributed) one speaks.
FIRST_RANK = os.environ.get("RANK", "0") == "0"


def progress(items: Iterable[Any], what: str, unit: str, total: int | None = None, **kwargs):
    """A tqdm bar over `items`; in a log, a line every ten seconds instead of a redrawn one."""
    terminal = sys.stderr.isatty()
    return tqdm(
        items,
        desc=what,
        unit=unit,
        total=total,
        disable=not FIRST_RANK,
        mininterval=0.5 if terminal else 10,
        file=sys.stderr if terminal else _Lines(),
        **kwargs,
    )


class _Lines:
    """Turns tqdm's redrawing into lines: a log has no carriage return."""

    def write(self, text: str) -> None:
        text = text.strip("\r\n ")
        if text:
            print(text, file=sys.stderr, flush=True)

    def flush(self) -> None:
        sys.stderr.flush()


def say(message: str) -> None:
    """One line of a stage's log."""
    if FIRST_RANK:
        print(message, file=sys.stderr, flush=True)
