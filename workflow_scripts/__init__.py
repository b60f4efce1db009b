"""Command lines of the stages: one file per stage, one typed function per command.

A block of settings is given as json, everything else by value or path, and so every stage can be
run by hand: ``python -m workflow_scripts.pseudo_labels --help``.
"""

import signal
import sys

# Before anything slow is imported. The shell of a rule ignores both signals (rules/common.smk), and
# a program inherits that; SIGTERM ends it like an error, so that no half-written file is left.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))

from lpovod.command_line import run  # noqa: E402

__all__ = ["run"]
