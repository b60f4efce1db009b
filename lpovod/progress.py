"""Progress with rate and time left, and the log: on a terminal and in a log file alike."""

import logging
import os
import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

# Of the processes of one training (see lpovod.distributed) only the first reports.
FIRST_RANK = os.environ.get("RANK", "0") == "0"

log = logging.getLogger("lpovod")
"""What every module reports to: `log.info`, `log.warning`, `log.error`."""


def be_silent() -> None:
    """Report nothing but errors from now on: this process is not the first of a training."""
    global FIRST_RANK
    FIRST_RANK = False
    log.setLevel(logging.ERROR)


def start_logging() -> None:
    """Send the log to standard error, each line with its time and, unless it is info, its level."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter(datefmt="%H:%M:%S"))
    log.handlers[:] = [handler]
    log.setLevel(logging.INFO if FIRST_RANK else logging.ERROR)
    log.propagate = False


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        level = "" if record.levelno == logging.INFO else f"{record.levelname}: "
        return f"{self.formatTime(record, self.datefmt)} {level}{record.getMessage()}"


def progress(items: Iterable[Any] | None, what: str, unit: str, total: int | None = None, **kwargs):
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
        if text := text.strip("\r\n "):
            log.info(text)

    def flush(self) -> None:
        sys.stderr.flush()
