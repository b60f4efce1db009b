"""Command lines of the stages: one file per stage, one typed function per command.

Blocks of settings are passed as json, everything else as values or paths, so every stage can be run
by hand: ``python -m workflow_scripts.pseudo_labels --help``.
"""

import gc
import signal
import sys

# Before any slow import. The shell of a rule ignores both signals (rules/common.smk), and a program
# inherits that. Both end the program like an error, so that it leaves no half-written file, and
# without a traceback, even during imports.
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, _: sys.exit(128 + number))

gc.disable()  # until `run`

from lpovod.command_line import run  # noqa: E402

__all__ = ["run"]
