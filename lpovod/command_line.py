"""Start and end of every program: signals, logging, arguments, errors and exit codes.

Exit codes: 0 for success, 1 for wrong data or settings, 2 for wrong usage, 128 + n for signal n.
"""

import json
import signal
import sys
from collections.abc import Callable
from typing import Any

import tyro
from pydantic import ValidationError
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from lpovod.config import Settings
from lpovod.exceptions import DISK_FULL, LpovodError, UsageError
from lpovod.progress import start_logging

_registry = ConstructorRegistry()


@_registry.primitive_rule
def _settings_from_json(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    block = info.type
    if not (isinstance(block, type) and issubclass(block, Settings)):
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=f"JSON, such as '{_example(block)}'",
        instance_from_str=lambda words: _read_block(block, words[0]),
        is_instance=lambda value: isinstance(value, block),
        str_from_instance=lambda value: [value.model_dump_json()],
    )


def _read_block(block: type[Settings], text: str) -> Settings:
    try:
        return block.model_validate_json(text)
    except ValidationError as error:
        problems = [
            f"{'.'.join(map(str, problem['loc'])) or text}: {problem['msg']}"
            for problem in error.errors()
        ]
        if any(problem["type"] == "extra_forbidden" for problem in error.errors()):
            problems.append(f"keys are {', '.join(block.model_fields)}")
        raise ValueError("; ".join(problems)) from None


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
        with _registry:
            if len(functions) == 1:
                return tyro.cli(functions[0], prog=program, args=arguments)
            commands = {function.__name__: function for function in functions}
            return tyro.extras.subcommand_cli_from_dict(commands, prog=program, args=arguments)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except LpovodError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        sys.exit(f"error: {error}. Free some disk space and rerun the command")
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
