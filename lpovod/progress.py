"""Progress bars and the log, for a terminal and for a log file."""

import logging
import os
import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

# A training may run in several processes (see lpovod.distributed); only the first one reports.
FIRST_RANK = os.environ.get("RANK", "0") == "0"

log = logging.getLogger("lpovod")
"""Every module reports here: `log.info`, `log.warning`, `log.error`."""


def be_silent() -> None:
    """Report nothing but errors from now on: this process is not the first of a training."""
    global FIRST_RANK
    FIRST_RANK = False
    log.setLevel(logging.ERROR)


def start_logging() -> None:
    """Send the log to standard error; each line has its time and, above info, its level."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter(datefmt="%H:%M:%S"))
    log.handlers[:] = [handler]
    log.setLevel(logging.INFO if FIRST_RANK else logging.ERROR)
    log.propagate = False


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        level = "" if record.levelno == logging.INFO else f"{record.levelname}: "
        return f"{self.formatTime(record, self.datefmt)} {level}{record.getMessage()}"


def progress(
    items: Iterable[Any] | None,
    description: str,
    unit: str,
    total: int | None = None,
    **kwargs: Any,
) -> tqdm:
    """A tqdm bar with rate and time left; a log gets a line every ten seconds instead.

    Args:
        items: to iterate over; None for a bar that the caller updates.
        description: printed in front of the bar.
        unit: of the items.
        total: number of items, if `items` has no length.
        **kwargs: passed to tqdm.
    """
    terminal = sys.stderr.isatty()
    return tqdm(
        items,
        desc=description,
        unit=unit,
        total=total,
        disable=not FIRST_RANK,
        mininterval=0.5 if terminal else 10,
        file=sys.stderr if terminal else _Lines(),
        **kwargs,
    )


class _Lines:
    """Turns tqdm's redrawn bar into log lines: a log has no carriage return."""

    def write(self, text: str) -> None:
        if text := text.strip("\r\n "):
            log.info(text)

    def flush(self) -> None:
        sys.stderr.flush()
