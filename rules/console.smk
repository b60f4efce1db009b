# Shortens a run's messages: the job, the reason in a few words, the progress. Snakemake's own
# reasons name every file. Without this file a run does the same work.

import logging
import re

from snakemake.logging import logger

REASONS = (
    (r"^Missing output files: .*", "not made yet"),
    (r"^Incomplete output files: .*", "interrupted before"),
    (r"^Input files updated by another job: .*", "its input was made again"),
    (r"^Updated input files: (.*)", r"changed: \1"),
    (r"^Set of input files has changed.*", "other input files"),
    (r"^Code has changed.*", "its rule changed"),
    (r"^Params have changed.*", "its settings or its code changed"),
    (r"^Software environment definition has changed.*", "its environment changed"),
    (r"^Forced execution", "forced"),
)


def few_words(reason):
    """Snakemake's reason without its lists of files."""
    words = []
    for part in str(reason).split("; "):
        for pattern, short in REASONS:
            part = re.sub(pattern, short, part, flags=re.DOTALL)
        words.append(part)
    return "; ".join(dict.fromkeys(words))


class ShortReasons(logging.Filter):
    """Shortens the reason of every announced job."""

    def filter(self, record):
        if hasattr(record, "reason"):
            record.reason = few_words(record.reason)
        return True


if not any(type(f).__name__ == "ShortReasons" for f in logger.filters):
    logger.addFilter(ShortReasons())
