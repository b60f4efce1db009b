"""Command lines of the stages: one file per stage, one typed function per command.

A block of settings is given as json, everything else by value or path, and so every stage can be
run by hand: ``python -m workflow_scripts.pseudo_labels --help``.
"""

import errno
import signal
import sys
from collections.abc import Callable
from typing import Any

# Before anything slow is imported. The shell of a rule ignores both signals (rules/common.smk), and
# a program inherits that; SIGTERM ends it like an error, so that no half-written file is left.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))

import tyro  # noqa: E402
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo  # noqa: E402

from lpovod.artifacts import LpovodError  # noqa: E402
from lpovod.config import Settings  # noqa: E402

_registry = ConstructorRegistry()


@_registry.primitive_rule
def _settings_from_json(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    block = info.type
    if not (isinstance(block, type) and issubclass(block, Settings)):
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="JSON",
        instance_from_str=lambda words: block.model_validate_json(words[0]),
        is_instance=lambda value: isinstance(value, block),
        str_from_instance=lambda value: [value.model_dump_json()],
    )


def run(*functions: Callable[..., Any]) -> None:
    """Call the function that the command line names (the only one needs no name).

    An error of the user's data ends the process with its message alone.
    """
    try:
        with _registry:
            if len(functions) == 1:
                tyro.cli(functions[0])
            else:
                tyro.extras.subcommand_cli_from_dict({f.__name__: f for f in functions})
    except LpovodError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        sys.exit(f"error: {error}. Make room, then run the same command again")
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
