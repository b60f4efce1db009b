"""Start and end of every program: signals, logging, arguments, errors and exit codes.

Exit codes: 0 for success, 1 for wrong data or settings, 2 for wrong usage, 128 + n for signal n.
"""

import signal
import sys
from collections.abc import Callable
from typing import Any

import tyro
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
        metavar="JSON",
        instance_from_str=lambda words: block.model_validate_json(words[0]),
        is_instance=lambda value: isinstance(value, block),
        str_from_instance=lambda value: [value.model_dump_json()],
    )


def run(
    *functions: Callable[..., Any], program: str | None = None, arguments: list[str] | None = None
) -> Any:
    """Call the function that the command line names; a single function needs no name.

    Args:
        functions: typed functions.
        program: name in the help; None for the script's name.
        arguments: the command line; None for that of the process.

    Returns:
        what the function returns.

    Raises:
        SystemExit: with the message and no traceback, if the user's data or settings are wrong.
    """
    start_logging()
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
