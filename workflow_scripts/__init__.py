"""Command lines of the stages: one file per stage, one typed function per command.

A block of settings is given as json, everything else by value or path, and so every stage can be
run by hand: ``python -m workflow_scripts.pseudo_labels --help``.
"""

import sys
from collections.abc import Callable
from typing import Any

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from lpovod.artifacts import LpovodError
from lpovod.config import Settings

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
