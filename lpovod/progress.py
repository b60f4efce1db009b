"""Progress bars and the log, for a terminal and for a log file."""

import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from tqdm import tqdm

# A training may run in several processes (see lpovod.distributed); only the first one reports.
FIRST_RANK = os.environ.get("RANK", "0") == "0"

log = logging.getLogger("lpovod")
"""Every module reports here: `log.info`, `log.warning`, `log.error`."""


Listener = Callable[[str, int, int | None], None]
"""Called with the description of a bar, the items done, and their number if it is known."""

_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Report the bars of this thread to a function in place of the terminal and the log."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


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
        line = f"{self.formatTime(record, self.datefmt)} {level}{record.getMessage()}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


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
    if (listener := _listener.get()) is not None:
        return _Reported(items, description, total, unit=unit, listener=listener, **kwargs)
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


class _Reported(tqdm):
    """A bar that a listener hears of, ten times a second at most."""

    def __init__(self, *args: Any, listener: Listener, **kwargs: Any):
        self._listener = listener
        super().__init__(*args, mininterval=0.1, file=_Nowhere(), **kwargs)

    def display(self, *_: Any, **__: Any) -> None:
        """Called by tqdm whenever the bar would be drawn anew."""
        self._listener(self.desc, self.n, self.total)


class _Nowhere:
    def write(self, text: str) -> None:
        pass

    def flush(self) -> None:
        pass


class _Lines:
    """Turns tqdm's redrawn bar into log lines: a log has no carriage return."""

    def write(self, text: str) -> None:
        if text := text.strip("\r\n "):
            log.info(text)

    def flush(self) -> None:
        sys.stderr.flush()
