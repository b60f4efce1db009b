"""The end of a run that failed: each failed stage, its own error, its log, and the next step.

The workflow prints this as the last lines on the screen (rules/console.smk).
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

AGAIN = "run the same command again: finished work is kept"
INTERRUPTED = f"Interrupted. To continue, {AGAIN}."
LOCKED = (
    "error: this folder is locked: another run works in it, or one was killed.\n"
    "Wait for the other run. If there is none, add --unlock to the command once, then "
    f"{AGAIN}."
)
SHOWN = 10
"""Lines of a stage's message that are shown."""

_PLACE = re.compile(r'^(?:WorkflowError|LpovodError) in file "[^"]*", line \d+:\n')
_OURS = re.compile(r"Error:\n  (?:WorkflowError|LpovodError):\n(.*?)\nWildcards:", re.DOTALL)
_TRACE = re.compile(r'(?:\n\s*File "[^"]*", line \d+, in .*)+\s*$')


@dataclass(frozen=True)
class FailedJob:
    """A job that failed.

    Attributes:
        stage: the rule.
        name: what it did, in words.
        logs: the files that it wrote its messages to, the stage's own first.
        message: of the workflow engine, if it had one.
    """

    stage: str
    name: str
    logs: tuple[Path, ...]
    message: str = ""


def failed_run(jobs: Iterable[FailedJob], others: Iterable[str] = ()) -> str:
    """The last lines of a failed run, with one job of each stage.

    Args:
        jobs: those that failed.
        others: errors that belong to no job.
    """
    stages: dict[str, list[FailedJob]] = {}
    for job in jobs:
        stages.setdefault(job.stage, []).append(job)
    lines = ["The run failed."]
    for members in stages.values():
        first, more = members[0], len(members) - 1
        lines += ["", f"{first.name}{f', and {more} more of this stage' if more else ''}"]
        lines += [f"  {line}" for line in _reason(first).splitlines()]
        lines += [f"  log: {path}" for path in first.logs]
    for message in dict.fromkeys(others):
        lines += ["", message]
    return "\n".join([*lines, "", f"Next: mend the cause, then {AGAIN}."])


def interrupted_run(jobs: Iterable[FailedJob]) -> str:
    """The last lines after Ctrl-C; stages that it ended have no error, others may have failed."""
    failed = [job for job in jobs if _error(job)]
    return failed_run(failed) if failed else INTERRUPTED


def wrong_settings(message: str) -> str:
    """Snakemake's message about an error of ours, without the place in our code."""
    plain = _TRACE.sub("", _PLACE.sub("", message)) if _PLACE.match(message) else message
    return plain if plain == message else f"error: {plain}"


def missing_files(message: str) -> str:
    """Snakemake's message about inputs that neither exist nor are made."""
    names = message.partition("affected files:\n")[2].split("\n")
    listed = ", ".join(name.strip() for name in names if name.strip())
    return (
        f"error: {listed}: no such file, and no stage makes it. Correct its path"
        if listed
        else message
    )


def of_function(message: str) -> str:
    """Snakemake's message about an error of ours in an input function of a rule."""
    ours = _OURS.search(message)
    return f"error: {ours[1].strip()}" if ours else message


def error_of(log: str) -> str:
    """A stage's own error message at the end of its log; empty if there is none.

    After a traceback, which is a defect, only its last line is shown.
    """
    lines = [line.rstrip() for line in log.splitlines() if line.strip()]
    for number, line in enumerate(lines):
        if line.startswith("error: "):
            message = list(dict.fromkeys(lines[number:]))  # each rank prints its own
            left = len(message) - SHOWN
            return "\n".join(message[:SHOWN] + ([f"and {left} more lines"] if left > 0 else []))
    if any(line.startswith("Traceback ") for line in lines):
        return f"{lines[-1]} (a defect of the program: its log has the place)"
    return ""


def _reason(job: FailedJob) -> str:
    reason = job.message or "it was killed, perhaps for lack of memory"
    return _error(job) or f"error: it ended without a message: {reason}"


def _error(job: FailedJob) -> str:
    logs = (path.read_text(errors="replace") for path in job.logs if path.is_file())
    return next(filter(None, map(error_of, logs)), "")
