# Shortens a run's messages: the job, the reason in a few words, the progress; and after a failure
# what failed, why, and the next step, as the last lines. Snakemake's own reasons name every file,
# and its errors the shell command twice. The file below .snakemake/log/ has them all. Without this
# file a run does the same work.

import logging
import re

from snakemake.logging import DefaultFormatter, logger
from snakemake_interface_logger_plugins.common import LogEvent

from lpovod import epilogue

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


class ShortErrors(logging.Formatter):
    """Snakemake's formatter of the screen, with errors in a line and a summary at the end.

    It has to know Snakemake's messages: what it does not know appears as it is.
    """

    def __init__(self, inner):
        super().__init__()
        self.inner, self.names, self.failed = inner, {}, {}
        self.errors, self.interrupted = [], False

    def format(self, record):
        event, message = getattr(record, "event", None), str(record.msg)
        if event == LogEvent.JOB_INFO:
            self.names[record.jobid] = record.rule_msg or record.rule_name
        elif event == LogEvent.JOB_FINISHED:
            self.failed.pop(record.job_id, None)  # at a later attempt
        elif message.startswith(INTERRUPTS):
            first, self.interrupted = not self.interrupted, True
            return "Interrupted: waiting for the running stages to end." if first else ""
        elif event == LogEvent.JOB_ERROR:
            return self.announce(record)
        elif event == LogEvent.ERROR:
            return self.shorten(record.exception, message)
        elif message.startswith(REPEATED):
            return ""
        return self.inner.format(record)

    def announce(self, record):
        """One line about a failed job."""
        if self.interrupted:
            return ""
        name = self.names.get(record.jobid, record.rule_name)
        logs = tuple(Path(log) for log in record.log)
        # The cluster's message ends with advice that the last lines give.
        reason = (record.rule_msg or "").partition("For further error details")[0].strip()
        self.failed[record.jobid] = epilogue.FailedJob(record.rule_name, name, logs, reason)
        return f"Job {record.jobid} failed: {name}"

    def shorten(self, kind, message):
        """An exception: the last one becomes the summary."""
        if "At least one job did not complete successfully" in message:
            if self.interrupted:
                return f"\n{epilogue.interrupted_run(self.failed.values())}"
            return f"\n{epilogue.failed_run(self.failed.values(), self.errors)}"
        if kind == "LockException":
            return epilogue.LOCKED
        if self.interrupted or "CalledProcessError in file" in message:
            return ""
        if kind in ("WorkflowError", "LpovodError"):
            return epilogue.wrong_settings(message)
        if kind == "MissingInputException":
            return epilogue.missing_files(message)
        if kind == "InputFunctionException":
            return epilogue.of_function(message)
        self.errors.append(message)
        return message


# Of Ctrl-C and of SIGTERM.
INTERRUPTS = (
    "Terminating processes on user request",
    "Will exit after finishing currently running jobs",
)
# What the summary says, or what says nothing after an error.
REPEATED = ("Exiting because a job execution failed", "Shutting down, this might take some time")


def explain_interrupt(kind, error, trace):
    """In place of a traceback, while no job runs yet."""
    if issubclass(kind, KeyboardInterrupt):
        print(f"\n{epilogue.INTERRUPTED}", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


if workflow.is_main_process:
    sys.excepthook = explain_interrupt
    for handler in logger.handlers:
        if type(handler.formatter) is DefaultFormatter and handler.name == "DefaultStreamHandler":
            handler.setFormatter(ShortErrors(handler.formatter))
