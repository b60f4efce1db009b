"""Start and end of every program: signals, logging, arguments, errors and exit codes.

Exit codes: 0 for success, 1 for wrong data or settings, 2 for wrong usage, 128 + n for signal n.

Programs disable the collection of garbage before they import anything slow, and `run` enables it: a
third of the seconds in which torch is imported and the program ends.
"""

import errno
import gc
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import tyro
from pydantic import ValidationError
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from lpovod.config import Settings, explain
from lpovod.exceptions import DISK_FULL, LpovodError, UsageError, lack_of_memory
from lpovod.progress import start_logging

SMALLER = (
    "Ask for less: images_at_once, which leaves a step its images, images_per_step or short_sides "
    "of base_detector.training and proposals.training (trainings), region_embeddings.batch_size "
    "(CLIP), proposals.batch_size and region_features.batch_size (inference), "
    "backbone.short_side and backbone.long_side (all networks), proposals.per_image (all regions)"
)

_registry = ConstructorRegistry()


@_registry.primitive_rule
def _settings_from_json(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    block = info.type
    if not (isinstance(block, type) and issubclass(block, Settings)):
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=f"JSON, such as '{_example(block)}'",
        instance_from_str=lambda words: _parse(block, words[0]),
        is_instance=lambda value: isinstance(value, block),
        str_from_instance=lambda value: [value.model_dump_json()],
    )


def _parse(block: type[Settings], text: str) -> Settings:
    try:
        return block.model_validate_json(text)
    except ValidationError as error:
        # tyro prints the message of a ValueError and the option, and exits as for wrong usage.
        lines = [_words(problem, block) for problem in error.errors()]
        raise ValueError("; ".join(lines)) from None


def _words(problem: Any, block: type[Settings]) -> str:
    if problem["type"] == "json_invalid":
        reason = problem["ctx"]["error"]
        return f"not valid json ({reason}); an example: {_example(block)}"
    return explain(problem, block, "json")


def _example(block: type[Settings]) -> str:
    """The first key that has a default of its own, as json."""
    for name, field in block.model_fields.items():
        if not (field.is_required() or isinstance(field.default, Settings | None)):
            return json.dumps({name: field.default}, default=str)
    return "{}"


def _program() -> str | None:
    """How a module that was started with -m is started again."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return f"python -m {spec.name.removesuffix('.__main__')}" if spec else None


@contextmanager
def _collecting() -> Iterator[None]:
    """Collect garbage, but never read what was imported before, nor, at the end, what is left."""
    if gc.isenabled():  # not in a program of its own
        yield
        return
    gc.freeze()
    gc.enable()
    try:
        yield
    finally:
        gc.freeze()


def run(
    *functions: Callable[..., Any], program: str | None = None, arguments: list[str] | None = None
) -> Any:
    """Call the function that the command line names; a single function needs no name.

    Args:
        functions: typed functions.
        program: name in the help; None for that of the running module or script.
        arguments: the command line; None for that of the process.

    Returns:
        what the function returns.

    Raises:
        SystemExit: with the message and no traceback, if the user's data or settings are wrong.
    """
    start_logging()
    program = program or _program()
    try:
        with _registry, _collecting():
            if len(functions) == 1:
                return tyro.cli(functions[0], prog=program, args=arguments)
            commands = {function.__name__: function for function in functions}
            return tyro.extras.subcommand_cli_from_dict(commands, prog=program, args=arguments)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except LpovodError as error:
        sys.exit(f"error: {error}")
    except BrokenPipeError:
        _end_unread()
    except OSError as error:
        sys.exit(f"error: {_of_file(error)}")
    except (MemoryError, RuntimeError) as error:
        if (reason := lack_of_memory(error)) is None:
            raise
        sys.exit(f"error: not enough memory: {reason}\n{SMALLER}")
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


def show(text: str) -> None:
    """Print a program's result.

    Raises:
        SystemExit: without a message, if whoever read the output has ended, such as `head`.
    """
    try:
        print(text, flush=True)
    except BrokenPipeError:
        _end_unread()


def _end_unread() -> None:
    # The interpreter must not flush again.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(128 + signal.SIGPIPE)


def _of_file(error: OSError) -> str:
    """An error of the file system in words."""
    if error.errno in DISK_FULL:
        return f"{error}. Free some disk space and rerun the command"
    remedy = {
        errno.EISDIR: "a file is expected there, not a folder",
        errno.ENOTDIR: "a part of this path is a file, not a folder",
        errno.EACCES: "change its permissions, or choose another path",
        errno.EPERM: "change its permissions, or choose another path",
        errno.EROFS: "choose a path that can be written",
        errno.ENOENT: "check the path",
        errno.EEXIST: "choose another path",
        errno.ENAMETOOLONG: "choose a shorter path",
        errno.ELOOP: "its links form a circle",
        errno.EMFILE: "allow more open files (ulimit -n)",
        errno.ENOMEM: SMALLER,
    }.get(error.errno or 0)
    if remedy is None or error.filename is None and error.errno != errno.ENOMEM:
        raise error  # not a matter of the user's files: the traceback says more
    name = f"{error.filename}: " if error.filename is not None else ""
    return f"{name}{os.strerror(error.errno or 0)}: {remedy}"
